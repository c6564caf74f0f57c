"""The loss on logits in plain torch where every rank has some of the columns: what the ranks exchange, and the merge.

Backward is `cross_entropy.backward`, which takes the merged state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdl_kernels.eager.cross_entropy import plain_arithmetic, row_outputs
from pdl_kernels.eager.pieces import Buffers, pieces_of
from pdl_kernels.eager.row_math import Tokens, factors_of, local_targets, product, smoothing_sum, tokens_of, transformed
from pdl_kernels.options import LossInputs, LossOptions, RowOutputs, ShardLayout


@plain_arithmetic
def shard_rows(inputs: LossInputs, options: LossOptions, layout: ShardLayout, found: Tensor) -> None:
    """Write what is found of each row in these columns to `found`, (F, N), laid out by `layout`, but for weights."""
    dtype = found.dtype
    lowest = torch.finfo(dtype).min
    found.zero_()
    found[layout.row_max] = lowest
    tokens = tokens_of(inputs, options)
    columns, owned = local_targets(inputs, tokens.targets)
    assert owned is not None
    owned = owned & tokens.is_class & tokens.counted
    if inputs.logits.shape[-1] == 0:
        return
    buffers = Buffers(inputs, options, dtype)
    for piece in pieces_of(inputs, _read(tokens, options)):
        row_max = piece.logits.amax(-1).to(dtype).clamp_min(lowest)  # (R,); columns of -inf alone have a sum of 0
        reference = transformed(row_max, options, dtype)
        z, exps = buffers.fill_relative(piece.logits, reference)  # (R, V) each
        found[layout.row_max, piece.index] = row_max
        found[layout.row_sum, piece.index] = exps.sum(-1)
        x_y = piece.logits.gather(1, columns[piece.index, None])[:, 0].to(dtype)
        found[layout.target_logit, piece.index] = torch.where(owned[piece.index], x_y, 0)
        if layout.smoothing is not None:
            nothing = torch.zeros_like(reference)
            found[layout.smoothing, piece.index] = smoothing_sum(inputs.weights, z, reference, nothing)


def _read(tokens: Tokens, options: LossOptions) -> Tensor:
    """(N,) bool: the rows that may enter the loss or the statistics."""
    read = tokens.counted & tokens.is_class
    if options.return_stats or options.label_smoothing > 0 or options.z_loss > 0:
        return read
    return read & (tokens.weights != 0)


@plain_arithmetic
def merge_shards(
    inputs: LossInputs,
    options: LossOptions,
    scalars: Tensor,
    layout: ShardLayout,
    gathered: Tensor,  # (R, F, N): what `shard_rows` found on each of R ranks
    totals: Tensor | None,  # (R,) sum of the weights of each rank's columns, for label smoothing
) -> RowOutputs:
    """Each row's loss, state and statistics in the whole vocabulary."""
    dtype = scalars.dtype
    tokens = tokens_of(inputs, options)
    factors = factors_of(inputs, options, tokens, scalars)
    read = _read(tokens, options)
    maxima = gathered[:, layout.row_max]  # (R, N)
    row_max = torch.where(read, maxima.amax(0), 0)
    z_max = transformed(row_max, options, dtype)
    references = transformed(maxima, options, dtype)  # (R, N)
    row_sum = (gathered[:, layout.row_sum] * torch.exp(references - z_max)).sum(0)
    row_sum = torch.where(read, row_sum, 1)
    log_sum = row_sum.log()
    smoothing_sums = None
    if layout.smoothing is not None:
        assert totals is not None
        # sum_j w_j (lse - z_j) = sum_j w_j (m - z_j) + (lse - m) sum_j w_j in the columns of a rank with maximum m.
        distances = product(totals[:, None], (z_max - references) + log_sum)  # (R, N)
        smoothing_sums = torch.where(read, (gathered[:, layout.smoothing] + distances).sum(0), 0)
    x_y = torch.where(read, gathered[:, layout.target_logit].sum(0), 0)  # one rank has the column, the others 0
    row_state = torch.stack((row_max, row_sum))
    return row_outputs(options, tokens, factors, x_y, row_state, z_max, log_sum, smoothing_sums)
