"""The one denominator of a step that is spread over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pdl_kernels.distributed.groups import communication_device
from pdl_kernels.losses import checks
from pdl_kernels.ops.cross_entropy import check_targets


@torch.no_grad()
def global_normalizer(
    targets: Tensor | Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    token_weights: Tensor | Sequence[Tensor] | None = None,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The `normalizer` with which the losses of a step's parts add up to the mean over the whole step.

        D = sum_i w[y_i] |u_i|        over the counted tokens of all given targets on all ranks of the group

    With neither weights nor token weights that is the number of counted tokens: what a table of token-mean 1, as the
    recipes make them, goes with. With both, it is the denominator of reduction="mean" over the whole step.

    Args:
        targets: (...) int32 or int64 class indices, or a sequence of such tensors, of any shapes: the micro-batches
            of this rank that share an optimizer step. A rank may have fewer than others, or none.
        weights: (V,) floating, or None for 1.
        token_weights: (...) floating, of the shape of `targets`; a sequence where they are one. None for 1.
        ignore_index: targets of this value do not count, nor do tokens with a token weight of 0.
        group: the ranks that share the step: those of data and context parallelism, not those that have the same
            tokens. None: all ranks where torch.distributed is initialised, and this process alone where it is not.

    Returns:
        0-d, float64 (float32 on MPS), on the targets' device or, where the group's backend does not take tensors of
        that, on the one it takes. Every rank has to call. Nobody waits for a GPU: it is one collective of one number.

    The parts' losses add up to the mean where gradients are summed over ranks. Where they are averaged, as
    DistributedDataParallel does, multiply each loss by the number of ranks.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices; IndexError: on a CPU, with weights, a target that is neither a
        class nor `ignore_index`. On a GPU such a target adds nothing, and its loss is nan.

    >>> micro_batches = [torch.tensor([[3, 1, -100]]), torch.tensor([[2]])]
    >>> global_normalizer(micro_batches).item()
    3.0

    Source: the definition of D in docs/loss.md.
    """
    parts = [targets] if isinstance(targets, Tensor) else list(targets)
    factors: list[Tensor | None] = [None] * len(parts)
    if token_weights is not None:
        factors = [token_weights] if isinstance(token_weights, Tensor) else list(token_weights)
    if len(factors) != len(parts):
        raise ValueError(f"token_weights are {len(factors)} and targets {len(parts)} tensors; accepted are as many")
    several = group is not None or (dist.is_available() and dist.is_initialized())
    device = parts[0].device if parts else communication_device(group) if several else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for part, u in zip(parts, factors, strict=True):
        total += _sum_of(part, weights, u, ignore_index, total.dtype).to(total)
    if several:
        total = total if _takes(group, device) else total.to(communication_device(group))
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total


def _sum_of(targets: Tensor, weights: Tensor | None, u: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """() sum of w[y_i] |u_i| over the counted tokens of one tensor."""
    checks.check_tensor("targets", targets)
    checks.check_target_dtype(targets)
    checks.check_factors(targets, weights, u, "targets", targets, None)
    y = targets.long()
    counted = y != ignore_index
    if weights is None and u is None:
        return counted.sum()
    magnitudes = counted.to(dtype) if u is None else torch.where(counted, u.to(dtype), 0).abs()
    if weights is not None:
        check_targets(targets, len(weights), ignore_index)
        counted &= (y >= 0) & (y < len(weights))
        magnitudes = torch.where(counted, weights[torch.where(counted, y, 0)].to(dtype) * magnitudes, 0)
    return magnitudes.sum()


def _takes(group: ProcessGroup | None, device: torch.device) -> bool:
    """Whether the group's backend takes tensors of this device."""
    return device.type == communication_device(group).type or dist.get_backend(group) in ("gloo", "mpi", "ucc")
