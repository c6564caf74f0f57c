"""The yardsticks themselves: the float64 reference against torch, and the formula of the weights."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    make_logits,
    make_targets,
    make_weights,
)

from pdl_kernels import power_law_weights
from reference.pdl import power_law_weights as reference_power_law_weights
from reference.pdl import reference_cross_entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_reference_is_torchs_cross_entropy(reduction, label_smoothing):
    logits = make_logits(7, 19).double().requires_grad_()
    targets = make_targets(7, V=19, ignored=(2,))
    weights = make_weights("random", 19).double()
    ours, _ = reference_cross_entropy(logits, targets, weights, reduction=reduction, label_smoothing=label_smoothing)
    torchs = F.cross_entropy(logits, targets, weights, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)
    upstream = torch.rand_like(ours)
    for_ours = torch.autograd.grad(ours, logits, upstream)[0]
    torch.testing.assert_close(for_ours, torch.autograd.grad(torchs, logits, upstream)[0], rtol=1e-12, atol=1e-13)


def test_power_law_weights_are_the_formula():
    counts = torch.tensor([0, 1, 7, 10**6, 3 * 10**9])
    for alpha, eps in ((1.0, 1e-7), (0.4, 1.0), (0.0, 1.0)):
        expected = reference_power_law_weights(counts, alpha, eps)
        weights = power_law_weights(counts, alpha=alpha, eps=eps)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), expected, rtol=1e-7, atol=0)
    assert power_law_weights(counts)[0].item() == pytest.approx(1e7)  # the paper's defaults
