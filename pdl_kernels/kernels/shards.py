# mypy: ignore-errors
# Triton's device code is typed by Triton, not by Python.
"""The kernel that merges what the ranks of a group found in their columns of each row.

The kernels of row_kernels.py find it, and form the gradient from what is stored here.
"""

import triton
import triton.language as tl

from pdl_kernels.kernels.constants import LARGEST, LN2
from pdl_kernels.kernels.row_kernels import store_unread_row, store_whole_row
from pdl_kernels.kernels.row_math import contributes, exp_difference, row_factors, transformed
from pdl_kernels.kernels.tiles import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_shards_kernel(
    gathered, totals, targets, row_weights, token_weights, scalars,
    row_loss, row_state, row_stats,
    rows, shards, shard_stride, total_stride, vocab_size,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    SHARDS: tl.constexpr, SHARD_VARIANT: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """A program per row. `gathered` holds an (F, N) tensor of every shard, as options.ShardLayout says.

    SHARDS: the next power of two. SHARD_VARIANT says that weights come by row; VARIANT that results are of the whole.
    """
    row = tl.program_id(0)
    _, _, counted, invalid, target_factor, smoothing_factor, z_factor = row_factors(
        row, targets, row_weights, token_weights, scalars, vocab_size, ignore_index, label_smoothing, z_loss,
        SHARD_VARIANT,
    )  # fmt: skip
    read = contributes(target_factor, smoothing_factor, z_factor)
    if VARIANT.stats:
        read = read | counted
    if read & (invalid == 0):
        index = tl.arange(0, SHARDS)
        exists = index < shards
        first = gathered + index.to(tl.int64) * shard_stride
        shard_max = tl.load(first + row, mask=exists, other=-LARGEST)
        shard_sum = tl.load(first + rows + row, mask=exists, other=0.0)
        # One rank has the column, the others 0.
        x_y = tl.sum(tl.load(first + 2 * rows + row, mask=exists, other=0.0))
        row_max = tl.max(shard_max)
        reference = transformed(row_max, logit_scale, softcap, VARIANT)
        z_max = transformed(shard_max, logit_scale, softcap, VARIANT)
        row_sum = tl.sum(shard_sum * exp_difference(z_max, reference))
        smoothing = 0.0
        if VARIANT.smoothing:
            # sum_j w_j (lse - z_j) = sum_j w_j (m - z_j) + (lse - m) sum_j w_j in the columns of a shard of maximum m.
            distances = tl.load(first + 3 * rows + row, mask=exists, other=0.0)
            weight_total = tl.load(totals + index * total_stride, mask=exists, other=0.0)
            lse_distance = (reference - z_max) + LN2 * tl.math.log2(row_sum)
            smoothing = tl.sum(distances + tl.where(weight_total != 0.0, weight_total * lse_distance, 0.0))
        store_whole_row(
            row, rows, row_loss, row_state, row_stats, row_max, row_sum, x_y,
            target_factor, smoothing_factor, z_factor, smoothing, logit_scale, softcap, VARIANT,
        )  # fmt: skip
    else:
        store_unread_row(row, rows, row_loss, row_state, row_stats, invalid, VARIANT)
