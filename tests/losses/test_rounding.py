"""The error criterion where it is hard: confident rows, large offsets, loss scaling, long sums, weights far apart."""

import pytest
import torch
from helpers import (
    EXP2_ERROR,
    INTERPRETED,
    ONE_ROUNDING,
    assert_rows_rounded_once,
    assert_within_torch,
    check_against_reference,
    confident_logits,
    make_logits,
    make_targets,
    make_weights,
    row_factors,
    run,
    run_reference,
    run_torch,
    skip_where_fma_rounds_twice,
)

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
V = 37


@pytest.mark.lesson("target column rounded before p - 1")
@pytest.mark.parametrize("p", [0.99, 0.999, 0.99999])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_confident_predictions(backend, p, dtype, device):
    """p_y - 1 loses every digit that p_y was rounded to."""
    if dtype == torch.float32:
        skip_where_fma_rounds_twice(backend)
    rows = 64 if backend == "eager" else 12
    targets = make_targets(rows, V=V, device=device)
    logits = confident_logits(rows, V, p, targets, dtype)
    weights = make_weights("random", V, device) + 0.1
    check_against_reference(backend, logits, targets, weights, confident=True)


@pytest.mark.lesson("lse - z_y cancels")
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_common_offset(backend, offset, device):
    skip_where_fma_rounds_twice(backend)
    rows = 6
    targets = make_targets(rows, V=V, device=device)
    logits = make_logits(rows, V, device=device) + offset
    check_against_reference(backend, logits, targets, return_stats=True)
    # Confident rows show it best: here lse - z_y would be wrong by a hundred times the loss.
    logits = confident_logits(rows, V, 0.99999, targets) + offset
    got = run(backend, logits, targets, reduction="none")
    expected = run_reference(logits, targets, reduction="none")
    torchs = run_torch(logits, targets, reduction="none")
    floor = ONE_ROUNDING + 2 * EXP2_ERROR  # of the largest term, and of what takes the offset's rounding back
    assert_within_torch(got.loss, expected.loss, torchs.loss, "loss", torch.full((rows,), floor))


@pytest.mark.lesson("two roundings of the gradient")
@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.25, 65536.0])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_upstream_gradients(backend, upstream, dtype, device):
    logits = make_logits(3, V, dtype=dtype, device=device)
    targets = make_targets(3, V=V, device=device)
    check_against_reference(backend, logits, targets, normalizer=4.0, upstream=upstream)


@pytest.mark.lesson("two roundings of the gradient")
def test_loss_scaling_saves_small_fp16_gradients(backend, device):
    """Gradients below fp16's range for an upstream gradient of 1 must be there for one of 65536."""
    logits = make_logits(3, V, dtype=torch.float16, device=device)
    targets = make_targets(3, V=V, device=device)
    assert run(backend, logits, targets, normalizer=1e8).gradient.count_nonzero() == 0
    scaled = check_against_reference(backend, logits, targets, normalizer=1e8, upstream=65536.0)
    assert scaled.gradient.count_nonzero() > 3 * V // 2


@pytest.mark.lesson("losses kept in a half dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_of_many_rows_is_float32(backend, dtype, device):
    """In fp16 the sum of 600 rows overflows or sticks; V=2 keeps the interpreter quick."""
    rows = 3000 if backend == "eager" or not INTERPRETED else 60
    logits = make_logits(rows, 2, dtype=dtype, device=device, spread=8.0)
    targets = make_targets(rows, V=2, device=device)
    got = run(backend, logits, targets, reduction="sum", token_weights=torch.full((rows,), 100.0, device=device))
    expected = run_reference(logits, targets, reduction="sum", token_weights=torch.full((rows,), 100.0))
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=2e-6)
    assert got.loss.dtype == torch.float32


@pytest.mark.lesson("weights over fourteen orders of magnitude")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_weights_from_1e_7_to_1e7_in_one_batch(backend, dtype, device):
    """Each row is held to its own scale: a light row must be right beside one that weighs 1e14 times as much."""
    V = 29
    weights = torch.logspace(-7, 7, V, device=device)
    targets = torch.tensor([0, 7, 14, 21, 28], device=device)
    logits = make_logits(5, V, dtype=dtype, device=device)
    got = check_against_reference(backend, logits, targets, weights, reduction="mean")
    ordinary = run_reference(logits, targets, reduction="mean").gradient[4]
    torch.testing.assert_close(  # the heaviest row owns the mean
        got.gradient[4].cpu().double(), 5 * ordinary, rtol=2**-6, atol=1e-3
    )
    if dtype != torch.float16:
        expected = run_reference(logits, targets, weights, reduction="none")
        float32s = run_torch(logits.float(), targets, weights, reduction="none")
        got = run(backend, logits, targets, weights, reduction="none")
        torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=2e-6, atol=0)
        factors = row_factors(targets, weights, reduction="none")
        assert_rows_rounded_once(got.gradient, expected.gradient, float32s.gradient, factors, backend, "gradient")
