"""Denominators and statistics over all tokens, where ranks have different tokens of one call."""

from __future__ import annotations

import torch
from torch import Tensor

from pdl_kernels.distributed import collectives
from pdl_kernels.options import (
    ACCURACY,
    INVERSE_DENOMINATOR,
    INVERSE_Z_DENOMINATOR,
    NLL,
    WEIGHT_SUM,
    LossInputs,
    LossOptions,
)


def sum_denominators(
    inputs: LossInputs, options: LossOptions, scalars: Tensor, token_count: Tensor, groups: tuple[str, ...]
) -> None:
    """Replace this rank's denominators, sum of weights and number of tokens by those over the groups of these names.

    A rank belongs to each of the groups, as it does to the dimensions of a mesh: the sum over one is summed over the
    next.
    """
    inverse_z = scalars[INVERSE_Z_DENOMINATOR]
    magnitude = torch.where(inverse_z == 0, 0, 1 / inverse_z)  # of "mean" and "token_mean"
    sums = torch.stack([scalars[WEIGHT_SUM].double(), magnitude.double(), token_count.double()])
    for name in groups:
        collectives.all_reduce(sums, collectives.group_of(name))
    scalars[WEIGHT_SUM].copy_(sums[0])
    token_count.copy_(sums[2])
    if inputs.normalizer is None and options.reduction in ("mean", "token_mean"):
        denominator = sums[0] if options.reduction == "mean" else sums[2]
        scalars[INVERSE_DENOMINATOR].copy_(torch.where(denominator == 0, 0, 1 / denominator))
        scalars[INVERSE_Z_DENOMINATOR].copy_(torch.where(sums[1] == 0, 0, 1 / sums[1]))


def sum_statistics(options: LossOptions, scalars: Tensor, groups: tuple[str, ...]) -> None:
    """The same for the mean NLL and the accuracy, which are this rank's sums over the number of all tokens."""
    if not options.return_stats:
        return
    statistics = torch.stack([scalars[NLL], scalars[ACCURACY]])
    for name in groups:
        collectives.all_reduce(statistics, collectives.group_of(name))
    scalars[NLL].copy_(statistics[0])
    scalars[ACCURACY].copy_(statistics[1])


def joined(names: tuple[str, ...]) -> str:
    """What an operator takes for names of groups: torch.jit.trace records no lists of strings."""
    return "\n".join(names)


def split_names(names: str) -> tuple[str, ...]:
    return tuple(names.split("\n")) if names else ()
