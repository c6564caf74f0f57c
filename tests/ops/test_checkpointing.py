"""Activation checkpointing: the loss is computed again in backward, or kept, as the policy says."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import make_targets
from helpers.autograd import N, V
from helpers.tracing import (
    QUIET,
    Case,
    all_losses,
    assert_close,
    differentiate,
    forward_of,
    make_inputs,
    step_of,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.ops import cross_entropy as logits_operation
from pdl_kernels.ops import linear_cross_entropy as linear_operation

pytestmark = QUIET


# Torch compares where the kept and the recomputed tensors are.
RECOMPUTED = pytest.mark.needs_driver(reason="a tensor that a matrix product keeps is on a CPU, as it really is")


@pytest.mark.parametrize("use_reentrant", [True, pytest.param(False, marks=RECOMPUTED)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_activation_checkpointing(backend, use_reentrant, inplace, upstream, device):
    torch.manual_seed(2)
    weight = torch.randn(V, 8, device=device).requires_grad_()
    hidden = torch.randn(N, 8, device=device).requires_grad_()
    targets = make_targets(N, V=V, device=device)

    def head_and_loss(hidden):
        return pdl_cross_entropy(hidden @ weight.t(), targets, inplace=inplace, backend=backend)

    loss = checkpoint(head_and_loss, hidden, use_reentrant=use_reentrant)
    (upstream * loss).backward()
    got = hidden.grad, weight.grad
    torchs = upstream * F.cross_entropy(hidden @ weight.t(), targets)
    for ours, expected in zip(got, torch.autograd.grad(torchs, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


OPERATORS = {
    "torch": torch.ops.aten.nll_loss_forward.default,
    "logits": torch.ops.pdl_kernels.cross_entropy.default,
    "linear": torch.ops.pdl_kernels.linear_cross_entropy.default,
}


@all_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("saved", ["the loss", "products", "nothing"])
def test_selective_checkpointing(loss, reduction, saved, monkeypatch):
    case, inputs = Case(loss, {"reduction": reduction}), make_inputs()
    runs = []

    def counting(function):
        return lambda *arguments, **options: runs.append(function) or function(*arguments, **options)

    monkeypatch.setattr(logits_operation, "_run_forward", counting(logits_operation._run_forward))
    monkeypatch.setattr(linear_operation, "make_run", counting(linear_operation.make_run))

    def policy(_, operator, *__, **___):
        keep = {"the loss": (OPERATORS[loss],), "products": (torch.ops.aten.addmm.default,), "nothing": ()}[saved]
        return CheckpointPolicy.MUST_SAVE if operator in keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    outputs = checkpoint(forward_of(case), *inputs, use_reentrant=False, context_fn=contexts)
    got = differentiate(case, outputs, inputs)
    expected_runs = {"torch": 0, "logits": 2, "linear": 2 + (reduction == "none")}[loss]
    assert len(runs) == expected_runs - (saved == "the loss" and loss != "torch"), "forward and backward of the loss"
    assert_close(got, step_of(case)(*inputs))
