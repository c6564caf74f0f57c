"""Meta tensors, models built on meta, and batches without rows."""

import pytest
import torch
from helpers.tracing import (
    QUIET,
    Case,
    H,
    Inputs,
    Model,
    N,
    V,
    all_losses,
    assert_alike,
    assert_close,
    both_losses,
    every_case,
    fake_copies,
    make_inputs,
    step_of,
    trained,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = QUIET


@every_case
@pytest.mark.parametrize("shape", [(N,), (2, 5)], ids=str)
def test_meta_tensors(case, shape):
    expected = step_of(case)(*make_inputs(*shape))
    assert_alike(step_of(case)(*make_inputs(*shape, device="meta")), expected, "meta")


@all_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["meta", "fake", "symbolic graph"])
def test_no_rows(loss, reduction, kind):
    case = Case(loss, {"reduction": reduction})
    inputs = make_inputs(5)
    empty = [t[:0] if t.shape[:1] == (5,) else t for t in make_inputs(5, grad=False)]
    empty = Inputs(*(t.requires_grad_() for t in empty[:3]), *empty[3:])
    if kind == "meta":
        got = step_of(case)(*(t.to("meta").detach().requires_grad_(t.requires_grad) for t in empty))
    elif kind == "fake":
        with FakeTensorMode():
            got = step_of(case)(*fake_copies(empty, "cpu"))
    else:
        got = make_fx(step_of(case), tracing_mode="symbolic")(*inputs)(*empty)
        assert all(not gradient.any() for gradient in got[1:])
    assert [tuple(t.shape) for t in got] == [(0,) if reduction == "none" else (), (0, H), (V, H), (V,)]


@all_losses
def test_meta_tensors_under_autocast_of_another_device(loss):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step_of(Case(loss))(*make_inputs(device="meta"))
    assert all(t.is_meta and t.dtype == torch.float32 for t in got)


def test_meta_row_sampling_without_a_seed():
    got = step_of(Case("linear", {"row_sampling": 0.5}))(*make_inputs(device="meta"))
    assert all(t.is_meta for t in got)


@all_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_model_built_on_meta(loss, reduction):
    """Its forward and backward cost nothing; with memory and values it computes what the model built at once does."""
    model = Model(loss, reduction=reduction)
    hidden, _, _, targets, *_ = make_inputs(grad=False)
    expected = trained(model, hidden, targets)
    with torch.device("meta"):
        other = Model(loss, reduction=reduction)
        on_meta = trained(other, torch.empty(N, H), torch.empty(N, dtype=torch.int64))
    assert_alike(on_meta, expected, "meta")
    other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), strict=False)
    name = "weight" if loss == "torch" else "weights"
    setattr(other.criterion, name, getattr(model.criterion, name))  # ours stay out of checkpoints
    assert_close(trained(other, hidden, targets), expected)


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("options", [{}, {"normalizer": 7}], ids=str)
def test_ordinary_tensors_while_the_default_device_is_meta(loss, options):
    expected = step_of(Case(loss, options))(*make_inputs())
    inputs = make_inputs()
    with torch.device("meta"):
        got = step_of(Case(loss, options))(*inputs)
    assert_close(got, expected)
