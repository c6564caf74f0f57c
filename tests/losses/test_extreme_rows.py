"""Rows on the edge: -inf, the ends of the range of float32, masks, and what a scale or a softcap makes of them."""

import math

import pytest
import torch
from helpers import (
    check_against_reference,
    make_logits,
    make_targets,
    make_weights,
    run,
    run_reference,
    skip_where_fma_rounds_twice,
)

INF = torch.inf
LOWEST = torch.finfo(torch.float32).min
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
ALL_DTYPES = (*HALF_AND_SINGLE, torch.float64)
V = 37


@pytest.mark.lesson("leading block of -inf")
@pytest.mark.parametrize("V", [37, 1100])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "return_stats": True}], ids=["plain", "z_loss"])
def test_blocks_of_minus_inf(backend, V, options, device):
    logits = make_logits(4, V, device=device)
    logits[0, : V - 5] = -INF  # a leading block
    logits[1, 3:] = -INF  # a padded vocabulary
    logits[2, ::2] = -INF
    logits[3, :-1] = -INF  # one class is left, and it is the target: loss 0
    targets = torch.tensor([V - 2, 1, 7, V - 1], device=device)
    got = check_against_reference(backend, logits, targets, make_weights("random", V, device) + 0.1, **options)
    assert got.gradient[0, : V - 5].count_nonzero() == 0


@pytest.mark.lesson("0 * -inf")
def test_smoothing_over_minus_inf_columns_of_weight_zero(backend, device):
    """A padded vocabulary whose missing classes have weight 0 can be smoothed; with weight 1 it is infinite."""
    logits = make_logits(3, V, device=device)
    logits[:, -6:] = -INF
    targets = make_targets(3, V=V - 6, device=device)
    weights = torch.ones(V, device=device)
    weights[-6:] = 0
    got = check_against_reference(backend, logits, targets, weights, label_smoothing=0.1)
    assert got.loss.isfinite()
    infinite = run(backend, logits, targets, None, label_smoothing=0.1)
    assert infinite.loss.item() == INF
    assert not infinite.gradient.isnan().any()


@pytest.mark.lesson("running maximum that starts at 0")
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_full_of_the_lowest_finite_value(backend, dtype, device):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 is the eager backend's")
    V = 1030
    logits = torch.full((2, V), torch.finfo(dtype).min, dtype=dtype, device=device)
    logits[1] = -INF
    logits[1, 5] = torch.finfo(dtype).min  # all the probability on one column
    got = run(backend, logits, torch.tensor([3, 5], device=device), reduction="none")
    assert got.loss[0].item() == pytest.approx(math.log(V), rel=1e-6)
    assert got.loss[1].item() == 0
    expected = torch.full((V,), 1 / V, dtype=torch.float64)
    expected[3] -= 1
    torch.testing.assert_close(got.gradient[0].cpu().double(), expected, rtol=2**-7, atol=1e-7)
    assert got.gradient[1].count_nonzero() == 0


@pytest.mark.lesson("running maximum that starts at 0")
def test_rows_far_below_zero(backend, device):
    skip_where_fma_rounds_twice(backend)
    logits = make_logits(2, V, device=device) - 1e6
    check_against_reference(backend, logits, make_targets(2, V=V, device=device))


@pytest.mark.lesson("masks of -1e9 and -1e30")
@pytest.mark.parametrize("V", [37, 1030])
@pytest.mark.parametrize("fill", [-1e4, -1e6, -1e9, -1e10, -1e30, -2e38, LOWEST])
def test_columns_masked_with_large_finite_values(backend, V, fill, device):
    """What frameworks fill a padded vocabulary with. A lane or a slice may see nothing else."""
    logits = make_logits(2, V, dtype=torch.bfloat16 if fill == -1e9 else torch.float32, device=device)
    logits[0, : V - 5] = fill
    logits[1, 5:] = fill
    got = check_against_reference(backend, logits, torch.tensor([V - 2, 3], device=device), upstream=3.0)
    assert got.gradient[0, : V - 5].count_nonzero() == 0


@pytest.mark.parametrize("common", [1e5, -1e7, 1e9, 1e10, -1e20, 1e30, 2e38])
def test_rows_of_large_magnitude(backend, common, device):
    """All probability on the maximum and its ties, whatever the magnitude."""
    logits = torch.full((2, V), common, device=device)
    logits[0, 5:] = -abs(common)
    logits[1, 7] = 0.9 * common
    targets = torch.tensor([2, 2], device=device)
    ties = [5 if common > 0 else V, V - 1 if common > 0 else 1]
    got = run(backend, logits, targets, reduction="none")
    expected = run_reference(logits, targets, reduction="none")
    if common > 0:
        assert got.loss.tolist() == pytest.approx([math.log(n) for n in ties], rel=1e-6)
    torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.gradient.cpu().double(), expected.gradient, rtol=1e-5, atol=1e-6)


def test_rows_over_the_whole_range_of_float32(backend, device):
    logits = torch.zeros(3, V, device=device)
    logits[0, 4], logits[0, 5] = 3e38, -3e38
    logits[1, :] = -3e38
    logits[1, 6] = 3e38
    logits[2, :] = 3e38
    targets = torch.tensor([4, 6, 0], device=device)
    got = run(backend, logits, targets, reduction="none")
    assert got.loss[:2].tolist() == [0, 0]
    assert got.loss[2].item() == pytest.approx(math.log(V), rel=1e-6)
    assert got.gradient.isfinite().all()
    assert got.gradient[:2].count_nonzero() == 0
    torch.testing.assert_close(got.gradient[2, 1:], torch.full_like(got.gradient[2, 1:], 1 / V))
    # 3e38 below the maximum is a loss that float32 still holds, and the target's gradient is -1.
    got = run(backend, torch.where(logits[:1] > 0, 0.0, logits[:1]), torch.tensor([5], device=device))
    assert got.loss.item() == pytest.approx(3e38, rel=1e-6)
    assert got.gradient[0, 5].item() == -1


@pytest.mark.parametrize("logit_scale", [1e30, 3e38])
def test_scaled_logits_that_overflow_are_clamped(backend, logit_scale, device):
    logits = torch.zeros(3, V, device=device)
    logits[0, :2] = torch.tensor([1e20, 2e20])  # both beyond float32: equal once clamped
    logits[1, :] = -1e20
    logits[2, 3] = 1e20
    targets = torch.tensor([0, 5, 3], device=device)
    got = run(backend, logits, targets, logit_scale=logit_scale, reduction="none")
    for loss, expected in zip(got.loss.tolist(), (math.log(2), math.log(V), 0.0), strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
    assert not got.gradient.isnan().any()
    capped = run(backend, logits, targets, logit_scale=logit_scale, softcap=2.0, reduction="none")
    expected = run_reference(logits, targets, logit_scale=logit_scale, softcap=2.0, reduction="none")
    torch.testing.assert_close(capped.loss.cpu().double(), expected.loss, rtol=1e-6, atol=0)
    assert capped.gradient[0, :2].count_nonzero() == 0  # flat where capped
    assert capped.gradient[1].count_nonzero() == 0


def test_minus_inf_stays_minus_inf_under_a_scale(backend, device):
    logits = make_logits(2, V, device=device)
    logits[:, 10:] = -INF
    check_against_reference(backend, logits, torch.tensor([3, 0], device=device), logit_scale=0.5)
    got = run(backend, logits, torch.tensor([3, 0], device=device), logit_scale=1e30)
    assert got.gradient[:, 10:].count_nonzero() == 0


@pytest.mark.lesson("0 * -inf")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_target_on_minus_inf(backend, dtype, device):
    logits = make_logits(3, V, dtype=dtype, device=device)
    logits[:, 4] = -INF
    targets = torch.tensor([4, 4, 6], device=device)
    got = run(backend, logits, targets, reduction="none")
    assert got.loss[:2].tolist() == [INF, INF]
    assert got.loss[2].isfinite()
    expected = torch.softmax(logits.cpu().double(), -1)
    expected[range(3), targets.cpu()] -= 1
    torch.testing.assert_close(got.gradient.cpu().double(), expected, rtol=2**-7, atol=2**-14)
    assert run(backend, logits, targets).loss.item() == INF
    # A row factor of 0, by token weight, by upstream gradient, or by class weight: exactly 0, not 0 * inf.
    token_weights = torch.tensor([0.0, 0.0, 1.0], device=device)
    assert run(backend, logits, targets, token_weights=token_weights).loss.isfinite()
    weights = torch.ones(V, device=device)
    weights[4] = 0
    got = run(backend, logits, targets, weights, reduction="none")
    assert got.loss[:2].tolist() == [0, 0]
    assert got.gradient[:2].count_nonzero() == 0
    got = run(backend, logits, targets, reduction="none", upstream=torch.tensor([0.0, 1.0, 1.0]))
    assert got.gradient[0].count_nonzero() == 0
    assert got.gradient.isfinite().all()


def test_target_on_minus_inf_with_weight_zero_under_z_loss(backend, device):
    """The row is read for the z-loss, and its cross entropy of +inf must still not appear."""
    logits = make_logits(2, V, device=device)
    logits[0, 4] = -INF
    weights = torch.ones(V, device=device)
    weights[4] = 0
    targets = torch.tensor([4, 6], device=device)
    check_against_reference(backend, logits, targets, weights, z_loss=0.1, upstream=3.0)


def test_row_wholly_minus_inf_is_nan(backend, device):
    logits = make_logits(3, V, device=device)
    logits[1] = -INF
    targets = make_targets(3, V=V, device=device)
    got = run(backend, logits, targets, reduction="none")
    assert got.loss.isnan().tolist() == [False, True, False]
    assert got.gradient[1].isnan().all()
    assert got.gradient[[0, 2]].isfinite().all()
    assert run(backend, logits, targets).loss.isnan()


@pytest.mark.lesson("padding turned into -softcap")
@pytest.mark.parametrize("V", [37, 1030])
def test_softcap_with_minus_inf(backend, V, device):
    """A user's -inf becomes -softcap, as torch's composition does, while padding lanes get no probability."""
    logits = make_logits(3, V, device=device)
    logits[0, 5:20] = -INF
    logits[1, :] = -INF
    logits[2, 4] = -INF
    targets = torch.tensor([0, 3, 4], device=device)
    got = check_against_reference(backend, logits, targets, softcap=3.0, logit_scale=1.5)
    rows = run(backend, logits, targets, softcap=3.0, reduction="none")
    assert rows.loss[1].item() == pytest.approx(math.log(V), rel=1e-6)
    assert got.gradient[1].count_nonzero() == 0  # flat where capped


@pytest.mark.parametrize("softcap", [1e-3, 30.0, 1e4])
def test_softcaps_small_and_large(backend, softcap, device):
    logits = make_logits(3, V, device=device, spread=10.0)
    check_against_reference(backend, logits, make_targets(3, V=V, device=device), softcap=softcap)
