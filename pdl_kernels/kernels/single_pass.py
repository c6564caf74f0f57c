# mypy: ignore-errors
# Triton's device code is typed by Triton, not by Python.
"""The kernel that reads every logit once: a row stays on chip between its sum and its gradient.

A row belongs to one program, which may be a cluster of `num_ctas` blocks of threads. The row's interior (see tiles.py)
is held as a tuple of chunks of `lanes * vector` columns, one 16-byte vector per thread and chunk: 128256 columns
are 125 columns a thread in a cluster of 1024 threads. Chunks are one-dimensional: in a cluster Triton 3.9 exchanges
two-dimensional ones through shared memory over and over.

Every warp forms (max, sum) of its own columns; one reduction over all warps, of both numbers in one word, gives the
row's. It is the only exchange between the blocks of a cluster.

Label smoothing, softcap and a scale of the logits take more registers than are left beside a held row: the planner does
not choose this kernel for them, and it has no branches for them.
"""

import triton
import triton.language as tl

from pdl_kernels.kernels.constants import (
    EXPECTED_UPSTREAM,
    LARGEST,
    LN2,
    LOG2E,
    MINUS_INFINITY_HALVES,
    MINUS_INFINITY_PAIR,
    WARP_SIZE,
)
from pdl_kernels.kernels.row_kernels import store_row_results, store_unread_row
from pdl_kernels.kernels.row_math import (
    contributes,
    exp_difference,
    exp_terms,
    row_factors,
    target_gradient,
    with_upstream,
)
from pdl_kernels.kernels.tiles import UNSPECIALIZED, interior_bounds, interior_pointer, row_offset


@triton.jit
def packed(maximum, total):
    """Two float32 as one int64, so that a reduction takes them over the cluster in one exchange."""
    low = total.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (maximum.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def unpacked(pair):
    maximum = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return maximum, pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def merge(first, second):
    """(max, sum of exp(z - max)) of two sets of columns from those of each."""
    first_max, first_sum = unpacked(first)
    second_max, second_sum = unpacked(second)
    above = first_max > second_max
    rescale = tl.math.exp2(-tl.abs(first_max - second_max) * LOG2E)
    larger = tl.where(above, first_sum, second_sum)
    smaller = tl.where(above, second_sum, first_sum)
    return packed(tl.where(above, first_max, second_max), larger + smaller * rescale)


@triton.jit
def for_columns(values, VARIANT: tl.constexpr):
    """(lanes,) -> (lanes * vector,): each thread's number for each of its columns."""
    columns = tl.broadcast_to(values[:, None], (VARIANT.lanes, VARIANT.vector))
    return tl.reshape(columns, (VARIANT.lanes * VARIANT.vector,))


@triton.jit
def for_words(values, VARIANT: tl.constexpr):
    """(lanes,) -> (lanes * vector / 2,): each thread's number for each of its words."""
    words = tl.broadcast_to(values[:, None], (VARIANT.lanes, VARIANT.vector // 2))
    return tl.reshape(words, (VARIANT.lanes * VARIANT.vector // 2,))


@triton.jit
def lane_view(values, VARIANT: tl.constexpr):
    """(lanes * vector,) -> (lanes, vector), whose last axis lies inside a thread."""
    return tl.reshape(values, (VARIANT.lanes, VARIANT.vector))


@triton.jit
def warp_view(values, VARIANT: tl.constexpr):
    """(lanes,) -> (warps, threads): reductions over the last axis stay inside a warp."""
    return tl.reshape(values, (VARIANT.lanes // WARP_SIZE, WARP_SIZE))


@triton.jit
def over_lanes(values, VARIANT: tl.constexpr):
    """(warps,) -> (lanes,): each warp's number for each of its threads."""
    WARPS: tl.constexpr = VARIANT.lanes // WARP_SIZE
    return tl.reshape(tl.broadcast_to(values[:, None], (WARPS, WARP_SIZE)), (VARIANT.lanes,))


@triton.jit
def load_chunk(interior, columns, CHUNK: tl.constexpr, VARIANT: tl.constexpr):
    """Chunk number CHUNK as it is held: 16-bit columns as words of two, which take half the registers."""
    SIZE: tl.constexpr = VARIANT.lanes * VARIANT.vector
    if VARIANT.vector == 8:
        index = tl.arange(0, SIZE // 2)
        pointers = (interior + CHUNK * SIZE).to(tl.pointer_type(tl.int32), bitcast=True) + index
        first = index // (VARIANT.vector // 2) * VARIANT.vector
        missing = MINUS_INFINITY_PAIR if interior.dtype.element_ty == tl.bfloat16 else MINUS_INFINITY_HALVES
    else:
        index = tl.arange(0, SIZE)
        pointers = interior + CHUNK * SIZE + index
        first = index // VARIANT.vector * VARIANT.vector
        missing = float("-inf")
    if VARIANT.full_chunks > CHUNK:
        chunk = tl.load(pointers)
    else:
        # Constant over each vector, because `columns` is a multiple of its length: the load stays 16 bytes wide.
        chunk = tl.load(pointers, mask=first < columns - CHUNK * SIZE, other=missing)
    return chunk


@triton.jit
def chunk_values(chunk, sixteen, upper_half, dtype: tl.constexpr, VARIANT: tl.constexpr):
    """(lanes * vector,) float32 columns of a held chunk.

    `sixteen` and `upper_half` (all bits of the upper half) are operands and no constants, see `opaque_constants`.
    """
    SIZE: tl.constexpr = VARIANT.lanes * VARIANT.vector
    if VARIANT.vector == 8:
        if dtype == tl.bfloat16:
            lower = (chunk << sixteen).to(tl.float32, bitcast=True)
            upper = (chunk & upper_half).to(tl.float32, bitcast=True)
        else:
            lower = (chunk & (upper_half ^ -1)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            upper = (chunk >> sixteen).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x = tl.reshape(tl.join(lower, upper), (SIZE,))
    else:
        x = chunk.to(tl.float32)
    return x


@triton.jit
def lane_maxima(chunks, dtype: tl.constexpr, VARIANT: tl.constexpr):
    """(lanes,) the largest column of each thread; nan is passed over, and +inf where the word's other half is not 0.

    Of bfloat16 words the upper half decides which is larger as a float32, whatever the lower half holds, so that it is
    cut off once, from the largest word, instead of from every word.
    """
    WORDS: tl.constexpr = VARIANT.vector // 2
    CHUNKS: tl.constexpr = VARIANT.chunks  # named: Triton 3.6 takes no field of a tuple as the end of a range
    if dtype == tl.bfloat16:
        lower = (chunks[0] << 16).to(tl.float32, bitcast=True)
        upper = chunks[0].to(tl.float32, bitcast=True)
        for chunk in tl.static_range(1, CHUNKS):
            lower = tl.maximum(lower, (chunks[chunk] << 16).to(tl.float32, bitcast=True))
            upper = tl.maximum(upper, chunks[chunk].to(tl.float32, bitcast=True))
        upper = (upper.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        largest = tl.max(tl.reshape(tl.maximum(lower, upper), (VARIANT.lanes, WORDS)), 1)
    else:
        values = chunk_values(chunks[0], 16, -65536, dtype, VARIANT)
        for chunk in tl.static_range(1, CHUNKS):
            values = tl.maximum(values, chunk_values(chunks[chunk], 16, -65536, dtype, VARIANT))
        largest = tl.max(lane_view(values, VARIANT), 1)
    return largest


@triton.jit
def opaque_constants(value):
    """(16, mask of the upper half) that the compiler cannot tell from functions of `value`.

    With constants it would unpack every word once and hold the results for all phases, in twice the registers. Where
    `value` is infinite they are wrong, and the row's loss is nan whatever they are.
    """
    infinite = value == float("inf")
    return tl.where(infinite, 15, 16), tl.where(infinite, -32768, -65536)


@triton.jit
def edge_chunk(head, columns, V, VARIANT: tl.constexpr):
    """(lanes,) the columns outside the interior, one each of the first threads, and which of them exist."""
    index = tl.arange(0, VARIANT.lanes)
    before = index < VARIANT.vector
    column = tl.where(before, index, index - VARIANT.vector + head + columns)
    return column, column < tl.where(before, head, V)


@triton.jit
def chunk_columns(VARIANT: tl.constexpr):
    """(first column of each column's vector, columns) of a chunk, (lanes * vector,) both."""
    columns = tl.arange(0, VARIANT.lanes * VARIANT.vector)
    return columns // VARIANT.vector * VARIANT.vector, columns


@triton.jit
def store_chunk(gradient_interior, values, columns, CHUNK: tl.constexpr, VARIANT: tl.constexpr):
    SIZE: tl.constexpr = VARIANT.lanes * VARIANT.vector
    first, index = chunk_columns(VARIANT)
    pointers = gradient_interior + CHUNK * SIZE + index
    if VARIANT.full_chunks > CHUNK:
        tl.store(pointers, values.to(gradient_interior.dtype.element_ty))
    else:
        mask = first < columns - CHUNK * SIZE
        tl.store(pointers, values.to(gradient_interior.dtype.element_ty), mask=mask)


@triton.jit
def row_sums(chunks, edge_x, lane_max, dtype: tl.constexpr, VARIANT: tl.constexpr):
    """(row's maximum, row's sum, each thread's maximum of its warp, its correction of exp_terms, held exponentials).

    Every thread sums with the maximum of its warp; the row's numbers are exchanged once, over all warps.
    """
    SIZE: tl.constexpr = VARIANT.lanes * VARIANT.vector
    CHUNKS: tl.constexpr = VARIANT.chunks
    warp_max = tl.max(warp_view(lane_max, VARIANT), 1)  # (warps,)
    lane_reference = over_lanes(warp_max, VARIANT)
    rate, shift, correction = exp_terms(lane_reference)
    if VARIANT.hold_exps:
        sixteen, upper_half = 16, -65536
    else:
        sixteen, upper_half = opaque_constants(lane_reference)
        if VARIANT.vector == 8:
            sixteen = for_words(sixteen, VARIANT)
            upper_half = for_words(upper_half, VARIANT)
    rates, shifts = for_columns(rate, VARIANT), for_columns(shift, VARIANT)
    exps = ()
    sums = tl.full((SIZE,), 0.0, tl.float32)
    for chunk in tl.static_range(CHUNKS):
        x = chunk_values(chunks[chunk], sixteen, upper_half, dtype, VARIANT)
        terms = tl.math.exp2(tl.fma(x, rates, -shifts))
        if chunk == 0:
            sums = terms
        else:
            sums += terms
        if VARIANT.hold_exps:
            exps = exps + (terms,)
    lane_sum = tl.sum(lane_view(sums, VARIANT), 1) * correction
    if VARIANT.edges:
        lane_sum += exp_difference(edge_x, lane_reference)
    warp_sum = tl.sum(warp_view(lane_sum, VARIANT), 1)
    row_max, row_sum = unpacked(tl.reduce(packed(warp_max, warp_sum), 0, merge))
    return row_max, row_sum, lane_reference, correction, exps


@triton.jit
def write_gradient(
    gradient_row, gradient_interior, chunks, exps, edge, edge_exists, edge_x, head, columns, y, x_y,
    lane_reference, correction, row_max, row_sum, log_sum, sixteen, upper_half, gradient_factor, z_factor,
    dtype: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Write dL/dx_j = (gradient_factor + common) p_j - [j == y] gradient_factor, with common = 2 z_factor lse."""
    SIZE: tl.constexpr = VARIANT.lanes * VARIANT.vector
    CHUNKS: tl.constexpr = VARIANT.chunks
    # The assembler moves no store over a barrier. Without any it takes up so many chunks at once that it spills.
    MANY_CHUNKS: tl.constexpr = CHUNKS > 25 and not VARIANT.hold_exps
    common = 0.0
    if VARIANT.z_loss:
        common += 2.0 * z_factor * (row_max + log_sum)
    factor = (gradient_factor + common) / row_sum
    row_rate, row_shift, row_correction = exp_terms(row_max)
    if VARIANT.hold_exps:
        scales = for_columns(factor * correction * exp_difference(lane_reference, row_max), VARIANT)
    else:
        scales = factor * row_correction
    for chunk in tl.static_range(CHUNKS):
        if VARIANT.hold_exps:
            terms = exps[chunk] * scales
        else:
            x = chunk_values(chunks[chunk], sixteen, upper_half, dtype, VARIANT)
            terms = tl.math.exp2(tl.fma(x, row_rate, -row_shift)) * scales
        store_chunk(gradient_interior, terms, columns, chunk, VARIANT)
        if MANY_CHUNKS and chunk % 8 == 7:
            tl.debug_barrier()

    g_y = target_gradient(exp_difference(x_y, row_max), row_sum, gradient_factor, common)
    # Written over the bulk store's value. No race: this store has the shape of the bulk stores and hence their layout,
    # so that the thread that wrote the column in bulk writes it again, later in program order. A store by any other
    # thread would need a barrier of the whole cluster.
    column = y - head
    if (column >= 0) & (column < columns):
        target_chunk = column // SIZE * SIZE
        index = tl.arange(0, SIZE)
        values = tl.full((SIZE,), 0.0, tl.float32) + g_y
        tl.store(
            gradient_interior + target_chunk + index,
            values.to(gradient_row.dtype.element_ty),
            mask=index == column - target_chunk,
        )
    if VARIANT.edges:
        edge_g = tl.math.exp2(tl.fma(edge_x, row_rate, -row_shift)) * (factor * row_correction)
        edge_g = tl.where(edge == y, g_y, edge_g)
        tl.store(gradient_row + edge, edge_g.to(gradient_row.dtype.element_ty), mask=edge_exists)


@triton.jit
def fill_chunks(gradient_row, gradient_interior, head, columns, V, value, VARIANT: tl.constexpr):
    """Write `value` to the whole row."""
    CHUNKS: tl.constexpr = VARIANT.chunks
    values = tl.full((VARIANT.lanes * VARIANT.vector,), 0.0, tl.float32) + value
    for chunk in tl.static_range(CHUNKS):
        store_chunk(gradient_interior, values, columns, chunk, VARIANT)
    if VARIANT.edges:
        edge, edge_exists = edge_chunk(head, columns, V, VARIANT)
        edge_values = (tl.full((VARIANT.lanes,), 0.0, tl.float32) + value).to(gradient_row.dtype.element_ty)
        tl.store(gradient_row + edge, edge_values, mask=edge_exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def single_pass_rows_kernel(
    logits, gradient, targets, weights, token_weights, scalars,
    row_loss, row_state, row_stats,
    rows, rows_inner, V, stride_outer, stride_row, stride_column,
    gradient_stride_outer, gradient_stride_row, gradient_stride_column,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """The arguments and results of loss_rows_kernel with a gradient; both strides over columns are 1."""
    CHUNKS: tl.constexpr = VARIANT.chunks
    row = tl.program_id(0)
    offset = row_offset(row, rows_inner, stride_outer, stride_row)
    head, columns = interior_bounds(offset, V, VARIANT)
    logits_row = logits + offset
    interior = interior_pointer(logits, offset, head, True, VARIANT)
    gradient_offset = row_offset(row, rows_inner, gradient_stride_outer, gradient_stride_row)
    gradient_row = gradient + gradient_offset
    gradient_interior = interior_pointer(gradient, gradient_offset, head, True, VARIANT)
    y, _w_y, counted, invalid, target_factor, smoothing_factor, z_factor = row_factors(
        row, targets, weights, token_weights, scalars, V, ignore_index, label_smoothing, z_loss, VARIANT
    )
    expected_upstream = tl.load(scalars + EXPECTED_UPSTREAM)
    active = contributes(target_factor, smoothing_factor, z_factor) & (invalid == 0)
    read = active
    if VARIANT.stats:
        read = active | (counted & (invalid == 0))

    if read:
        # In place the target's logit is overwritten below. Every block of threads reads it here, before the exchange of
        # the reduction, and no block writes before that exchange.
        x_y = tl.load(logits_row + y.to(tl.int64)).to(tl.float32)
        chunks = ()
        for chunk in tl.static_range(CHUNKS):
            chunks = chunks + (load_chunk(interior, columns, chunk, VARIANT),)
        # It starts at the lowest finite value and not at -inf, as in row_max_and_sum.
        lane_max = tl.maximum(lane_maxima(chunks, logits.dtype.element_ty, VARIANT), -LARGEST)  # (lanes,)
        edge, edge_exists, edge_x = None, None, None
        if VARIANT.edges:
            edge, edge_exists = edge_chunk(head, columns, V, VARIANT)
            edge_x = tl.load(logits_row + edge, mask=edge_exists, other=float("-inf")).to(tl.float32)
            lane_max = tl.maximum(lane_max, edge_x)
        row_max, row_sum, lane_reference, correction, exps = row_sums(
            chunks, edge_x, lane_max, logits.dtype.element_ty, VARIANT
        )
        row_sixteen, row_upper_half = opaque_constants(row_sum)
        # A row that holds +inf is nan throughout, as in torch, also where the maximum passed it over.
        row_sum = tl.where(row_sum == float("inf"), float("nan"), row_sum)
        log_sum = LN2 * tl.math.log2(row_sum)
        writes = active
        if VARIANT.z_loss:
            # Always true, which the compiler cannot know: without a branch here it spills.
            writes = active & (rows > 0)
        if writes:
            gradient_factor, _none, z_gradient_factor = with_upstream(
                target_factor, smoothing_factor, z_factor, expected_upstream, VARIANT
            )
            write_gradient(
                gradient_row, gradient_interior, chunks, exps, edge, edge_exists, edge_x, head, columns, y, x_y,
                lane_reference, correction, row_max, row_sum, log_sum, row_sixteen, row_upper_half,
                gradient_factor, z_gradient_factor, logits.dtype.element_ty, VARIANT,
            )  # fmt: skip
        store_row_results(
            row, rows, row_loss, row_state, row_stats, row_max, row_sum, x_y,
            target_factor, smoothing_factor, z_factor, 0.0, logit_scale, softcap, VARIANT,
        )  # fmt: skip
    else:
        store_unread_row(row, rows, row_loss, row_state, row_stats, invalid, VARIANT)
    if active == 0:
        value = tl.where(invalid, float("nan"), 0.0)
        fill_chunks(gradient_row, gradient_interior, head, columns, V, value, VARIANT)
