"""Identities that hold for all inputs, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from helpers import make_logits, make_targets, make_weights, run, skip_where_fma_rounds_twice
from hypothesis import given, settings
from hypothesis import strategies as st

# Examples by backend: the interpreter takes a tenth of a second per row.
EXAMPLES = {"eager": 40, "triton": 4}

PROBLEM = {
    "rows": st.integers(1, 4),
    "V": st.integers(1, 45),
    "seed": st.integers(0, 2**20),
    "ignored": st.booleans(),
}
REDUCTIONS = st.sampled_from(["mean", "token_mean", "sum", "none"])
SMOOTHING = st.sampled_from([0.0, 0.1, 1.0])


def for_all(**strategies):
    """Turn check(backend, device, **drawn) into a test of both backends."""

    def decorate(check):
        def test(backend, device):
            def example(**drawn):
                check(backend, device, **drawn)

            example.__name__ = check.__name__
            limits = settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=True, database=None)
            limits(given(**strategies)(example))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def make_problem(device, rows, V, seed, ignored):
    """Logits (rows, V), targets with perhaps one ignored, weights without zeros."""
    targets = make_targets(rows, V=V, device=device, seed=seed, ignored=(0,) if ignored and rows > 1 else ())
    logits = make_logits(rows, V, device=device, seed=seed)
    return logits, targets, make_weights("random", V, device, seed=seed) + 0.05


def torch_gradient(logits, targets, upstream=1.0, **options):
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))[0]


def assert_same(got, expected, atol=1e-6):
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=atol)


@for_all(
    **PROBLEM, reduction=st.sampled_from(["mean", "sum", "none"]), label_smoothing=SMOOTHING, weights=st.booleans()
)
def test_without_weights_or_with_ones_it_is_torchs_cross_entropy(
    backend, device, weights, reduction, label_smoothing, **problem
):
    logits, targets, _ = make_problem(device, **problem)
    ones = torch.ones(problem["V"], device=device) if weights else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    got = run(backend, logits, targets, ones, upstream=2.0, **options)
    loss, gradient = torch_gradient(logits, targets, 2.0, **options)
    assert_same(got.loss, loss)
    assert_same(got.gradient, gradient)


@pytest.mark.lesson("all tokens ignored")
def test_all_ignored_is_where_it_is_not_torchs(backend, device):
    logits, targets = make_logits(3, 20, device=device), torch.full((3,), -100, device=device)
    loss, _ = torch_gradient(logits, targets)
    assert loss.isnan()
    got = run(backend, logits, targets)
    assert got.loss.item() == 0
    assert got.gradient.count_nonzero() == 0


@for_all(**PROBLEM, label_smoothing=SMOOTHING, reduction=st.sampled_from(["mean", "sum", "none"]))
def test_with_weights_it_is_torchs_weighted_cross_entropy(backend, device, label_smoothing, reduction, **problem):
    logits, targets, weights = make_problem(device, **problem)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    got = run(backend, logits, targets, weights, **options)
    loss, gradient = torch_gradient(logits, targets, weight=weights, **options)
    assert_same(got.loss, loss)
    assert_same(got.gradient, gradient)


@for_all(**PROBLEM, factor=st.sampled_from([2.0**-20, 0.3, 7.0, 1e6]), label_smoothing=SMOOTHING)
def test_scaling_the_weights_leaves_the_mean_unchanged(backend, device, factor, label_smoothing, **problem):
    logits, targets, weights = make_problem(device, **problem)
    plain = run(backend, logits, targets, weights, label_smoothing=label_smoothing)
    scaled = run(backend, logits, targets, weights * factor, label_smoothing=label_smoothing)
    assert_same(scaled.loss, plain.loss)
    assert_same(scaled.gradient, plain.gradient)
    # The weights do matter: "sum" scales with them.
    plain = run(backend, logits, targets, weights, reduction="sum")
    scaled = run(backend, logits, targets, weights * factor, reduction="sum")
    torch.testing.assert_close(scaled.loss, plain.loss * factor, rtol=3e-6, atol=0)


@pytest.mark.lesson("lse - z_y cancels")
@for_all(**PROBLEM, shift=st.sampled_from([-(2.0**17), -64.0, 1.0, 1000.0, 2.0**18]), reduction=REDUCTIONS)
def test_a_common_shift_changes_nothing(backend, device, shift, reduction, **problem):
    skip_where_fma_rounds_twice(backend)
    logits, targets, weights = make_problem(device, **problem)
    logits = (logits * 16).round() / 16  # exact after the addition
    shifted = logits + shift
    assert torch.equal(shifted.double(), logits.double() + shift)
    plain = run(backend, logits, targets, weights, reduction=reduction)
    moved = run(backend, shifted, targets, weights, reduction=reduction)
    assert_same(moved.loss, plain.loss)
    assert_same(moved.gradient, plain.gradient)


@pytest.mark.lesson("gradient accumulation guesses the denominator")
@for_all(seed=st.integers(0, 2**20), V=st.integers(2, 45), cut=st.integers(1, 3), z_loss=st.sampled_from([0.0, 0.1]))
def test_micro_batches_with_one_normalizer_add_up(backend, device, seed, V, cut, z_loss):
    logits, targets, weights = make_problem(device, rows=4, V=V, seed=seed, ignored=True)
    u = make_logits(4, device=device, seed=seed + 1)
    counted = targets != -100
    normalizer = (weights[targets.clamp(min=0)] * u.abs())[counted].sum()
    whole = run(backend, logits, targets, weights, token_weights=u, normalizer=normalizer, z_loss=z_loss)
    parts = [
        run(backend, logits[part], targets[part], weights, token_weights=u[part], normalizer=normalizer, z_loss=z_loss)
        for part in (slice(0, cut), slice(cut, 4))
    ]
    assert_same(sum(part.loss for part in parts), whole.loss, atol=3e-6)
    assert_same(torch.cat([part.gradient for part in parts]), whole.gradient)
    if z_loss == 0:  # that normalizer is what "mean" itself would have used
        mean = run(backend, logits, targets, weights, token_weights=u)
        assert_same(whole.loss, mean.loss, atol=3e-6)


@for_all(**PROBLEM, reduction=REDUCTIONS)
def test_the_order_of_rows_does_not_matter(backend, device, reduction, **problem):
    logits, targets, weights = make_problem(device, **problem)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(problem["seed"])).to(device)
    plain = run(backend, logits, targets, weights, reduction=reduction)
    moved = run(backend, logits[order], targets[order], weights, reduction=reduction)
    assert_same(moved.loss, plain.loss[order] if reduction == "none" else plain.loss)
    assert_same(moved.gradient, plain.gradient[order])


@for_all(**PROBLEM, reduction=REDUCTIONS, label_smoothing=SMOOTHING)
def test_negated_token_weights_negate_the_loss_but_not_its_denominator(
    backend, device, reduction, label_smoothing, **problem
):
    logits, targets, weights = make_problem(device, **problem)
    u = make_logits(len(targets), device=device, seed=problem["seed"] + 1)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "return_stats": True}
    plain = run(backend, logits, targets, weights, token_weights=u, **options)
    negated = run(backend, logits, targets, weights, token_weights=-u, **options)
    assert_same(negated.loss, -plain.loss)
    assert_same(negated.gradient, -plain.gradient)
    assert negated.stats.weight_sum.item() == plain.stats.weight_sum.item()
    assert plain.stats.weight_sum.item() > 0
    assert plain.gradient.count_nonzero() > 0 or problem["V"] == 1


@pytest.mark.lesson("rows scaled by the first upstream gradient")
@for_all(**PROBLEM, label_smoothing=SMOOTHING)
def test_the_gradient_is_linear_in_the_upstream_gradient(backend, device, label_smoothing, **problem):
    logits, targets, weights = make_problem(device, **problem)
    a, b = (make_logits(len(targets), seed=problem["seed"] + k) for k in (1, 2))
    options = {"reduction": "none", "z_loss": 0.01, "label_smoothing": label_smoothing}
    for_a, for_b, for_both = (
        run(backend, logits, targets, weights, upstream=up, **options) for up in (a, b, a - 2 * b)
    )
    torch.testing.assert_close(for_both.gradient, for_a.gradient - 2 * for_b.gradient, rtol=1e-5, atol=2e-5)


@for_all(**PROBLEM, reduction=REDUCTIONS, label_smoothing=SMOOTHING, logit_scale=st.sampled_from([1.0, 0.3]))
def test_the_gradient_of_a_row_sums_to_zero(backend, device, reduction, label_smoothing, logit_scale, **problem):
    """A shift changes nothing, so the gradient has no component along it; without z-loss and softcap."""
    logits, targets, weights = make_problem(device, **problem)
    got = run(
        backend, logits, targets, weights, reduction=reduction, label_smoothing=label_smoothing, logit_scale=logit_scale
    )
    assert got.gradient.sum(-1).abs().max() < 1e-5 * max(1.0, got.gradient.abs().max().item())
    assert got.gradient.abs().max() > 0 or problem["V"] == 1
