# mypy: ignore-errors
# Triton's device code is typed by Triton, not by Python.
"""Where a row's columns lie in memory, and how tiles of them are read and filled.

A row's columns are an *interior*, which starts on 16 bytes and whose length is a multiple of `VARIANT.vector` columns,
and up to 2 * (vector - 1) *edge* columns around it. The interior is walked in tiles of `unroll` blocks of shape
(lanes, vector): one 16-byte vector per thread and block, so that sums over the last axis and over blocks stay inside a
thread. All blocks have one shape and hence one layout: a column always belongs to the same thread.
"""

import triton
import triton.language as tl

from pdl_kernels.kernels.constants import MINUS_INFINITY_PAIR

# One compilation serves every number of rows: alignment comes from VARIANT, not from the values of these arguments.
UNSPECIALIZED = (
    "rows",
    "rows_inner",
    "stride_outer",
    "stride_row",
    "gradient_stride_outer",
    "gradient_stride_row",
    "upstream_stride",
    "slice_tiles",
    "slices",
    "ignore_index",
    "first_column",
    "vocab_size",
    "shards",
    "shard_stride",
    "total_stride",
)


@triton.jit
def slice_bounds(slice_index, slice_tiles, columns, VARIANT: tl.constexpr):
    """The interior columns [begin, end) of one slice of a row; `begin` is visibly a multiple of a vector."""
    TILE: tl.constexpr = VARIANT.unroll * VARIANT.lanes * VARIANT.vector
    begin = slice_index * slice_tiles * TILE
    end = tl.maximum(begin, tl.minimum(begin + slice_tiles * TILE, columns))
    return begin, end


@triton.jit
def owns_column(column, head, columns, begin, end, slice_index):
    """Whether the slice with interior columns [begin, end) writes this column; the first one has the edges too."""
    interior = column - head
    is_edge = (interior < 0) | (interior >= columns)
    return ((interior >= begin) & (interior < end)) | (is_edge & (slice_index == 0))


@triton.jit
def row_offset(row, rows_inner, stride_outer, stride_row):
    """Elements from the tensor's start to row `row` of (rows_outer, rows_inner, V), in 64 bits."""
    outer = (row // rows_inner).to(tl.int64)
    inner = (row % rows_inner).to(tl.int64)
    return outer * stride_outer + inner * stride_row


@triton.jit
def interior_bounds(offset, V, VARIANT: tl.constexpr):
    """(head, columns): how many edge columns precede the interior, and how many columns the interior has."""
    head = 0
    if VARIANT.layout == "head":
        head = ((VARIANT.vector - offset % VARIANT.vector) % VARIANT.vector).to(tl.int32)
        head = tl.minimum(head, V)
    columns = (V - head) // VARIANT.vector * VARIANT.vector
    return head, columns


@triton.jit
def interior_pointer(base, offset, head, ALIGNED: tl.constexpr, VARIANT: tl.constexpr):
    """The address of the interior's first column, which the compiler is told starts on 16 bytes if ALIGNED."""
    start = offset + head  # only unit column strides have a head
    if ALIGNED:
        # Says "a multiple of vector" in arithmetic: tl.multiple_of would be lost where the addition folds away.
        start = start // VARIANT.vector * VARIANT.vector
    return base + start


@triton.jit
def block_columns(start, VARIANT: tl.constexpr):
    """(lanes, 1) the first column of each vector, (lanes, vector) all columns, of the block that begins at `start`."""
    first = start + tl.arange(0, VARIANT.lanes)[:, None] * VARIANT.vector
    return first, first + tl.arange(0, VARIANT.vector)[None, :]


@triton.jit
def column_offsets(columns, stride_column, VARIANT: tl.constexpr):
    if VARIANT.unit_stride:
        offsets = columns
    else:
        offsets = columns.to(tl.int64) * stride_column
    return offsets


@triton.jit
def column_pointers(interior, start, columns, stride_column, VARIANT: tl.constexpr):
    """The addresses of interior columns `start + columns`.

    `start`, which changes from tile to tile, is added to the scalar base: what the threads add is then the same in
    every tile and for every block but for a constant, which goes into the instruction.
    """
    return interior + column_offsets(start, stride_column, VARIANT) + column_offsets(columns, stride_column, VARIANT)


@triton.jit
def edge_columns(head, columns, V, slice_index, VARIANT: tl.constexpr):
    """(2 * vector,) the columns outside the interior, and which of them exist; they belong to a row's first slice."""
    index = tl.arange(0, 2 * VARIANT.vector)
    before = index < VARIANT.vector
    column = tl.where(before, index, index - VARIANT.vector + head + columns)
    end = tl.where(slice_index == 0, tl.where(before, head, V), 0)
    return column, column < end


@triton.jit
def load_blocks(interior, start, end, stride_column, POLICY: tl.constexpr, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """A tile's blocks, as stored. All loads come before any use or store, so that they are in flight together.

    bfloat16 rows whose interior starts on 16 bytes come as (lanes, vector / 2) words of two columns each: see
    `as_float32`, which every user of a block applies.
    """
    BLOCK: tl.constexpr = VARIANT.lanes * VARIANT.vector
    UNROLL: tl.constexpr = VARIANT.unroll
    PAIRS: tl.constexpr = VARIANT.layout != "any" and interior.dtype.element_ty == tl.bfloat16
    blocks = ()
    for step in tl.static_range(UNROLL):
        first, columns = block_columns(0, VARIANT)
        block_start = start + step * BLOCK
        if PAIRS:
            words = first // 2 + tl.arange(0, VARIANT.vector // 2)[None, :]
            pointers = (interior + block_start).to(tl.pointer_type(tl.int32), bitcast=True) + words
            missing = MINUS_INFINITY_PAIR
        else:
            pointers = column_pointers(interior, block_start, columns, stride_column, VARIANT)
            missing = float("-inf")
        if MASKED:
            # Constant over each vector, because `end` is a multiple of its length: the load stays 16 bytes wide.
            block = tl.load(pointers, mask=block_start + first < end, other=missing, eviction_policy=POLICY)
        else:
            block = tl.load(pointers, eviction_policy=POLICY)
        blocks = blocks + (block,)
    return blocks


@triton.jit
def as_float32(block, VARIANT: tl.constexpr):
    """(lanes, vector) columns of a block as load_blocks returns it.

    The upper half of a word is a float32 but for the lower half's bits: one instruction for either column, where
    converting bfloat16 takes two for every other column.
    """
    if block.dtype == tl.int32:
        lower = (block << 16).to(tl.float32, bitcast=True)
        upper = (block & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(lower, upper), (VARIANT.lanes, VARIANT.vector))
    else:
        x = block.to(tl.float32)
    return x


@triton.jit
def fill_row(row, interior, head, columns, begin, end, V, slice_index, value, stride_column, VARIANT: tl.constexpr):
    """Write `value` to interior columns [begin, end) and, if asked, the edges."""
    BLOCK: tl.constexpr = VARIANT.lanes * VARIANT.vector
    values = tl.full((VARIANT.lanes, VARIANT.vector), value, tl.float32).to(row.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        first, block = block_columns(start, VARIANT)
        tl.store(interior + column_offsets(block, stride_column, VARIANT), values, mask=first < end)
    if VARIANT.edges:
        column, exists = edge_columns(head, columns, V, slice_index, VARIANT)
        edge_values = tl.full((2 * VARIANT.vector,), value, tl.float32).to(row.dtype.element_ty)
        tl.store(row + column_offsets(column, stride_column, VARIANT), edge_values, mask=exists)
