"""Fixtures of the tests of autograd and tracing."""

import pytest
import torch
import torch._dynamo
from helpers import make_logits, make_targets, make_weights, run_reference
from helpers.autograd import N, V

from pdl_kernels.ops import cross_entropy as logits_operation
from pdl_kernels.ops import linear_cross_entropy as linear_operation


@pytest.fixture
def problem(device):
    """(logits, targets, weights) and the gradient of the mean for an upstream gradient of 1."""
    logits = make_logits(N, V, device=device)
    targets = make_targets(N, V=V, device=device)
    weights = make_weights("random", V, device) + 0.1
    gradient = run_reference(logits, targets, weights).gradient.to(device=device, dtype=torch.float32)
    return logits, targets, weights, gradient


@pytest.fixture
def _no_operators(monkeypatch):
    """The operators raise, so that what runs is the eager path."""

    def refuse(*_):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(logits_operation, "_forward_operator", refuse)
    monkeypatch.setattr(linear_operation, "_forward_operator", refuse)


@pytest.fixture
def _fresh_compiler():
    """torch.compile without what it compiled before, and with its counters at 0."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
