# mypy: ignore-errors
# Triton's device code is typed by Triton, not by Python.
"""The kernels that take rows of logits. Sums over all rows: see reductions.py.

    loss_rows_kernel       a program per row   loss of the row, its maximum and sum, and the gradient if asked
    slice_rows_kernel      rows x slices       maximum and sum of a slice of a row, for few rows
    merge_rows_kernel      a program per row   slices -> loss of the row, its maximum and sum
    gradient_rows_kernel   rows x slices       the gradient from the saved maximum and sum, and an upstream gradient
    scale_rows_kernel      rows x slices       a finished gradient multiplied for another upstream gradient, in place

Tensors, with N rows, V columns and S slices (all sums float32, all orders fixed: bitwise deterministic):

    logits, gradient (rows_outer, rows_inner, V)     targets, token_weights, row_loss (N,)     weights (V,)
    row_state (2, N): row maximum of the raw logits; sum of exp(z - z of that maximum)
    row_stats (2, N): cross entropy of counted rows; 1 where the target reaches the row's maximum
    slice_state (2, N, S): row_state of every slice
    scalars (7,): 1/D, 1/D_z, sum_j w_j, mean NLL, accuracy, sum of w(y_i) |u_i|, the expected upstream gradient

No two programs of a launch touch the same address with a write among them, not even where the value that is read is
thrown away: programs run in any order.
"""

import triton
import triton.language as tl

from pdl_kernels.kernels.constants import EXPECTED_UPSTREAM, LARGEST, LN2, WEIGHT_TOTAL
from pdl_kernels.kernels.row_math import (
    contributes,
    exp_difference,
    row_factors,
    row_gradient,
    row_max_and_sum,
    transformed,
    with_upstream,
)
from pdl_kernels.kernels.tiles import (
    UNSPECIALIZED,
    block_columns,
    column_offsets,
    edge_columns,
    fill_row,
    interior_bounds,
    interior_pointer,
    owns_column,
    row_offset,
    slice_bounds,
)


@triton.jit
def store_row_results(
    row, rows, row_loss, row_state, row_stats, row_max, row_sum, x_y,
    target_factor, smoothing_factor, z_factor, smoothing, logit_scale, softcap, VARIANT: tl.constexpr,
):  # fmt: skip
    """The results of a row that was read, which therefore counts and whose target is a class."""
    if VARIANT.shard:
        # In the place of row_state, for the other ranks: see options.ShardLayout.
        store_shard_row(row, rows, row_state, row_max, row_sum, x_y, smoothing, VARIANT)
    else:
        store_whole_row(
            row, rows, row_loss, row_state, row_stats, row_max, row_sum, x_y,
            target_factor, smoothing_factor, z_factor, smoothing, logit_scale, softcap, VARIANT,
        )  # fmt: skip


@triton.jit
def store_shard_row(row, rows, row_state, row_max, row_sum, x_y, smoothing, VARIANT: tl.constexpr):
    tl.store(row_state + row, row_max)
    tl.store(row_state + rows + row, row_sum)
    tl.store(row_state + 2 * rows + row, x_y)
    if VARIANT.smoothing:
        tl.store(row_state + 3 * rows + row, smoothing)


@triton.jit
def store_whole_row(
    row, rows, row_loss, row_state, row_stats, row_max, row_sum, x_y,
    target_factor, smoothing_factor, z_factor, smoothing, logit_scale, softcap, VARIANT: tl.constexpr,
):  # fmt: skip
    reference = transformed(row_max, logit_scale, softcap, VARIANT)
    log_sum = LN2 * tl.math.log2(row_sum)
    # (max - z_y) + log(sum), not lse - z_y: no cancellation under a large common offset.
    cross_entropy = (reference - transformed(x_y, logit_scale, softcap, VARIANT)) + log_sum
    loss = tl.where(target_factor != 0.0, target_factor * cross_entropy, 0.0)
    if VARIANT.smoothing:
        loss += tl.where(smoothing_factor != 0.0, smoothing_factor * smoothing, 0.0)
    if VARIANT.z_loss:
        lse = reference + log_sum
        loss += tl.where(z_factor != 0.0, z_factor * lse * lse, 0.0)
    tl.store(row_loss + row, loss)
    if row_state is not None:
        tl.store(row_state + row, row_max)
        tl.store(row_state + rows + row, row_sum)
    if VARIANT.stats:
        tl.store(row_stats + row, cross_entropy)
        tl.store(row_stats + rows + row, tl.where(x_y >= row_max, 1.0, 0.0))


@triton.jit
def target_logit(logits_row, y, first_column, V, stride_column, VARIANT: tl.constexpr):
    """x_y in float32; of a shard 0 where another rank has the column."""
    if VARIANT.shard:
        column = y - first_column
        owned = (column >= 0) & (column < V)
        x_y = tl.load(logits_row + column.to(tl.int64) * stride_column, mask=owned, other=0.0)
    else:
        x_y = tl.load(logits_row + y.to(tl.int64) * stride_column)
    return x_y.to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def loss_rows_kernel(
    logits, gradient, targets, weights, token_weights, scalars,
    row_loss, row_state, row_stats,
    rows, rows_inner, V, stride_outer, stride_row, stride_column,
    gradient_stride_outer, gradient_stride_row, gradient_stride_column,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    VARIANT: tl.constexpr, row_weights=None, first_column=None, vocab_size=None,
):  # fmt: skip
    row = tl.program_id(0)
    slice_index = tl.program_id(1)  # 0: the row is one slice
    offset = row_offset(row, rows_inner, stride_outer, stride_row)
    head, columns = interior_bounds(offset, V, VARIANT)
    logits_row = logits + offset
    interior = interior_pointer(logits, offset, head, VARIANT.layout != "any", VARIANT)
    gradient_row = None
    gradient_interior = None
    if gradient is not None:
        gradient_offset = row_offset(row, rows_inner, gradient_stride_outer, gradient_stride_row)
        gradient_row = gradient + gradient_offset
        gradient_interior = interior_pointer(gradient, gradient_offset, head, VARIANT.gradient_layout != "any", VARIANT)
    y, w_y, counted, invalid, target_factor, smoothing_factor, z_factor = row_factors(
        row, targets, row_weights if VARIANT.shard else weights, token_weights, scalars,
        vocab_size if VARIANT.shard else V, ignore_index, label_smoothing, z_loss, VARIANT,
    )  # fmt: skip
    active = contributes(target_factor, smoothing_factor, z_factor) & (invalid == 0)
    read = active
    if VARIANT.stats:
        read = active | (counted & (invalid == 0))

    if read:
        x_y = target_logit(logits_row, y, first_column, V, stride_column, VARIANT)
        row_max, row_sum = row_max_and_sum(
            logits_row, interior, head, columns, 0, columns, V, slice_index, stride_column, logit_scale, softcap,
            VARIANT.smoothing or gradient is not None, VARIANT,
        )  # fmt: skip
        smoothing = tl.full((), 0.0, tl.float32)
        if VARIANT.smoothing or gradient is not None:
            weight_total = tl.load(scalars + WEIGHT_TOTAL) if VARIANT.smoothing and not VARIANT.shard else 0.0
            expected_upstream = 1.0
            if gradient is not None:
                expected_upstream = tl.load(scalars + EXPECTED_UPSTREAM)
            if active:
                target, uniform, z = with_upstream(
                    target_factor, smoothing_factor, z_factor, expected_upstream, VARIANT
                )
                smoothing = row_gradient(
                    logits_row, interior, gradient_row, gradient_interior, head, columns, 0, columns, V, slice_index,
                    y, x_y, w_y, row_max, 1.0 if VARIANT.shard else row_sum, target, uniform, z, weight_total, weights,
                    stride_column, gradient_stride_column, logit_scale, softcap, VARIANT,
                )  # fmt: skip
        store_row_results(
            row, rows, row_loss, row_state, row_stats, row_max, row_sum, x_y,
            target_factor, smoothing_factor, z_factor, smoothing, logit_scale, softcap, VARIANT,
        )  # fmt: skip
    else:
        store_unread_row(row, rows, row_loss, row_state, row_stats, invalid, VARIANT)
    if gradient is not None and active == 0:
        fill_row(
            gradient_row, gradient_interior, head, columns, 0, columns, V, slice_index,
            tl.where(invalid, float("nan"), 0.0), gradient_stride_column, VARIANT,
        )  # fmt: skip


@triton.jit
def store_unread_row(row, rows, row_loss, row_state, row_stats, invalid, VARIANT: tl.constexpr):
    """A row that contributes nothing, or whose target is no class: its logits are not read."""
    if VARIANT.shard:
        store_shard_row(row, rows, row_state, -LARGEST, 0.0, 0.0, 0.0, VARIANT)
    else:
        value = tl.where(invalid, float("nan"), 0.0)
        tl.store(row_loss + row, value)
        if row_state is not None:
            tl.store(row_state + row, 0.0)
            tl.store(row_state + rows + row, 1.0)
        if VARIANT.stats:
            tl.store(row_stats + row, value)
            tl.store(row_stats + rows + row, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def slice_rows_kernel(
    logits, targets, weights, token_weights, scalars, slice_state,
    rows, rows_inner, V, stride_outer, stride_row, stride_column,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    slice_tiles, slices,
    VARIANT: tl.constexpr, row_weights=None, first_column=None, vocab_size=None,
):  # fmt: skip
    row = tl.program_id(0)
    slice_index = tl.program_id(1)
    offset = row_offset(row, rows_inner, stride_outer, stride_row)
    head, columns = interior_bounds(offset, V, VARIANT)
    interior = interior_pointer(logits, offset, head, VARIANT.layout != "any", VARIANT)
    _, _, counted, invalid, target_factor, smoothing_factor, z_factor = row_factors(
        row, targets, row_weights if VARIANT.shard else weights, token_weights, scalars,
        vocab_size if VARIANT.shard else V, ignore_index, label_smoothing, z_loss, VARIANT,
    )  # fmt: skip
    read = contributes(target_factor, smoothing_factor, z_factor)
    if VARIANT.stats:
        read = read | counted
    if read & (invalid == 0):
        begin, end = slice_bounds(slice_index, slice_tiles, columns, VARIANT)
        row_max, row_sum = row_max_and_sum(
            logits + offset, interior, head, columns, begin, end, V, slice_index, stride_column, logit_scale,
            softcap, False, VARIANT,
        )  # fmt: skip
        position = row.to(tl.int64) * slices + slice_index
        tl.store(slice_state + position, row_max)
        tl.store(slice_state + rows.to(tl.int64) * slices + position, row_sum)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_rows_kernel(
    logits, targets, weights, token_weights, scalars, slice_state,
    row_loss, row_state, row_stats,
    rows, rows_inner, V, stride_outer, stride_row, stride_column,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale, slices,
    SLICES: tl.constexpr, VARIANT: tl.constexpr, row_weights=None, first_column=None, vocab_size=None,
):  # fmt: skip
    row = tl.program_id(0)
    y, _, counted, invalid, target_factor, smoothing_factor, z_factor = row_factors(
        row, targets, row_weights if VARIANT.shard else weights, token_weights, scalars,
        vocab_size if VARIANT.shard else V, ignore_index, label_smoothing, z_loss, VARIANT,
    )  # fmt: skip
    read = contributes(target_factor, smoothing_factor, z_factor)
    if VARIANT.stats:
        read = read | counted
    if read & (invalid == 0):
        index = tl.arange(0, SLICES)
        position = row.to(tl.int64) * slices + index
        slice_max = tl.load(slice_state + position, mask=index < slices, other=-LARGEST)
        sum_position = rows.to(tl.int64) * slices + position
        slice_sum = tl.load(slice_state + sum_position, mask=index < slices, other=0.0)
        row_max = tl.max(slice_max)
        reference = transformed(row_max, logit_scale, softcap, VARIANT)
        z_max = transformed(slice_max, logit_scale, softcap, VARIANT)
        row_sum = tl.sum(slice_sum * exp_difference(z_max, reference))
        offset = row_offset(row, rows_inner, stride_outer, stride_row)
        x_y = target_logit(logits + offset, y, first_column, V, stride_column, VARIANT)
        store_row_results(
            row, rows, row_loss, row_state, row_stats, row_max, row_sum, x_y,
            target_factor, smoothing_factor, z_factor, 0.0, logit_scale, softcap, VARIANT,
        )  # fmt: skip
    else:
        store_unread_row(row, rows, row_loss, row_state, row_stats, invalid, VARIANT)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_rows_kernel(
    logits, gradient, targets, weights, token_weights, scalars, row_state, upstream,
    upstream_stride, rows, rows_inner, V, stride_outer, stride_row, stride_column,
    gradient_stride_outer, gradient_stride_row, gradient_stride_column,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    slice_tiles,
    UNLESS_EXPECTED: tl.constexpr, VARIANT: tl.constexpr, row_weights=None, first_column=None, vocab_size=None,
):  # fmt: skip
    """The gradient for `upstream`, or, without one, for the upstream gradient that is expected.

    With UNLESS_EXPECTED, `gradient` already holds the latter and is left alone if they are equal.
    """
    row = tl.program_id(0)
    slice_index = tl.program_id(1)
    if upstream is not None:
        upstream_value = tl.load(upstream + row.to(tl.int64) * upstream_stride).to(tl.float32)
    else:
        upstream_value = tl.load(scalars + EXPECTED_UPSTREAM)
    if UNLESS_EXPECTED:
        if upstream_value == tl.load(scalars + EXPECTED_UPSTREAM):
            return
    offset = row_offset(row, rows_inner, stride_outer, stride_row)
    head, columns = interior_bounds(offset, V, VARIANT)
    logits_row = logits + offset
    interior = interior_pointer(logits, offset, head, VARIANT.layout != "any", VARIANT)
    gradient_offset = row_offset(row, rows_inner, gradient_stride_outer, gradient_stride_row)
    gradient_row = gradient + gradient_offset
    gradient_interior = interior_pointer(gradient, gradient_offset, head, VARIANT.gradient_layout != "any", VARIANT)
    begin, end = slice_bounds(slice_index, slice_tiles, columns, VARIANT)
    y, w_y, _, invalid, target_factor, smoothing_factor, z_factor = row_factors(
        row, targets, row_weights if VARIANT.shard else weights, token_weights, scalars,
        vocab_size if VARIANT.shard else V, ignore_index, label_smoothing, z_loss, VARIANT,
    )  # fmt: skip
    target_factor, smoothing_factor, z_factor = with_upstream(
        target_factor, smoothing_factor, z_factor, upstream_value, VARIANT
    )
    if contributes(target_factor, smoothing_factor, z_factor) & (invalid == 0):
        # In place the slice that owns the target's column overwrites it; the others neither need nor read it. All
        # threads of the one that does have read it before any of them writes.
        if VARIANT.shard:
            y -= first_column
        owns = owns_column(y, head, columns, begin, end, slice_index)
        if VARIANT.shard:
            owns &= (y >= 0) & (y < V)  # or another rank has it
        x_y = tl.load(logits_row + y.to(tl.int64) * stride_column, mask=owns, other=0.0).to(tl.float32)
        tl.debug_barrier()
        row_max = tl.load(row_state + row)
        row_sum = tl.load(row_state + rows + row)
        weight_total = tl.load(scalars + WEIGHT_TOTAL) if VARIANT.smoothing else 0.0
        row_gradient(
            logits_row, interior, gradient_row, gradient_interior, head, columns, begin, end, V, slice_index,
            y, x_y, w_y, row_max, row_sum, target_factor, smoothing_factor, z_factor, weight_total, weights,
            stride_column, gradient_stride_column, logit_scale, softcap, VARIANT,
        )  # fmt: skip
    else:
        fill_row(
            gradient_row, gradient_interior, head, columns, begin, end, V, slice_index,
            tl.where(invalid, float("nan"), 0.0), gradient_stride_column, VARIANT,
        )  # fmt: skip


@triton.jit
def scaled_gradient(pointers, mask, factor):
    g = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    # 0 * inf must not appear: ignored rows stay exactly 0 under any upstream gradient.
    return tl.where(g == 0.0, 0.0, g * factor)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scale_rows_kernel(
    gradient, upstream, scalars,
    rows_inner, V, stride_outer, stride_row, stride_column, slice_tiles, VARIANT: tl.constexpr,
):  # fmt: skip
    """`gradient` was formed for the upstream gradient that `scalars` expects."""
    upstream_value = tl.load(upstream).to(tl.float32)
    expected = tl.load(scalars + EXPECTED_UPSTREAM)
    if upstream_value == expected:
        return
    factor = tl.div_rn(upstream_value, expected)
    BLOCK: tl.constexpr = VARIANT.lanes * VARIANT.vector
    offset = row_offset(tl.program_id(0), rows_inner, stride_outer, stride_row)
    slice_index = tl.program_id(1)
    head, columns = interior_bounds(offset, V, VARIANT)
    interior = interior_pointer(gradient, offset, head, VARIANT.layout != "any", VARIANT)
    begin, end = slice_bounds(slice_index, slice_tiles, columns, VARIANT)
    for start in range(begin, end, BLOCK):
        first, block = block_columns(start, VARIANT)
        pointers = interior + column_offsets(block, stride_column, VARIANT)
        g = scaled_gradient(pointers, first < end, factor)
        tl.store(pointers, g.to(gradient.dtype.element_ty), mask=first < end)
    if VARIANT.edges:
        column, exists = edge_columns(head, columns, V, slice_index, VARIANT)
        pointers = gradient + offset + column_offsets(column, stride_column, VARIANT)
        g = scaled_gradient(pointers, exists, factor)
        tl.debug_barrier()  # several threads have read each edge column, and one of them overwrites it
        tl.store(pointers, g.to(gradient.dtype.element_ty), mask=exists)
