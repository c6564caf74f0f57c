# mypy: ignore-errors
# Triton's device code is typed by Triton, not by Python.
"""The kernels that sum over all rows, one program each. Orders are fixed, so that results are bitwise deterministic.

    denominators_kernel    targets, weights and token weights -> 1/D, 1/D_z, sum_j w_j, sum of weights, counted tokens
    reduce_rows_kernel     what was found for each row -> loss, statistics

Tensors: see row_kernels.py.
"""

import triton
import triton.language as tl

from pdl_kernels.kernels.constants import (
    ACCURACY,
    EXPECTED_UPSTREAM,
    INVERSE_DENOMINATOR,
    INVERSE_Z_DENOMINATOR,
    NLL,
    WEIGHT_SUM,
    WEIGHT_TOTAL,
)
from pdl_kernels.kernels.tiles import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def denominators_kernel(
    targets, weights, token_weights, normalizer, expected_upstream, scalars, token_count,
    rows, V, ignore_index,
    REDUCTION: tl.constexpr, NORMALIZER_IS_NUMBER: tl.constexpr, EXPECTED_IS_NUMBER: tl.constexpr,
    SUM_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, SHARD: tl.constexpr = False,
):  # fmt: skip
    """`normalizer` and `expected_upstream` are numbers, or pointers to one; `normalizer` may be None.

    Of a shard V are the columns of the whole, and `weights` holds w(y_i) of each row.
    """
    index = tl.arange(0, BLOCK)
    weight_sums = tl.zeros((BLOCK,), tl.float32)
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + index
        exists = row < rows
        y = tl.load(targets + row, mask=exists, other=0).to(tl.int64)
        u = tl.full((BLOCK,), 1.0, tl.float32)
        if token_weights is not None:
            u = tl.abs(tl.load(token_weights + row, mask=exists, other=0.0).to(tl.float32))
        counted = exists & (y != ignore_index) & (u != 0.0)
        # A target that is no class must not reach the table; its row is nan, the other rows keep their denominator.
        is_class = (y >= 0) & (y < V)
        w_y = tl.full((BLOCK,), 1.0, tl.float32)
        if weights is not None:
            entry = row if SHARD else tl.where(is_class, y, 0)
            w_y = tl.load(weights + entry, mask=counted & is_class, other=0.0).to(tl.float32)
        weight_sums += tl.where(counted & is_class, w_y * u, 0.0)
        magnitudes += tl.where(counted, u, 0.0)
        counts += counted.to(tl.int32)
    weight_sum = tl.sum(weight_sums)
    magnitude = tl.sum(magnitudes)
    count = tl.sum(counts.to(tl.int64))

    denominator = weight_sum
    denominator_z = magnitude
    if REDUCTION == "token_mean":
        denominator = count.to(tl.float32)
    elif REDUCTION != "mean":
        denominator = magnitude * 0.0 + 1.0
        denominator_z = denominator
    if normalizer is not None:
        if NORMALIZER_IS_NUMBER:
            denominator = tl.full((), normalizer, tl.float32)
        else:
            denominator = tl.load(normalizer).to(tl.float32)
        denominator_z = denominator
    tl.store(scalars + INVERSE_DENOMINATOR, tl.where(denominator == 0.0, 0.0, 1.0 / denominator))
    tl.store(scalars + INVERSE_Z_DENOMINATOR, tl.where(denominator_z == 0.0, 0.0, 1.0 / denominator_z))
    tl.store(scalars + NLL, 0.0)  # unless reduce_rows_kernel fills them in
    tl.store(scalars + ACCURACY, 0.0)
    tl.store(scalars + WEIGHT_SUM, weight_sum)
    if EXPECTED_IS_NUMBER:
        expected = tl.full((), expected_upstream, tl.float32)
    else:
        expected = tl.load(expected_upstream).to(tl.float32)
    # Neither 0 nor so small that dividing by it overflows, nor infinite, nor nan.
    usable = (tl.abs(expected) >= 1.1754943508222875e-38) & (tl.abs(expected) < float("inf"))
    tl.store(scalars + EXPECTED_UPSTREAM, tl.where(usable, expected, 1.0))
    if token_count is not None:
        tl.store(token_count, count)

    weight_total = V * 1.0
    if SUM_WEIGHTS:
        totals = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            totals += tl.load(weights + start + index, mask=start + index < V, other=0.0).to(tl.float32)
        weight_total = tl.sum(totals)
    tl.store(scalars + WEIGHT_TOTAL, weight_total)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def reduce_rows_kernel(row_loss, row_stats, scalars, token_count, loss, rows, STATS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    losses = tl.zeros((BLOCK,), tl.float32)
    nlls = tl.zeros((BLOCK,), tl.float32)
    hits = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + index
        exists = row < rows
        if loss is not None:
            losses += tl.load(row_loss + row, mask=exists, other=0.0)
        if STATS:
            nlls += tl.load(row_stats + row, mask=exists, other=0.0)
            hits += tl.load(row_stats + rows + row, mask=exists, other=0.0)
    if loss is not None:
        tl.store(loss, tl.sum(losses))
    if STATS:
        count = tl.load(token_count).to(tl.float32)
        inverse = tl.where(count == 0.0, 0.0, 1.0 / count)
        tl.store(scalars + NLL, tl.sum(nlls) * inverse)
        tl.store(scalars + ACCURACY, tl.sum(hits) * inverse)
