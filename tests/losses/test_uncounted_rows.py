"""Rows that do not count: ignored, of token weight 0, or of a class of weight 0."""

import pytest
import torch
from helpers import (
    assert_stats,
    check_against_reference,
    make_logits,
    make_targets,
    run,
    run_reference,
)

from pdl_kernels import pdl_cross_entropy

INF = torch.inf
V = 37


@pytest.mark.lesson("ignored rows are read")
@pytest.mark.parametrize(("V", "bad"), [(37, torch.nan), (37, INF), (37, -INF), (1030, torch.nan), (1030, -INF)])
@pytest.mark.parametrize(
    "options",
    [{}, {"return_stats": True}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}],
    ids=["mean", "stats", "none", "everything"],
)
def test_ignored_rows_and_rows_of_token_weight_zero_are_not_read(backend, bad, V, options, device):
    logits = make_logits(4, V, device=device)
    logits[0] = logits[2] = bad
    targets = make_targets(4, V=V, device=device, ignored=(0,))
    token_weights = torch.tensor([1.0, 2.0, 0.0, 3.0], device=device)
    got = run(backend, logits, targets, token_weights=token_weights, upstream=3.0, **options)
    expected = run_reference(logits, targets, token_weights=token_weights, upstream=3.0, **options)
    torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.gradient.cpu().double(), expected.gradient, rtol=1e-5, atol=1e-6)
    assert got.gradient[[0, 2]].tolist() == torch.zeros(2, V).tolist()
    if got.stats is not None:
        assert_stats(got.stats, expected.stats)


@pytest.mark.lesson("ignored rows are read")
@pytest.mark.parametrize("bad", [torch.nan, INF])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_whose_class_weighs_nothing_are_not_read(backend, bad, reduction, device):
    logits = make_logits(3, V, device=device)
    logits[1] = bad
    weights = torch.ones(V, device=device)
    weights[9] = 0
    targets = torch.tensor([2, 9, 4], device=device)
    got = run(backend, logits, targets, weights, reduction=reduction, upstream=0.5)
    assert got.loss.isfinite().all()
    assert got.gradient[1].tolist() == [0] * V
    assert got.gradient[[0, 2]].isfinite().all()


def test_statistics_leave_the_gradient_of_weightless_rows_alone(backend, device):
    """With statistics such a row is read, for its NLL; its gradient is still exactly 0."""
    logits = make_logits(3, V, device=device)
    logits[1, 5] = INF
    weights = torch.ones(V, device=device)
    weights[9] = 0
    got = run(backend, logits, torch.tensor([2, 9, 4], device=device), weights, return_stats=True)
    assert got.loss.isfinite()
    assert got.gradient[1].count_nonzero() == 0
    assert not got.gradient.isnan().any()
    assert got.stats.token_count.item() == 3


@pytest.mark.lesson("0 * -inf")
def test_token_weights_and_class_weights_of_uncounted_rows_may_be_anything(backend, device):
    """An ignored token's weight is not used, be it nan, nor is the weight of a class that is nobody's target."""
    logits = make_logits(3, V, device=device)
    targets = torch.tensor([4, -100, 6], device=device)
    token_weights = torch.tensor([1.0, torch.nan, 2.0], device=device)
    expected = run_reference(logits[[0, 2]], targets[[0, 2]], token_weights=token_weights[[0, 2]])
    got = run(backend, logits, targets, token_weights=token_weights)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert got.gradient[1].count_nonzero() == 0
    weights = torch.ones(V, device=device)
    weights[0] = INF
    expected = run_reference(logits[[0, 2]], targets[[0, 2]])
    got = run(backend, logits, targets, weights)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert got.gradient[1].count_nonzero() == 0


@pytest.mark.lesson("0 * -inf")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_row_stays_zero_under_an_infinite_upstream_gradient(backend, reduction, device):
    """A loss scale that overflowed."""
    logits = make_logits(3, V, device=device)
    targets = make_targets(3, V=V, device=device, ignored=(1,))
    got = run(backend, logits, targets, reduction=reduction, upstream=INF)
    assert not got.gradient[[0, 2]].isfinite().any()
    assert got.gradient[1].count_nonzero() == 0


@pytest.mark.lesson("all tokens ignored")
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("why", ["ignored", "token weights", "class weights"])
def test_nothing_to_average(backend, reduction, why, device):
    logits = make_logits(3, V, device=device, dtype=torch.float16)
    logits[1] = torch.nan
    hidden = logits.clone().requires_grad_()
    targets = make_targets(3, V=V, device=device, ignored=(0, 1, 2) if why == "ignored" else ())
    token_weights = torch.zeros(3, device=device) if why == "token weights" else None
    weights = torch.zeros(V, device=device) if why == "class weights" else torch.ones(V, device=device)
    loss = pdl_cross_entropy(
        hidden * 1, targets, weights, token_weights=token_weights, reduction=reduction, backend=backend
    )
    assert loss.requires_grad  # attached: every rank of a distributed job takes part in backward
    assert loss.count_nonzero() == 0
    loss.sum().backward()
    assert hidden.grad.tolist() == torch.zeros(3, V).tolist()


def test_all_class_weights_zero_leaves_the_z_loss(backend, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    got = check_against_reference(backend, logits, targets, torch.zeros(V, device=device), z_loss=0.5)
    assert got.loss.item() > 0
