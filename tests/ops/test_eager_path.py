"""Ordinary tensors meet no operator: they keep the eager path."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tracing import (
    QUIET,
    Case,
    H,
    Inputs,
    N,
    V,
    assert_close,
    both_losses,
    differentiate,
    forward_of,
    make_inputs,
    step_of,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from pdl_kernels import pdl_cross_entropy

pytestmark = QUIET


class Named(torch.Tensor):
    """A tensor class that intercepts functions, not operators."""


EAGER = {"logits": "_CrossEntropyBackward", "linear": "_LinearCrossEntropyBackward"}


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("kind", ["leaves", "parameters", "buffers", "a subclass", "no grad", "inference mode"])
def test_ordinary_tensors_meet_no_operator(loss, kind):
    inputs = make_inputs(grad=kind not in ("no grad", "inference mode"))
    if kind == "parameters":
        inputs = Inputs(*map(nn.Parameter, inputs[:3]), *inputs[3:])
    elif kind == "buffers":
        inputs = inputs._replace(weights=nn.Buffer(inputs.weights), token_weights=nn.Buffer(inputs.token_weights))
    elif kind == "a subclass":
        inputs = inputs._replace(targets=inputs.targets.as_subclass(Named))
    if kind == "inference mode":
        with torch.inference_mode():
            (found,) = forward_of(Case(loss))(*inputs)
    else:
        (found,) = forward_of(Case(loss))(*inputs)
    if inputs.hidden.requires_grad:
        assert found.grad_fn.name() == EAGER[loss]
    else:
        assert found.grad_fn is None


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("context", ["autocast", "device", "profiler", "saved tensors", "on cpu", "anomaly"])
def test_contexts_that_intercept_no_operator(loss, context):
    inputs, packed = make_inputs(), []
    contexts = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "device": lambda: torch.device("cpu"),
        "profiler": torch.profiler.profile,
        "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t.shape) or t, lambda t: t
        ),
        "on cpu": torch.autograd.graph.save_on_cpu,
        "anomaly": torch.autograd.detect_anomaly,
    }
    with contexts[context]():
        (found,) = forward_of(Case(loss))(*inputs)
    assert found.grad_fn.name() == EAGER[loss]
    tolerance = 0.1 if context == "autocast" else 1e-5
    assert_close(differentiate(Case(loss), (found,), inputs), step_of(Case(loss))(*inputs), tolerance)
    if context == "saved tensors":
        assert {"logits": (N, V), "linear": (V, H)}[loss] in packed


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_keeps_the_eager_path(loss, reentrant):
    inputs, names = make_inputs(), []

    def forward(*tensors):
        (found,) = forward_of(Case(loss))(*tensors)
        names.append(found.grad_fn and found.grad_fn.name())
        return found

    expected = step_of(Case(loss))(*inputs)
    found = checkpoint(forward, *inputs, use_reentrant=reentrant)
    (found * 1.5).backward()
    assert_close((found.detach(), *(t.grad for t in inputs[:3])), expected)
    assert names == ([None, EAGER[loss]] if reentrant else [EAGER[loss]]), "recomputation may stop early"


@pytest.mark.usefixtures("_no_operators")
def test_inplace_still_overwrites_the_logits():
    inputs = make_inputs()
    logits = F.linear(*inputs[:3])
    loss = pdl_cross_entropy(logits, inputs.targets, inputs.weights, inplace=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("mode", ["make_fx", "jit"])
def test_inplace_has_no_effect_on_traced_logits(mode):
    """Eager mode refuses it for a leaf."""
    inputs = make_inputs()
    logits = F.linear(*inputs[:3]).detach()
    trace = torch.jit.trace if mode == "jit" else lambda function, arguments: make_fx(function)(*arguments)
    graph = trace(lambda *t: pdl_cross_entropy(*t, inplace=True), (logits.clone().requires_grad_(), inputs.targets))
    leaf = logits.clone().requires_grad_()
    graph(leaf, inputs.targets).backward()
    assert torch.equal(leaf, logits)
    expected = logits.clone().requires_grad_()
    F.cross_entropy(expected, inputs.targets).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)
