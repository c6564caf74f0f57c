"""Errors are ours where tensors are fake, on meta or traced."""

import contextlib

import pytest
import torch.nn.functional as F
from helpers.tracing import (
    QUIET,
    Inputs,
    fake_copies,
    make_inputs,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy

pytestmark = QUIET


LOGITS_ERRORS = {
    "targets' shape": (lambda i: {"targets": i.targets[:-1]}, ValueError, "targets have shape"),
    "targets' dtype": (lambda i: {"targets": i.targets.float()}, TypeError, "targets are torch.float32"),
    "weights' shape": (lambda i: {"weights": i.weights[:-1]}, ValueError, "weights have shape"),
    "weights' dtype": (lambda i: {"weights": i.weights.long()}, TypeError, "weights are torch.int64"),
    "weights' grad": (lambda i: {"weights": i.weights.requires_grad_()}, NotImplementedError, "weights require grad"),
    "token weights' shape": (
        lambda i: {"token_weights": i.token_weights[:-1]}, ValueError, "token_weights have shape",
    ),
    "normalizer's shape": (lambda i: {"normalizer": i.weights}, ValueError, "normalizer has shape"),
    "normalizer's sign": (lambda i: {"normalizer": -1.0}, ValueError, "normalizer is -1"),
    "normalizer of a sum": (lambda i: {"normalizer": i.number, "reduction": "sum"}, ValueError, "normalizer is given"),
    "expected upstream": (lambda i: {"expected_upstream": i.weights}, ValueError, "expected_upstream has shape"),
    "expected upstream of 0": (lambda i: {"expected_upstream": 0.0}, ValueError, "expected_upstream is 0"),
    "reduction": (lambda i: {"reduction": "median"}, ValueError, "reduction is 'median'"),
    "backend": (lambda i: {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
}  # fmt: skip
LINEAR_ERRORS = {
    "hidden's shape": (lambda i: {"hidden": i.hidden[:, 1:]}, ValueError, "accepted is hidden of shape"),
    "hidden's dtype": (lambda i: {"hidden": i.hidden.bfloat16()}, TypeError, "accepted is one dtype for all"),
    "hidden of integers": (lambda i: {"hidden": i.hidden.long()}, TypeError, "hidden is torch.int64"),
    "bias' shape": (lambda i: {"bias": i.bias[1:]}, ValueError, "bias has shape"),
    "seed's shape": (lambda i: {"seed": i.weights, "row_sampling": 0.5}, ValueError, "seed has shape"),
}
ERRORS = [
    pytest.param(loss, *error, id=f"{loss}: {name}")
    for loss, errors in (("logits", LOGITS_ERRORS), ("linear", LOGITS_ERRORS | LINEAR_ERRORS))
    for name, error in errors.items()
]


@pytest.mark.parametrize("kind", ["fake", "meta", "make_fx"])
@pytest.mark.parametrize(("loss", "change", "error", "message"), ERRORS)
def test_errors_are_ours(loss, change, error, message, kind):
    def call(*tensors):
        inputs = Inputs(*tensors)
        arguments = {
            "targets": inputs.targets, "weights": inputs.weights, "token_weights": inputs.token_weights,
        }  # fmt: skip
        if loss == "linear":
            arguments |= {"hidden": inputs.hidden, "lm_head_weight": inputs.lm_head_weight, "bias": inputs.bias}
            return pdl_linear_cross_entropy(**(arguments | change(inputs)))
        arguments["logits"] = F.linear(*inputs[:3])
        return pdl_cross_entropy(**(arguments | change(inputs)))

    inputs = make_inputs(device="meta" if kind == "meta" else "cpu")
    if kind == "make_fx":
        call = make_fx(call, tracing_mode="symbolic")
    mode = FakeTensorMode() if kind == "fake" else contextlib.nullcontext()
    with mode:
        inputs = fake_copies(inputs, "cpu") if kind == "fake" else inputs
        with pytest.raises(error, match=message):
            call(*inputs)
