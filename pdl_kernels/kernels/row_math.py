# mypy: ignore-errors
# Triton's device code is typed by Triton, not by Python.
"""The mathematics of one row, as device functions that every kernel shares. Tiles and blocks: see tiles.py."""

import triton
import triton.language as tl

from pdl_kernels.kernels.constants import INVERSE_DENOMINATOR, INVERSE_Z_DENOMINATOR, LARGEST, LN2, LOG2E
from pdl_kernels.kernels.tiles import (
    as_float32,
    block_columns,
    column_offsets,
    column_pointers,
    edge_columns,
    load_blocks,
)


@triton.jit
def tanh(x):
    """tanh to 2e-7 relative: libdevice is not in the interpreter, and 2 sigmoid(2x) - 1 loses small arguments."""
    squared = x * x
    # (tanh(x) / x - 1) / x**2 over |x| < 0.5: weighted least squares in x**2 at Chebyshev nodes.
    series = tl.fma(squared, 0.017249900847673416, -0.053049635142087936)
    series = tl.fma(squared, series, 0.13325941562652588)
    series = tl.fma(squared, series, -0.33333146572113037)
    near = tl.fma(x * squared, series, x)
    far = 1.0 - 2.0 / (tl.math.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def scaled(x, logit_scale, VARIANT: tl.constexpr):
    """logit_scale * x, clamped to the finite range; infinities and nan stay."""
    if VARIANT.scale:
        product = tl.minimum(tl.maximum(x * logit_scale, -LARGEST), LARGEST)
        x = tl.where(tl.abs(x) <= LARGEST, product, x)
    return x


@triton.jit
def transformed(x, logit_scale, softcap, VARIANT: tl.constexpr):
    """The logits z that the loss sees: scaled, then capped. Increasing in x, so that x decides a row's maximum."""
    z = scaled(x, logit_scale, VARIANT)
    if VARIANT.softcap:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def transform_derivative(x, logit_scale, softcap, VARIANT: tl.constexpr):
    """dz / dx. It starts from x: recovering tanh from z would round where 1 - tanh**2 cancels."""
    derivative = 1.0
    if VARIANT.softcap:
        ratio = tanh(scaled(x, logit_scale, VARIANT) / softcap)
        derivative = 1.0 - ratio * ratio
    if VARIANT.scale:
        derivative = derivative * logit_scale
    return derivative


@triton.jit
def exp_difference(a, b):
    """exp(a - b). The difference is taken first: it is exact near the maximum, whatever offset both share."""
    return tl.math.exp2((a - b) * LOG2E)


@triton.jit
def exp_terms(m):
    """(rate, shift, correction) with exp(z - m) = exp2(fma(z, rate, -shift)) * correction for z <= m.

    One fused multiply-add per column instead of a subtraction and a multiplication. `shift` is rounded; `correction`
    takes exactly that rounding back, so that a large offset common to all logits costs no accuracy. From 2**30 on the
    rounding itself could overflow exp2, and later m * log2(e) would; but there floats are at least 64 apart, so that
    exp(z - m) is 1 or next to 0 at any rate, and at rate 1 the shift is exact.
    """
    rate = tl.where(tl.abs(m) < 1073741824.0, LOG2E, 1.0)
    shift = m * rate
    return rate, shift, tl.math.exp2(-tl.fma(m, rate, -shift))


@triton.jit
def fold_tile(
    interior, start, end, lane_max, lane_sum, stride_column, logit_scale, softcap, POLICY: tl.constexpr,
    MASKED: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Merge one tile into each lane's running (max of x, sum of exp(z - z of that max)), z = transformed(x)."""
    BLOCK: tl.constexpr = VARIANT.lanes * VARIANT.vector
    UNROLL: tl.constexpr = VARIANT.unroll
    blocks = load_blocks(interior, start, end, stride_column, POLICY, MASKED, VARIANT)
    tile_max = as_float32(blocks[0], VARIANT)
    for step in tl.static_range(1, UNROLL):
        tile_max = tl.maximum(tile_max, as_float32(blocks[step], VARIANT))
    new_max = tl.maximum(lane_max, tl.max(tile_max, 1, keep_dims=True))  # (lanes, 1)
    reference = transformed(new_max, logit_scale, softcap, VARIANT)
    rate, shift, correction = exp_terms(reference)
    for step in tl.static_range(UNROLL):
        z = transformed(as_float32(blocks[step], VARIANT), logit_scale, softcap, VARIANT)
        if MASKED and VARIANT.softcap:
            first, _ = block_columns(start + step * BLOCK, VARIANT)
            z = tl.where(first < end, z, float("-inf"))  # a capped -inf is a real logit; a missing column is not
        terms = tl.math.exp2(tl.fma(z, rate, -shift))
        # Not from a sum of 0: x + 0 is an instruction, because it is not x where x is -0.
        if step == 0:
            exps = terms
        else:
            exps += terms
    rescale = exp_difference(transformed(lane_max, logit_scale, softcap, VARIANT), reference)
    return new_max, lane_sum * rescale + tl.sum(exps, 1, keep_dims=True) * correction


@triton.jit
def row_max_and_sum(
    row, interior, head, columns, begin, end, V, slice_index, stride_column, logit_scale, softcap, AGAIN: tl.constexpr,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """(max of x, sum of exp(z - z of that max)) over interior columns [begin, end) and, if asked, the edges.

    AGAIN: this program reads the row a second time, for which the second-level cache is asked to keep it. Asking costs
    a handful of instructions a tile, to build the policy.

    The maximum starts at the lowest finite value and not at -inf: a leading block of -inf is harmless, a row full of
    the lowest value gives V, and a row wholly -inf gives a sum of 0, hence a loss of nan as in torch.
    """
    TILE: tl.constexpr = VARIANT.unroll * VARIANT.lanes * VARIANT.vector
    POLICY: tl.constexpr = "evict_last" if AGAIN else ""
    lane_max = tl.full((VARIANT.lanes, 1), -LARGEST, tl.float32)
    lane_sum = tl.full((VARIANT.lanes, 1), 0.0, tl.float32)
    full_end = begin + (end - begin) // TILE * TILE
    for start in range(begin, full_end, TILE):
        lane_max, lane_sum = fold_tile(
            interior, start, end, lane_max, lane_sum, stride_column, logit_scale, softcap, POLICY, False, VARIANT
        )
    if full_end < end:
        lane_max, lane_sum = fold_tile(
            interior, full_end, end, lane_max, lane_sum, stride_column, logit_scale, softcap, POLICY, True, VARIANT
        )
    row_max = tl.max(lane_max)
    if VARIANT.edges:
        column, exists = edge_columns(head, columns, V, slice_index, VARIANT)
        x = tl.load(row + column_offsets(column, stride_column, VARIANT), mask=exists, other=float("-inf"))
        x = x.to(tl.float32)
        row_max = tl.maximum(row_max, tl.max(x))
    reference = transformed(row_max, logit_scale, softcap, VARIANT)
    row_sum = tl.sum(lane_sum * exp_difference(transformed(lane_max, logit_scale, softcap, VARIANT), reference))
    if VARIANT.edges:
        z = tl.where(exists, transformed(x, logit_scale, softcap, VARIANT), float("-inf"))
        row_sum += tl.sum(exp_difference(z, reference))
    return row_max, row_sum


@triton.jit
def product(factor, value):
    """factor * value, and 0 where the factor is 0: a row without a share stays out, even of an inf or nan."""
    return tl.where(factor == 0.0, 0.0, factor * value)


@triton.jit
def row_factors(
    row, targets, weights, token_weights, scalars, V, ignore_index, label_smoothing, z_loss, VARIANT: tl.constexpr
):
    """What the row's three terms are multiplied by in the loss, denominators included.

    Of a shard V are the columns of the whole, and `weights` holds w(y_i) of each row.

    Returns (y, w_y, counted, invalid, target_factor, smoothing_factor, z_factor); y is 0 where the target is no class.
    """
    y = tl.load(targets + row).to(tl.int64)
    token_weight = 1.0
    if token_weights is not None:
        token_weight = tl.load(token_weights + row).to(tl.float32)
    counted = (y != ignore_index) & (token_weight != 0.0)
    exists = (y >= 0) & (y < V)
    safe_y = tl.where(exists, y, 0).to(tl.int32)
    w_y = 1.0
    if weights is not None:
        entry = row if VARIANT.shard else safe_y
        w_y = tl.load(weights + entry, mask=counted, other=0.0).to(tl.float32)
    inverse = 1.0
    inverse_z = 1.0
    if VARIANT.normalized:
        inverse = tl.load(scalars + INVERSE_DENOMINATOR)
        inverse_z = tl.load(scalars + INVERSE_Z_DENOMINATOR)
    u = tl.where(counted, token_weight, 0.0)
    target_factor = u * w_y
    smoothing_factor = 0.0
    z_factor = 0.0
    if VARIANT.smoothing:
        target_factor = target_factor * (1.0 - label_smoothing)
        smoothing_factor = product(u, label_smoothing / V * inverse)
    if VARIANT.z_loss:
        z_factor = product(tl.abs(u), z_loss * inverse_z)
    target_factor = product(target_factor, inverse)
    return safe_y, w_y, counted, counted & (exists == 0), target_factor, smoothing_factor, z_factor


@triton.jit
def with_upstream(target_factor, smoothing_factor, z_factor, upstream, VARIANT: tl.constexpr):
    """The same factors in the gradient."""
    if VARIANT.smoothing:
        smoothing_factor = product(smoothing_factor, upstream)
    if VARIANT.z_loss:
        z_factor = product(z_factor, upstream)
    return product(target_factor, upstream), smoothing_factor, z_factor


@triton.jit
def contributes(target_factor, smoothing_factor, z_factor):
    """Whether anything of the row enters the loss; a nan factor does."""
    return (target_factor != 0.0) | (smoothing_factor != 0.0) | (z_factor != 0.0)


@triton.jit
def target_gradient(exp_y, row_sum, target_factor, common):
    """dL/dz_y but for smoothing: p_y - 1 is formed in float32 from the sum without the target, and stored once."""
    return (common * exp_y - target_factor * (row_sum - exp_y)) / row_sum


@triton.jit
def gradient_values(
    x, column, exists, reference, rate, shift, log_sum, probability_scale, smoothing_factor, weights, logit_scale,
    softcap, VARIANT: tl.constexpr,
):  # fmt: skip
    """dL/dx of these columns but for the target's own term, and their share of sum_j w_j (lse - z_j)."""
    z = transformed(x, logit_scale, softcap, VARIANT)
    g = tl.math.exp2(tl.fma(z, rate, -shift)) * probability_scale
    smoothing = 0.0
    if VARIANT.smoothing:
        if weights is not None:
            w = tl.load(weights + column, mask=exists, other=0.0).to(tl.float32)
        else:
            w = tl.where(exists, 1.0, 0.0)
        # Columns of weight 0 add 0 even where z is -inf.
        smoothing = tl.sum(tl.where(w != 0.0, w * ((reference - z) + log_sum), 0.0))
        g = g - smoothing_factor * w
    if VARIANT.softcap or VARIANT.scale:
        g = g * transform_derivative(x, logit_scale, softcap, VARIANT)
    return g, smoothing


@triton.jit
def gradient_tile(
    logits_interior, gradient_interior, start, end, head, reference, rate, shift, log_sum, probability_scale,
    smoothing_factor, weights, stride_column, gradient_stride_column, logit_scale, softcap, MASKED: tl.constexpr,
    VARIANT: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = VARIANT.lanes * VARIANT.vector
    UNROLL: tl.constexpr = VARIANT.unroll
    blocks = load_blocks(logits_interior, start, end, stride_column, "evict_first", MASKED, VARIANT)
    smoothing = tl.full((), 0.0, tl.float32)
    for step in tl.static_range(UNROLL):
        first, columns = block_columns(0, VARIANT)
        block_start = start + step * BLOCK
        exists = block_start + first < end
        g, block_smoothing = gradient_values(
            as_float32(blocks[step], VARIANT), head + block_start + columns, exists, reference, rate, shift, log_sum,
            probability_scale, smoothing_factor, weights, logit_scale, softcap, VARIANT,
        )  # fmt: skip
        smoothing += block_smoothing
        if gradient_interior is not None:
            pointers = column_pointers(gradient_interior, block_start, columns, gradient_stride_column, VARIANT)
            g = g.to(gradient_interior.dtype.element_ty)
            if MASKED:
                tl.store(pointers, g, mask=exists, eviction_policy="evict_first")
            else:
                tl.store(pointers, g, eviction_policy="evict_first")
    return smoothing


@triton.jit
def store_target_column(
    gradient_row, gradient_interior, head, begin, end, y, g_y, stride_column, VARIANT: tl.constexpr
):
    """Write the target's gradient over the bulk store's, if it lies in interior columns [begin, end).

    No race: a row's slices are disjoint, so only this program writes the column; and this block has the layout of the
    bulk store's, so that the thread that wrote the column in bulk writes it again, later in program order. A store by
    any other thread would need more than a barrier, which on AMD does not wait for stores.
    """
    BLOCK: tl.constexpr = VARIANT.lanes * VARIANT.vector
    column = y - head
    if (column >= begin) & (column < end):
        _, columns = block_columns(column // BLOCK * BLOCK, VARIANT)
        pointers = gradient_interior + column_offsets(columns, stride_column, VARIANT)
        values = tl.full((VARIANT.lanes, VARIANT.vector), 0.0, tl.float32) + g_y
        tl.store(pointers, values.to(gradient_row.dtype.element_ty), mask=columns == column)


@triton.jit
def row_gradient(
    logits_row, logits_interior, gradient_row, gradient_interior, head, columns, begin, end, V, slice_index,
    y, x_y, w_y, row_max, row_sum, target_factor, smoothing_factor, z_factor, weight_total, weights,
    stride_column, gradient_stride_column, logit_scale, softcap, VARIANT: tl.constexpr,
):  # fmt: skip
    """Write dL/dx of interior columns [begin, end) and, if asked, the edges; return sum_j w_j (lse - z_j) over them.

    dL/dz_j = (target_factor + common) p_j - smoothing_factor w_j - [j == y] target_factor,
    common = smoothing_factor sum_j w_j + 2 z_factor lse. Without a gradient to write only the sum is formed.
    """
    TILE: tl.constexpr = VARIANT.unroll * VARIANT.lanes * VARIANT.vector
    reference = transformed(row_max, logit_scale, softcap, VARIANT)
    log_sum = LN2 * tl.math.log2(row_sum)
    common = 0.0
    if VARIANT.smoothing:
        common += smoothing_factor * weight_total
    if VARIANT.z_loss:
        common += 2.0 * z_factor * (reference + log_sum)
    rate, shift, correction = exp_terms(reference)
    probability_scale = (target_factor + common) / row_sum * correction

    smoothing = tl.full((), 0.0, tl.float32)
    full_end = begin + (end - begin) // TILE * TILE
    for start in range(begin, full_end, TILE):
        smoothing += gradient_tile(
            logits_interior, gradient_interior, start, end, head, reference, rate, shift, log_sum, probability_scale,
            smoothing_factor, weights, stride_column, gradient_stride_column, logit_scale, softcap, False, VARIANT,
        )  # fmt: skip
    if full_end < end:
        smoothing += gradient_tile(
            logits_interior, gradient_interior, full_end, end, head, reference, rate, shift, log_sum, probability_scale,
            smoothing_factor, weights, stride_column, gradient_stride_column, logit_scale, softcap, True, VARIANT,
        )  # fmt: skip
    if VARIANT.edges:
        column, exists = edge_columns(head, columns, V, slice_index, VARIANT)
        x = tl.load(logits_row + column_offsets(column, stride_column, VARIANT), mask=exists, other=float("-inf"))
        g, edge_smoothing = gradient_values(
            x.to(tl.float32), column, exists, reference, rate, shift, log_sum, probability_scale, smoothing_factor,
            weights, logit_scale, softcap, VARIANT,
        )  # fmt: skip
        smoothing += edge_smoothing

    if gradient_row is not None:
        z_y = transformed(x_y, logit_scale, softcap, VARIANT)
        exp_y = exp_difference(z_y, reference)
        g_y = target_gradient(exp_y, row_sum, target_factor, common)
        if VARIANT.smoothing:
            g_y -= smoothing_factor * w_y
        if VARIANT.softcap or VARIANT.scale:
            g_y = g_y * transform_derivative(x_y, logit_scale, softcap, VARIANT)
        # In place: all threads have read the edge columns before one of them overwrites them.
        tl.debug_barrier()
        store_target_column(gradient_row, gradient_interior, head, begin, end, y, g_y, gradient_stride_column, VARIANT)
        if VARIANT.edges:
            pointers = gradient_row + column_offsets(column, gradient_stride_column, VARIANT)
            g = tl.where(column == y, g_y, g)
            tl.store(pointers, g.to(gradient_row.dtype.element_ty), mask=exists)
    return smoothing
