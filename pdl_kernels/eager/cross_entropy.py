"""The loss on logits in plain torch.

Rows are processed in pieces whose softmax fits in cache, so that nothing of size (N, V) in float32 is ever held. On a
CPU, rows that contribute nothing are left out. On other devices, where finding them would wait for the device, they are
replaced by zeros before any arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pdl_kernels.eager.pieces import Buffers, Piece, piece_rows, pieces_of, put_rows, target_logits, zero_rows
from pdl_kernels.eager.row_math import (
    Factors,
    Tokens,
    denominators_of,
    factors_of,
    is_untransformed,
    local_targets,
    lse_parts,
    product,
    smoothing_sum,
    tokens_of,
    transform_derivative,
    transformed,
)
from pdl_kernels.options import (
    ACCURACY,
    EXPECTED_UPSTREAM,
    NLL,
    WEIGHT_TOTAL,
    LossInputs,
    LossOptions,
    LossOutputs,
    RowOutputs,
)

P = ParamSpec("P")
R = TypeVar("R")


def plain_arithmetic(function: Callable[P, R]) -> Callable[P, R]:
    """Neither recorded by autograd nor cast by autocast. The first argument says on which device."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        first: Any = arguments[0]
        device = first.device if isinstance(first, Tensor) else first[0].device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(*arguments, **options)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The six functions that both backends have


@plain_arithmetic
def forward(inputs: LossInputs, options: LossOptions, gradient: Tensor | None) -> LossOutputs:
    """The loss, and its gradient for the expected upstream gradient written to `gradient` where one is given."""
    scalars, token_count = denominators(inputs, options)
    rows = loss_rows(inputs, options, scalars, gradient)
    loss = reduce_rows(rows, options, scalars, token_count)
    return LossOutputs(loss, rows.state, scalars, token_count)


@plain_arithmetic
def denominators(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """`LossOutputs.scalars`, statistics still missing, and the number of counted tokens. No logit is read."""
    scalars, token_count = denominators_of(inputs, options, tokens_of(inputs, options))
    expected = inputs.expected_upstream
    limits = torch.finfo(torch.float32)  # of what can be divided by; nan is outside of them
    if isinstance(expected, float):
        usable = limits.smallest_normal <= abs(expected) <= limits.max
        scalars[EXPECTED_UPSTREAM].fill_(expected if usable else 1)  # an assignment would wait for a GPU
    else:
        expected = expected.to(scalars.dtype)
        in_range = (expected.abs() >= limits.smallest_normal) & (expected.abs() <= limits.max)
        scalars[EXPECTED_UPSTREAM].copy_(torch.where(in_range, expected, 1))
    return scalars, token_count


@plain_arithmetic
def loss_rows(inputs: LossInputs, options: LossOptions, scalars: Tensor, gradient: Tensor | None) -> RowOutputs:
    """Each row's loss, and the gradient for the expected upstream gradient written to `gradient` where one is given.

    `gradient` may be the logits themselves.
    """
    tokens = tokens_of(inputs, options)
    factors = factors_of(inputs, options, tokens, scalars)
    dtype = scalars.dtype
    read = factors.active | tokens.counted if options.return_stats else factors.active
    # What a few numbers per row decide is computed for all rows at once: a piece's arithmetic takes as long as some
    # fifty small operations.
    x_y = torch.where(read, target_logits(inputs, tokens), 0)  # before a gradient is written over them
    row_max = x_y.new_zeros(len(inputs.targets))
    largest = scalars.new_ones(len(inputs.targets))  # probability of the row
    smoothing_sums = scalars.new_zeros(len(inputs.targets)) if options.label_smoothing > 0 else None
    gradient_factors = factors
    if gradient is not None:
        zero_rows(gradient, read)
        gradient_factors = factors.times(scalars[EXPECTED_UPSTREAM])
    buffers = Buffers(inputs, options, dtype)
    for piece in pieces_of(inputs, read):
        z, p = buffers.fill(piece.logits)  # (R, V) each
        # The transform is increasing, so that the raw logits decide which column is largest.
        row_max[piece.index] = (z if is_untransformed(options) else piece.logits).amax(-1).to(x_y.dtype)
        largest[piece.index] = p.amax(-1)
        lse = None
        if smoothing_sums is not None or options.z_loss > 0:
            z_max, log_sum = lse_parts(row_max[piece.index], largest[piece.index], options, dtype)
            lse = z_max + log_sum
            if smoothing_sums is not None:
                smoothing_sums[piece.index] = smoothing_sum(inputs.weights, z, z_max, log_sum)
        if gradient is not None:
            _write_gradient(gradient, piece, inputs, options, tokens, gradient_factors, scalars, p, lse)

    z_max, log_sum = lse_parts(row_max, largest, options, dtype)
    row_state = torch.stack((row_max.to(dtype), 1 / largest))
    return row_outputs(options, tokens, factors, x_y, row_state, z_max, log_sum, smoothing_sums)


def row_outputs(
    options: LossOptions,
    tokens: Tokens,
    factors: Factors,
    x_y: Tensor,  # (N,) raw logits of the targets
    row_state: Tensor,  # (2, N)
    z_max: Tensor,  # (N,) largest logit, transformed
    log_sum: Tensor,  # (N,) log sum_j exp(z_j - z_max)
    smoothing_sums: Tensor | None,  # (N,) sum_j w_j (lse - z_j)
) -> RowOutputs:
    """Each row's loss and statistics from what was found in its logits."""
    # (max - z_y) + log(sum), not lse - z_y: no cancellation under a large common offset.
    cross_entropy = (z_max - transformed(x_y, options, z_max.dtype)) + log_sum
    row_loss = product(factors.target, cross_entropy)
    if smoothing_sums is not None:
        row_loss += product(factors.smoothing, smoothing_sums)
    if options.z_loss > 0:
        row_loss += product(factors.z, (z_max + log_sum).square())
    row_stats = None
    if options.return_stats:
        hits = tokens.counted & (x_y >= row_state[0])
        nll = torch.where(tokens.counted, torch.where(tokens.is_class, cross_entropy, torch.nan), 0)
        row_stats = torch.stack((nll, hits.to(z_max.dtype)))
    return RowOutputs(row_loss, row_state, row_stats)


@plain_arithmetic
def reduce_rows(rows: RowOutputs, options: LossOptions, scalars: Tensor, token_count: Tensor) -> Tensor:
    """The loss, (N,) for "none" and 0-d otherwise; the statistics go to `scalars`."""
    if rows.stats is not None:
        counted_tokens = token_count.clamp(min=1)
        scalars[NLL] = rows.stats[0].sum() / counted_tokens
        scalars[ACCURACY] = rows.stats[1].sum() / counted_tokens
    return rows.loss if options.reduction == "none" else rows.loss.sum()


@plain_arithmetic
def backward(
    inputs: LossInputs,
    options: LossOptions,
    row_state: Tensor,
    scalars: Tensor,
    upstream: Tensor,
    gradient: Tensor,
    *,
    unless_expected: bool = False,
) -> None:
    """Write the gradient for `upstream`, (N,) with any stride or 0-d, to `gradient`.

    With `unless_expected` it already holds the one for the upstream gradient that `scalars` expects, and is left alone
    if they are equal, where that can be known without waiting for a device. One rounding either way, and float16
    gradients that need loss scaling do not underflow before they are scaled.
    """
    if gradient.numel() == 0 or (unless_expected and _is_expected(upstream, scalars)):
        return
    tokens = tokens_of(inputs, options)
    factors = factors_of(inputs, options, tokens, scalars).times(upstream)
    active = factors.active
    zero_rows(gradient, active)
    buffers = Buffers(inputs, options, scalars.dtype)
    reference = transformed(row_state[0], options, scalars.dtype)
    lse = reference + row_state[1].log()
    for piece in pieces_of(inputs, active):
        if inputs.shard is None:
            _, p = buffers.fill(piece.logits)
        else:
            _, p = buffers.fill_relative(piece.logits, reference[piece.index])
            p /= row_state[1][piece.index, None]
        _write_gradient(gradient, piece, inputs, options, tokens, factors, scalars, p, lse[piece.index])


@plain_arithmetic
def scale(gradient: Tensor, scalars: Tensor, upstream: Tensor) -> None:
    """Multiply a (rows_outer, rows_inner, V) gradient, formed for what `scalars` expects, for the 0-d `upstream`."""
    if _is_expected(upstream, scalars):
        return
    factor = upstream / scalars[EXPECTED_UPSTREAM]
    if upstream.device.type == "cpu" and factor.isfinite():
        gradient.mul_(factor)
        return
    for block in gradient.unbind(0):  # (rows_inner, V) each
        for piece in block.split(piece_rows(gradient)):  # no temporary of the gradient's size
            # 0 * inf must not appear: ignored rows stay exactly 0 under any upstream gradient.
            # And float16 holds no factor from 65520 on.
            piece.copy_(torch.where(piece == 0, 0, piece.to(factor.dtype) * factor))


def _is_expected(upstream: Tensor, scalars: Tensor) -> bool:
    """Whether they are known to be equal; reading them waits for nothing on a CPU."""
    return upstream.device.type == "cpu" and upstream.item() == scalars[EXPECTED_UPSTREAM].item()


def _write_gradient(
    gradient: Tensor,  # (rows_outer, rows_inner, V)
    piece: Piece,
    inputs: LossInputs,
    options: LossOptions,
    tokens: Tokens,
    factors: Factors,
    scalars: Tensor,
    p: Tensor,  # (R, V) softmax, overwritten
    lse: Tensor | None,  # (R,), for smoothing or z_loss
) -> None:
    """dL/dz_j = (target + common) p_j - smoothing w_j - [j == y] target, then the derivative of the transform."""
    y, owned = local_targets(inputs, tokens.targets[piece.index, None])  # (R, 1)
    target = factors.target[piece.index, None]  # (R, 1)
    p_y = p.gather(1, y)  # (R, 1)
    g_y = (p_y - 1) * target
    scale = target
    if lse is not None and (options.label_smoothing > 0 or options.z_loss > 0):
        common = 2 * product(factors.z[piece.index], lse) + factors.smoothing[piece.index] * scalars[WEIGHT_TOTAL]
        scale = target + common[:, None]
        g_y += common[:, None] * p_y
    # Written once, straight into place, where nothing but the scale is left to apply.
    in_rows = isinstance(piece.index, slice) and gradient.shape[0] == 1
    straight = in_rows and is_untransformed(options) and options.label_smoothing == 0 and gradient.dtype == p.dtype
    out = gradient[0, piece.index] if straight else p
    torch.mul(p, scale, out=out)
    if options.label_smoothing > 0:
        smoothing = factors.smoothing[piece.index, None]  # (R, 1)
        w = p.new_ones(p.shape[-1]) if inputs.weights is None else inputs.weights.to(p.dtype)
        out -= smoothing * w
        g_y -= smoothing * w[y]
    if owned is not None:
        g_y = torch.where(owned, g_y, out.gather(1, y))
    out.scatter_(1, y, g_y.to(out.dtype))
    if not is_untransformed(options):
        out *= transform_derivative(piece.logits, options, p.dtype)
    # Rows read for the statistics alone may hold nan, which 0 * nan would keep.
    if options.return_stats or gradient.device.type != "cpu":
        out.masked_fill_(~factors.active[piece.index, None], 0)
    if not straight:
        put_rows(gradient, piece.index, out)
