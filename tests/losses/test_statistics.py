"""The statistics: accuracy where classes tie, and the NLL that no weight changes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_stats,
    make_logits,
    make_targets,
    make_weights,
    run,
    run_reference,
)

from pdl_kernels import pdl_cross_entropy

V = 37


def test_accuracy_counts_ties(backend, device):
    logits = torch.zeros(4, V, dtype=torch.bfloat16, device=device)
    logits[0, [3, 8]] = 2.0  # the target ties
    logits[1, 8] = 2.0  # the target loses
    logits[2, 9] = 2.0  # the target wins
    targets = torch.tensor([3, 3, 9, -100], device=device)
    stats = run(backend, logits, targets, return_stats=True).stats
    assert stats.accuracy.item() == pytest.approx(2 / 3, rel=1e-6)
    assert stats.token_count.item() == 3
    assert stats.token_count.dtype == torch.int64


def test_statistics_are_unweighted_and_alone_possible(backend, device):
    """nll is what plain cross entropy would be, whatever the weights; asking changes neither loss nor gradient."""
    logits = make_logits(4, V, device=device)
    targets = make_targets(4, V=V, device=device, ignored=(1,))
    weights = make_weights("power_law", V, device)
    got = run(backend, logits, targets, weights, return_stats=True)
    assert got.stats.nll.item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    without = run(backend, logits, targets, weights)
    torch.testing.assert_close(got.loss, without.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.gradient, without.gradient, rtol=1e-6, atol=0)
    with torch.no_grad():
        _, stats = pdl_cross_entropy(logits, targets, weights, return_stats=True, backend=backend, reduction="none")
    assert_stats(stats, run_reference(logits, targets, weights).stats)
