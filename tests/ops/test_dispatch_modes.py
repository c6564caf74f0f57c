"""Other modes and tensor classes that intercept operators, and the estimators of memory that are such modes."""

import contextlib

import pytest
import torch
from helpers.tracing import (
    QUIET,
    H,
    Model,
    Record,
    assert_alike,
    assert_close,
    both_losses,
    differentiate,
    every_case,
    fake_copies,
    few_cases,
    forward_of,
    make_inputs,
    step_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytestmark = QUIET


@few_cases
def test_nested_modes(case):
    inputs = make_inputs()
    expected = step_of(case)(*inputs)
    with Record() as outer, FlopCounterMode(display=False), Record() as inner:
        got = step_of(case)(*inputs)
    assert_close(got, expected)
    for record in (outer, inner):
        assert len(record.ours) == (0 if case.loss == "torch" else 2)


@every_case
def test_fake_operators_return_what_real_ones_do(case):
    """Autograd would hide a gradient of another dtype, and memory estimators would count it."""
    inputs = make_inputs(dtype=torch.bfloat16)
    with Record() as real:
        step_of(case)(*inputs)
    with FakeTensorMode(), Record() as fake:
        step_of(case)(*fake_copies(inputs, "cpu"))
    assert len(real.ours) == (0 if case.loss == "torch" else 2)
    for got, expected in zip(fake.ours, real.ours, strict=True):
        assert_alike(got, expected, "cpu")


@few_cases
@pytest.mark.parametrize("where", ["forward", "backward", "backward of a checkpoint"])
def test_one_half_in_a_mode_and_the_other_outside(case, where):
    inputs = make_inputs()
    mode = Record()
    with mode if where == "forward" else contextlib.nullcontext():
        if where == "backward of a checkpoint":
            outputs = checkpoint(forward_of(case), *inputs, use_reentrant=False)
        else:
            outputs = forward_of(case)(*inputs)
    with contextlib.nullcontext() if where == "forward" else mode:
        got = differentiate(case, outputs, inputs)
    assert_close(got, step_of(case)(*inputs))
    assert mode.seen


@few_cases
def test_fake_forward_inside_and_backward_outside_of_their_mode(case):
    inputs = make_inputs()
    with FakeTensorMode():
        fakes = fake_copies(inputs, "cpu")
        outputs = forward_of(case)(*fakes)
    assert_alike(differentiate(case, outputs, fakes), step_of(case)(*inputs), "cpu")


class Wrapped(torch.Tensor):
    """A tensor class that intercepts operators and computes on what it holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        arguments, keywords = tree_map_only(cls, lambda wrapped: wrapped.held, (arguments, keywords or {}))
        return tree_map_only(torch.Tensor, cls, function(*arguments, **keywords))


@few_cases
def test_a_tensor_class_that_intercepts_operators(case):
    inputs = make_inputs(grad=False)
    wrapped = [Wrapped(t) for t in inputs]
    wrapped = [*(t.requires_grad_() for t in wrapped[:3]), *wrapped[3:]]
    got = step_of(case)(*wrapped)
    assert all(type(t) is Wrapped for t in got)
    assert_close([t.held for t in got], step_of(case)(*make_inputs()))


@both_losses
def test_memory_estimators(loss):
    """MemTracker on fake tensors: no more than torch needs."""
    from torch.distributed._tools.mem_tracker import MemTracker

    def peak(loss):
        rows = 256
        with FakeTensorMode():
            model = Model(loss)
            hidden, targets = torch.empty(rows, H), torch.empty(rows, dtype=torch.int64)
            tracker = MemTracker()
            tracker.track_external(model, hidden, targets)
            with tracker:
                model(hidden, targets).backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    assert 0 < peak(loss) < peak("torch")
