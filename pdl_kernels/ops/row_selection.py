"""Which tokens of the loss fused with the output projection take part in which of its products."""

from typing import NamedTuple

import torch
from torch import Tensor

from pdl_kernels.ops.row_sampling import sample_rows
from pdl_kernels.options import WEIGHT_TOTAL, LossInputs, LossOptions, RowOutputs


class Rows(NamedTuple):
    """The M of N tokens that are multiplied by the weight, those of the backward products first."""

    positions: Tensor | None  # (M,) index of each row among the N tokens; None: every token, in order
    backward: int  # so many of them, the first ones, enter the backward products
    scale: Tensor | None = None  # (M,) what the factor of a sampled row is multiplied by
    uncounted: Tensor | None = None  # (N,) bool: tokens that do not count, whose hidden states may hold nan
    without_gradient: Tensor | None = None  # (N,) bool: tokens that the statistics read and that have no gradient

    def take(self, tokens: LossInputs, hidden: Tensor) -> tuple[LossInputs, Tensor]:
        """These rows of the tokens and of the (N, H) hidden states; sampled rows weigh more."""
        u = tokens.token_weights
        if self.positions is None:
            # 0 * nan would carry the nan of an uncounted row into the weight's gradient.
            hidden = hidden if self.uncounted is None else torch.where(self.uncounted[:, None], 0, hidden)
        else:
            tokens = tokens.take(self.positions, tokens.logits[:, : len(self.positions)])
            u = tokens.token_weights
            hidden = hidden[self.positions]
        if self.scale is not None:
            u = self.scale if u is None else u * self.scale
        return tokens._replace(token_weights=u), hidden

    def of_gradient(self, hidden: Tensor, chunk: slice) -> Tensor:
        """The hidden states of one chunk as the gradient of the weight sees them."""
        return (
            hidden[chunk]
            if self.without_gradient is None
            else torch.where(self.without_gradient[chunk, None], 0, hidden[chunk])
        )

    def among_all(self, found: RowOutputs, rows: int) -> RowOutputs:
        """What was found for these rows among all `rows`; 0 for the others."""
        if self.positions is None:
            return found
        loss = found.loss.new_zeros(rows).index_copy_(0, self.positions, found.loss)
        state = found.state.new_zeros(2, rows).index_copy_(1, self.positions, found.state)
        stats = found.stats
        if stats is not None:
            stats = stats.new_zeros(2, rows).index_copy_(1, self.positions, stats)
        return RowOutputs(loss, state, stats)


class Sampling(NamedTuple):
    """How rows are left out of the backward products."""

    share: float  # of the sum of row factors
    seed: Tensor  # 0-d


def choose_rows(
    tokens: LossInputs,
    options: LossOptions,
    scalars: Tensor,
    *,
    compact: bool,
    gradients: bool,
    sampling: Sampling | None,
) -> Rows:
    """The rows of a forward pass that forms `gradients`, or only the loss."""
    read = contributing(tokens, options)
    differentiable = differentiated(tokens, options, read)
    kept, scale = differentiable if gradients else read, None
    if gradients and sampling is not None:
        sample = sample_rows(torch.where(kept, row_factors(tokens, options, scalars), 0), *sampling)
        kept, scale = kept & sample.kept, sample.scale
    if not compact:
        without_gradient = None if differentiable is read else read & ~differentiable
        return Rows(None, tokens.targets.numel(), uncounted=~read, without_gradient=without_gradient)
    positions, backward = pack_order(read, kept)
    return Rows(positions, backward, scale if scale is None or positions is None else scale[positions])


def contributing(tokens: LossInputs, options: LossOptions) -> Tensor:
    """(N,) bool: the rows that must be multiplied by the weight."""
    counted = tokens.targets.long() != options.ignore_index
    if tokens.token_weights is not None:
        counted &= tokens.token_weights != 0
    return counted if options.return_stats else differentiated(tokens, options, counted)


def differentiated(tokens: LossInputs, options: LossOptions, rows: Tensor) -> Tensor:
    """(N,) bool: those of `rows` whose gradient may differ from 0. `rows` itself where that is all of them."""
    if not _weighted(tokens) or options.label_smoothing > 0 or options.z_loss > 0:
        return rows
    is_class, w = _target_weights(tokens)
    return rows & (~is_class | (w != 0))


def row_factors(tokens: LossInputs, options: LossOptions, scalars: Tensor) -> Tensor:
    """(N,) u_i [(1 - s) w(y_i) + s / V sum_j w_j], without the denominator."""
    s, V = options.label_smoothing, tokens.vocab_size
    ones = scalars.new_ones(tokens.targets.numel())
    w = _target_weights(tokens)[1].to(scalars.dtype) if _weighted(tokens) else ones
    factors = (1 - s) * w
    if s > 0:
        factors = factors + s / V * scalars[WEIGHT_TOTAL]
    return factors if tokens.token_weights is None else factors * tokens.token_weights.to(scalars.dtype)


def _weighted(tokens: LossInputs) -> bool:
    return tokens.weights is not None if tokens.shard is None else tokens.shard.row_weights is not None


def _target_weights(tokens: LossInputs) -> tuple[Tensor, Tensor]:
    """(N,) whether the target is a class, and the class's weight."""
    y = tokens.targets.long()
    is_class = (y >= 0) & (y < tokens.vocab_size)
    if tokens.shard is not None and tokens.shard.row_weights is not None:
        return is_class, tokens.shard.row_weights
    assert tokens.weights is not None
    return is_class, tokens.weights[torch.where(is_class, y, 0)]


def pack_order(read: Tensor, kept: Tensor) -> tuple[Tensor | None, int]:
    """The positions of the rows that are read, the kept ones first, and how many are kept. None: every row is kept.

    It reads two numbers back from the device, at once.
    """
    kept_rows, read_rows = torch.stack([kept.sum(), read.sum()]).tolist()
    if kept_rows == len(kept):
        return None, kept_rows
    order = torch.where(kept, 0, torch.where(read, 1, 2)).argsort(stable=True)
    return order[:read_rows], kept_rows
