"""The mathematics of rows in plain torch: factors, denominators, the transform of the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdl_kernels.options import (
    INVERSE_DENOMINATOR,
    INVERSE_Z_DENOMINATOR,
    SCALARS,
    WEIGHT_SUM,
    WEIGHT_TOTAL,
    LossInputs,
    LossOptions,
)


class Tokens(NamedTuple):
    """Per-token quantities, (N,) each."""

    targets: Tensor  # class indices, 0 where the target is no class; of the whole vocabulary, where that is split
    is_class: Tensor  # bool
    weights: Tensor  # w(y_i)
    token_weights: Tensor  # u_i, 0 where not counted
    counted: Tensor  # bool


class Factors(NamedTuple):
    """What each row's three terms are multiplied by, denominators included, (N,) each."""

    target: Tensor
    smoothing: Tensor
    z: Tensor

    @property
    def active(self) -> Tensor:
        """Whether anything of the row enters the loss; a nan factor does."""
        return (self.target != 0) | (self.smoothing != 0) | (self.z != 0)

    def times(self, upstream: Tensor) -> Factors:
        """The same in the gradient; rows without a share stay 0 under any upstream gradient, inf and nan included."""
        upstream = upstream.to(self.target.dtype)
        return Factors(*(product(factor, upstream) for factor in self))


def tokens_of(inputs: LossInputs, options: LossOptions) -> Tokens:
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
    if inputs.shard is not None:
        if inputs.shard.row_weights is not None:
            weights = torch.where(counted, inputs.shard.row_weights.to(dtype), 0)
    elif inputs.weights is not None:
        weights = torch.where(counted, inputs.weights[targets].to(dtype), 0)
    return Tokens(targets, is_class, weights, token_weights, counted)


def denominators_of(inputs: LossInputs, options: LossOptions, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The scalars, statistics still missing, and the number of counted tokens."""
    magnitudes = tokens.token_weights.abs()
    # A target that is no class makes its own row nan, where it is not refused; the others keep their denominator.
    weight_sum = torch.where(tokens.counted & tokens.is_class, tokens.weights * magnitudes, 0).sum()
    magnitude = magnitudes.sum()
    token_count = tokens.counted.sum()
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
    if options.label_smoothing > 0 and inputs.weights is not None:  # of a shard: of its columns alone
        weight_total = inputs.weights.to(weight_sum.dtype).sum()
    scalars = torch.zeros(len(SCALARS), dtype=weight_sum.dtype, device=weight_sum.device)
    scalars[INVERSE_DENOMINATOR] = torch.where(denominator == 0, 0, 1 / denominator)
    scalars[INVERSE_Z_DENOMINATOR] = torch.where(z_denominator == 0, 0, 1 / z_denominator)
    scalars[WEIGHT_TOTAL] = weight_total
    scalars[WEIGHT_SUM] = weight_sum
    return scalars, token_count


def local_targets(inputs: LossInputs, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """(..., ) the targets as columns of the logits, and whether the logits have them; None: they have all.

    0 stands for columns that another rank has.
    """
    if inputs.shard is None:
        return targets, None
    column = targets - inputs.shard.first
    owned = (column >= 0) & (column < inputs.logits.shape[-1])
    return torch.where(owned, column, 0), owned


def factors_of(inputs: LossInputs, options: LossOptions, tokens: Tokens, scalars: Tensor) -> Factors:
    u, s = tokens.token_weights, options.label_smoothing
    inverse, inverse_z = scalars[INVERSE_DENOMINATOR], scalars[INVERSE_Z_DENOMINATOR]
    # Rows without a share stay 0 whatever the denominator is, inf and nan included.
    target = product(u * tokens.weights * (1 - s), inverse)
    # On a CPU such targets raise an error earlier. On other devices their rows become nan.
    target = torch.where(tokens.counted & ~tokens.is_class, torch.nan, target)
    smoothing = product(u * (s / inputs.vocab_size), inverse)
    z = product(u.abs() * options.z_loss, inverse_z)
    return Factors(target, smoothing, z)


def product(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, and 0 where the factor is 0: 0 * inf never appears."""
    return torch.where(factor != 0, factor * value, 0)


def is_untransformed(options: LossOptions) -> bool:
    return options.logit_scale == 1 and options.softcap is None


def scaled(x: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """logit_scale * x, clamped to the finite range; infinities and nan stay."""
    if options.logit_scale == 1:
        return x.to(dtype)
    z = x.to(dtype)
    limits = torch.finfo(dtype)
    return torch.where(z.isinf(), z, (z * options.logit_scale).clamp(limits.min, limits.max))


def transformed(x: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """The logits z that the loss sees: scaled, then capped. Without either, `x` itself in its own dtype."""
    if options.softcap is not None:
        return torch.tanh(scaled(x, options, dtype) / options.softcap) * options.softcap
    return x if options.logit_scale == 1 else scaled(x, options, dtype)


def transform_derivative(x: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor | float:
    """dz / dx. It starts from x: recovering tanh from z would round where 1 - tanh**2 cancels."""
    if options.softcap is None:
        return options.logit_scale
    ratio = torch.tanh(scaled(x, options, dtype) / options.softcap)
    return (1 - ratio * ratio) * options.logit_scale


def lse_parts(row_max: Tensor, largest: Tensor, options: LossOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(largest z, log sum_j exp(z_j - that)), from the largest x and the largest probability, which is 1 / sum."""
    return transformed(row_max, options, dtype).to(dtype), -largest.log()


def smoothing_sum(weights: Tensor | None, z: Tensor, z_max: Tensor, log_sum: Tensor) -> Tensor:
    """(R,) sum_j w_j (lse - z_j); columns of weight 0 add 0 even where z is -inf."""
    distance = (z_max[:, None] - z) + log_sum[:, None]  # (R, V)
    if weights is None:
        return distance.sum(-1)
    w = weights.to(distance.dtype)
    return torch.where(w != 0, distance * w, 0).sum(-1)
