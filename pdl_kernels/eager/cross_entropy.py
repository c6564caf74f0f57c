"""The loss on logits in plain torch.

Rows are processed in pieces whose softmax fits in cache, so that nothing of size (N, V) in float32 is ever held. On CPU
rows that contribute nothing are left out; on other devices, where finding them would wait for the device, they are
replaced by zeros before any arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from pdl_kernels.options import (
    ACCURACY,
    EXPECTED_UPSTREAM,
    INVERSE_DENOMINATOR,
    INVERSE_Z_DENOMINATOR,
    NLL,
    SCALARS,
    WEIGHT_SUM,
    WEIGHT_TOTAL,
    LossInputs,
    LossOptions,
    LossOutputs,
    RowOutputs,
)

# One piece's softmax. On CPU a few megabytes beat both single rows and whole tensors; elsewhere it only bounds memory.
CPU_PIECE_BYTES = 1 << 21
DEVICE_PIECE_BYTES = 1 << 26


class _Rows(NamedTuple):
    """Per-token quantities, (N,) each."""

    targets: Tensor  # class indices, 0 where the target is no class
    is_class: Tensor  # bool
    weights: Tensor  # w(y_i)
    token_weights: Tensor  # u_i, 0 where not counted
    counted: Tensor  # bool


class _Factors(NamedTuple):
    """What each row's three terms are multiplied by, denominators included, (N,) each."""

    target: Tensor
    smoothing: Tensor
    z: Tensor

    @property
    def active(self) -> Tensor:
        """Whether anything of the row enters the loss; a nan factor does."""
        return (self.target != 0) | (self.smoothing != 0) | (self.z != 0)

    def times(self, upstream: Tensor) -> _Factors:
        """The same in the gradient; rows without a share stay 0 under any upstream gradient, inf and nan included."""
        upstream = upstream.to(self.target.dtype)
        return _Factors(*(_product(factor, upstream) for factor in self))


@dataclass(frozen=True)
class _Piece:
    """Some rows of the logits; `index` selects them from tensors of N rows."""

    index: slice | Tensor
    logits: Tensor  # (R, V)


P = ParamSpec("P")
R = TypeVar("R")


def _plain_arithmetic(function: Callable[P, R]) -> Callable[P, R]:
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


@_plain_arithmetic
def forward(inputs: LossInputs, options: LossOptions, gradient: Tensor | None) -> LossOutputs:
    """The loss, and its gradient for the expected upstream gradient written to `gradient` where one is given."""
    scalars, token_count = denominators(inputs, options)
    rows = loss_rows(inputs, options, scalars, gradient)
    loss = reduce_rows(rows, options, scalars, token_count)
    return LossOutputs(loss, rows.state, scalars, token_count)


@_plain_arithmetic
def denominators(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """`LossOutputs.scalars`, statistics still missing, and the number of counted tokens. No logit is read."""
    scalars, token_count = _denominators(inputs, options, _rows(inputs, options))
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


@_plain_arithmetic
def loss_rows(inputs: LossInputs, options: LossOptions, scalars: Tensor, gradient: Tensor | None) -> RowOutputs:
    """Each row's loss, and the gradient for the expected upstream gradient written to `gradient` where one is given.

    `gradient` may be the logits themselves.
    """
    rows = _rows(inputs, options)
    factors = _factors(inputs, options, rows, scalars)
    dtype = scalars.dtype
    read = factors.active | rows.counted if options.return_stats else factors.active
    # What a few numbers per row decide is computed for all rows at once: a piece's arithmetic takes as long as some
    # fifty small operations.
    x_y = torch.where(read, _target_logits(inputs, rows), 0)  # before a gradient is written over them
    row_max = x_y.new_zeros(inputs.rows)
    largest = scalars.new_ones(inputs.rows)  # probability of the row
    smoothing_sums = scalars.new_zeros(inputs.rows) if options.label_smoothing > 0 else None
    gradient_factors = factors
    if gradient is not None:
        _zero_rows(gradient, read, inputs)
        gradient_factors = factors.times(scalars[EXPECTED_UPSTREAM])
    buffers = _Buffers(inputs, options, dtype)
    for piece in _pieces(inputs, read):
        z, p = buffers.fill(piece.logits)  # (R, V) each
        # The transform is increasing, so that the raw logits decide which column is largest.
        row_max[piece.index] = (z if _is_plain(options) else piece.logits).amax(-1).to(x_y.dtype)
        largest[piece.index] = p.amax(-1)
        lse = None
        if smoothing_sums is not None or options.z_loss > 0:
            z_max, log_sum = _lse_parts(row_max[piece.index], largest[piece.index], options, dtype)
            lse = z_max + log_sum
            if smoothing_sums is not None:
                smoothing_sums[piece.index] = _smoothing_sum(inputs.weights, z, z_max, log_sum)
        if gradient is not None:
            _write_gradient(gradient, piece, inputs, options, rows, gradient_factors, scalars, p, lse)

    z_max, log_sum = _lse_parts(row_max, largest, options, dtype)
    # (max - z_y) + log(sum), not lse - z_y: no cancellation under a large common offset.
    cross_entropy = (z_max - _transformed(x_y, options, dtype)) + log_sum
    row_loss = _product(factors.target, cross_entropy)
    if smoothing_sums is not None:
        row_loss += _product(factors.smoothing, smoothing_sums)
    if options.z_loss > 0:
        row_loss += _product(factors.z, (z_max + log_sum).square())
    row_stats = None
    if options.return_stats:
        hits = rows.counted & (x_y >= row_max)
        nll = torch.where(rows.counted, torch.where(rows.is_class, cross_entropy, torch.nan), 0)
        row_stats = torch.stack((nll, hits.to(dtype)))
    return RowOutputs(row_loss, torch.stack((row_max.to(dtype), 1 / largest)), row_stats)


def _target_logits(inputs: LossInputs, rows: _Rows) -> Tensor:
    """(N,) x[i, y_i]."""
    logits = inputs.logits
    return logits.gather(2, rows.targets.view(*logits.shape[:2], 1)).flatten()


def _lse_parts(row_max: Tensor, largest: Tensor, options: LossOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(largest z, log sum_j exp(z_j - that)), from the largest x and the largest probability, which is 1 / sum."""
    return _transformed(row_max, options, dtype).to(dtype), -largest.log()


@_plain_arithmetic
def reduce_rows(rows: RowOutputs, options: LossOptions, scalars: Tensor, token_count: Tensor) -> Tensor:
    """The loss, (N,) for "none" and 0-d otherwise; the statistics go to `scalars`."""
    if rows.stats is not None:
        counted_tokens = token_count.clamp(min=1)
        scalars[NLL] = rows.stats[0].sum() / counted_tokens
        scalars[ACCURACY] = rows.stats[1].sum() / counted_tokens
    return rows.loss if options.reduction == "none" else rows.loss.sum()


@_plain_arithmetic
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
    if unless_expected and _is_expected(upstream, scalars):
        return
    rows = _rows(inputs, options)
    factors = _factors(inputs, options, rows, scalars).times(upstream)
    active = factors.active
    _zero_rows(gradient, active, inputs)
    buffers = _Buffers(inputs, options, scalars.dtype)
    lse = _transformed(row_state[0], options, scalars.dtype) + row_state[1].log()
    for piece in _pieces(inputs, active):
        _, p = buffers.fill(piece.logits)
        _write_gradient(gradient, piece, inputs, options, rows, factors, scalars, p, lse[piece.index])


@_plain_arithmetic
def scale(gradient: Tensor, scalars: Tensor, upstream: Tensor) -> None:
    """Multiply a (rows_outer, rows_inner, V) gradient, formed for what `scalars` expects, for the 0-d `upstream`."""
    if _is_expected(upstream, scalars):
        return
    factor = upstream / scalars[EXPECTED_UPSTREAM]
    if upstream.device.type == "cpu" and factor.isfinite():
        gradient.mul_(factor)
        return
    for block in gradient.unbind(0):  # (rows_inner, V) each
        for piece in block.split(_piece_rows(gradient)):  # no temporary of the gradient's size
            # 0 * inf must not appear: ignored rows stay exactly 0 under any upstream gradient.
            # And float16 holds no factor from 65520 on.
            piece.copy_(torch.where(piece == 0, 0, piece.to(factor.dtype) * factor))


def _is_expected(upstream: Tensor, scalars: Tensor) -> bool:
    """Whether they are known to be equal; reading them waits for nothing on a CPU."""
    return upstream.device.type == "cpu" and upstream.item() == scalars[EXPECTED_UPSTREAM].item()


# ---------------------------------------------------------------------------------------------------------------------
# Rows and pieces of them


def _rows(inputs: LossInputs, options: LossOptions) -> _Rows:
    dtype = torch.float64 if inputs.logits.dtype == torch.float64 else torch.float32
    y = inputs.targets.long()  # before it is compared: torch wraps ignore_index to the dtype of the targets
    is_class = (y >= 0) & (y < inputs.vocab_size)
    counted = y != options.ignore_index
    if inputs.token_weights is None:
        token_weights = counted.to(dtype)
    else:
        u = inputs.token_weights.to(dtype)
        counted &= u != 0
        token_weights = torch.where(counted, u, 0)
    targets = torch.where(is_class, y, 0)
    weights = torch.ones_like(token_weights)
    if inputs.weights is not None:
        weights = torch.where(counted, inputs.weights[targets].to(dtype), 0)
    return _Rows(targets, is_class, weights, token_weights, counted)


def _denominators(inputs: LossInputs, options: LossOptions, rows: _Rows) -> tuple[Tensor, Tensor]:
    """The scalars, statistics still missing, and the number of counted tokens."""
    magnitudes = rows.token_weights.abs()
    # A target that is no class makes its own row nan, where it is not refused; the others keep their denominator.
    weight_sum = torch.where(rows.counted & rows.is_class, rows.weights * magnitudes, 0).sum()
    magnitude = magnitudes.sum()
    token_count = rows.counted.sum()
    one = torch.ones_like(weight_sum)
    denominator, z_denominator = {
        "mean": (weight_sum, magnitude),
        "token_mean": (token_count.to(weight_sum.dtype), magnitude),
        "sum": (one, one),
        "none": (one, one),
    }[options.reduction]
    if inputs.normalizer is not None:
        if isinstance(inputs.normalizer, Tensor):
            denominator = inputs.normalizer.to(one.dtype)
        else:
            denominator = torch.full_like(one, inputs.normalizer)  # as_tensor would wait for the device
        z_denominator = denominator
    weight_total = one * inputs.vocab_size
    if options.label_smoothing > 0 and inputs.weights is not None:
        weight_total = inputs.weights.to(weight_sum.dtype).sum()
    scalars = torch.zeros(len(SCALARS), dtype=weight_sum.dtype, device=weight_sum.device)
    scalars[INVERSE_DENOMINATOR] = torch.where(denominator == 0, 0, 1 / denominator)
    scalars[INVERSE_Z_DENOMINATOR] = torch.where(z_denominator == 0, 0, 1 / z_denominator)
    scalars[WEIGHT_TOTAL] = weight_total
    scalars[WEIGHT_SUM] = weight_sum
    return scalars, token_count


def _factors(inputs: LossInputs, options: LossOptions, rows: _Rows, scalars: Tensor) -> _Factors:
    u, s = rows.token_weights, options.label_smoothing
    inverse, inverse_z = scalars[INVERSE_DENOMINATOR], scalars[INVERSE_Z_DENOMINATOR]
    # Rows without a share stay 0 whatever the denominator is, inf and nan included.
    target = _product(u * rows.weights * (1 - s), inverse)
    # Never true on CPU, where such a target is refused; elsewhere its row is nan.
    target = torch.where(rows.counted & ~rows.is_class, torch.nan, target)
    smoothing = _product(u * (s / inputs.vocab_size), inverse)
    z = _product(u.abs() * options.z_loss, inverse_z)
    return _Factors(target, smoothing, z)


def _product(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, and 0 where the factor is 0: 0 * inf never appears."""
    return torch.where(factor != 0, factor * value, 0)


def _piece_rows(logits: Tensor) -> int:
    piece_bytes = CPU_PIECE_BYTES if logits.device.type == "cpu" else DEVICE_PIECE_BYTES
    return max(1, piece_bytes // (4 * max(logits.shape[-1], 1)))


class _Buffers:
    """One piece's logits and softmax, allocated once: fresh pages for every piece cost as much as the arithmetic."""

    def __init__(self, inputs: LossInputs, options: LossOptions, dtype: torch.dtype) -> None:
        shape = min(_piece_rows(inputs.logits), inputs.rows), inputs.vocab_size
        self.options = options
        self.p = torch.empty(shape, dtype=dtype, device=inputs.logits.device)
        converts = _is_plain(options) and inputs.logits.dtype != dtype
        self.z = torch.empty_like(self.p) if converts else None

    def fill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z, the (R, V) logits that the loss sees, and their softmax."""
        rows = x.shape[0]
        z = _transformed(x, self.options, self.p.dtype) if self.z is None else self.z[:rows].copy_(x)
        return z, torch.softmax(z, dim=-1, out=self.p[:rows])


def _pieces(inputs: LossInputs, read: Tensor) -> Iterator[_Piece]:
    logits = inputs.logits
    size = _piece_rows(logits)
    if logits.device.type != "cpu":
        for start in range(0, inputs.rows, size):
            index = slice(start, min(start + size, inputs.rows))
            piece_logits = _take_rows(logits, index)
            yield _Piece(index, torch.where(read[index, None], piece_logits, 0))
        return
    rows = None if bool(read.all()) else read.nonzero()[:, 0]
    for start in range(0, inputs.rows if rows is None else rows.numel(), size):
        if rows is None:
            index = slice(start, min(start + size, inputs.rows))
            yield _Piece(index, _take_rows(logits, index))
            continue
        chosen = rows[start : start + size]
        first, last = int(chosen[0]), int(chosen[-1])
        if last - first + 1 == chosen.numel():
            yield _Piece(slice(first, last + 1), _take_rows(logits, slice(first, last + 1)))
        else:
            yield _Piece(chosen, _take_rows(logits, chosen))


def _take_rows(tensor: Tensor, index: slice | Tensor) -> Tensor:
    """(R, V) rows of a (rows_outer, rows_inner, V) tensor: a view where the rows allow one."""
    rows_outer, rows_inner, _ = tensor.shape
    if rows_outer == 1:
        return tensor[0, index]
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=tensor.device)
    return tensor[index // rows_inner, index % rows_inner]


def _zero_rows(gradient: Tensor, written: Tensor, inputs: LossInputs) -> None:
    """Rows that no piece writes have a gradient of exactly 0."""
    if gradient.device.type != "cpu" or bool(written.all()):
        return
    rows = (~written).nonzero()[:, 0]
    rows_inner = gradient.shape[1]
    gradient[rows // rows_inner, rows % rows_inner] = 0


def _is_plain(options: LossOptions) -> bool:
    return options.logit_scale == 1 and options.softcap is None


def _scaled(x: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """logit_scale * x, clamped to the finite range; infinities and nan stay."""
    if options.logit_scale == 1:
        return x.to(dtype)
    z = x.to(dtype)
    limits = torch.finfo(dtype)
    return torch.where(z.isinf(), z, (z * options.logit_scale).clamp(limits.min, limits.max))


def _transformed(x: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """The logits z that the loss sees: scaled, then capped. Without either, `x` itself in its own dtype."""
    if options.softcap is not None:
        return torch.tanh(_scaled(x, options, dtype) / options.softcap) * options.softcap
    return x if options.logit_scale == 1 else _scaled(x, options, dtype)


def _transform_derivative(x: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor | float:
    """dz / dx. It starts from x: recovering tanh from z would round where 1 - tanh**2 cancels."""
    if options.softcap is None:
        return options.logit_scale
    ratio = torch.tanh(_scaled(x, options, dtype) / options.softcap)
    return (1 - ratio * ratio) * options.logit_scale


def _smoothing_sum(weights: Tensor | None, z: Tensor, z_max: Tensor, log_sum: Tensor) -> Tensor:
    """(R,) sum_j w_j (lse - z_j); columns of weight 0 add 0 even where z is -inf."""
    distance = (z_max[:, None] - z) + log_sum[:, None]  # (R, V)
    if weights is None:
        return distance.sum(-1)
    w = weights.to(distance.dtype)
    return torch.where(w != 0, distance * w, 0).sum(-1)


def _write_gradient(
    gradient: Tensor,  # (rows_outer, rows_inner, V)
    piece: _Piece,
    inputs: LossInputs,
    options: LossOptions,
    rows: _Rows,
    factors: _Factors,
    scalars: Tensor,
    p: Tensor,  # (R, V) softmax, overwritten
    lse: Tensor | None,  # (R,), for smoothing or z_loss
) -> None:
    """dL/dz_j = (target + spread) p_j - smoothing w_j - [j == y] target, then the derivative of the transform."""
    y = rows.targets[piece.index, None]  # (R, 1)
    target = factors.target[piece.index, None]  # (R, 1)
    p_y = p.gather(1, y)  # (R, 1)
    g_y = (p_y - 1) * target
    scale = target
    if lse is not None and (options.label_smoothing > 0 or options.z_loss > 0):
        spread = 2 * _product(factors.z[piece.index], lse) + factors.smoothing[piece.index] * scalars[WEIGHT_TOTAL]
        scale = target + spread[:, None]
        g_y += spread[:, None] * p_y
    # Written once, straight into place, where nothing but the scale is left to apply.
    in_rows = isinstance(piece.index, slice) and gradient.shape[0] == 1
    straight = in_rows and _is_plain(options) and options.label_smoothing == 0 and gradient.dtype == p.dtype
    out = gradient[0, piece.index] if straight else p
    torch.mul(p, scale, out=out)
    if options.label_smoothing > 0:
        smoothing = factors.smoothing[piece.index, None]  # (R, 1)
        w = p.new_ones(p.shape[-1]) if inputs.weights is None else inputs.weights.to(p.dtype)
        out -= smoothing * w
        g_y -= smoothing * w[y]
    out.scatter_(1, y, g_y.to(out.dtype))
    if not _is_plain(options):
        out *= _transform_derivative(piece.logits, options, p.dtype)
    # Rows read for the statistics alone may hold nan, which 0 * nan would keep.
    if options.return_stats or gradient.device.type != "cpu":
        out.masked_fill_(~factors.active[piece.index, None], 0)
    if not straight:
        _put_rows(gradient, piece.index, out)


def _put_rows(gradient: Tensor, index: slice | Tensor, values: Tensor) -> None:
    rows_outer, rows_inner, _ = gradient.shape
    if rows_outer == 1 and isinstance(index, slice):
        gradient[0, index] = values
        return
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=gradient.device)
    gradient[index // rows_inner, index % rows_inner] = values.to(gradient.dtype)
