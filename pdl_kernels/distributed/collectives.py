"""What the losses send between the ranks of a group: every collective of a forward or backward is called here."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has renamed them.
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def all_gather(mine: Tensor, group: dist.ProcessGroup, *, wait: bool = True) -> tuple[Tensor, Any]:
    """(R, *mine.shape): `mine` of every rank, and the work to wait for if `wait` is false, else None."""
    size = dist.get_world_size(group)
    if size == 1:
        return mine.unsqueeze(0), None
    gathered = mine.new_empty(size * mine.numel())  # flat: gloo takes no stack
    work = _gather(gathered, mine.reshape(-1), group=group, async_op=not wait)
    return gathered.view(size, *mine.shape), None if wait else work


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `tensor` over the ranks, in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along dimension 0 and as long as the others', of the sum of `tensor` over the ranks."""
    size = dist.get_world_size(group)
    if size == 1:
        return tensor
    part = tensor.new_empty(tensor.shape[0] // size, *tensor.shape[1:])
    _scatter(part, tensor.contiguous(), dist.ReduceOp.SUM, group)
    return part


def name_of(group: dist.ProcessGroup) -> str:
    """What an operator takes for a group."""
    return str(group.group_name)


def group_of(name: str) -> dist.ProcessGroup:
    """The group of this name in this process."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
