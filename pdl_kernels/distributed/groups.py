"""Sums and extremes of integers over the ranks of a torch.distributed group."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def require(caller: str) -> None:
    """RuntimeError that names `caller` where there are no process groups."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{caller} needs torch.distributed: call torch.distributed.init_process_group first")


def extremes(values: Sequence[int], group: dist.ProcessGroup | None) -> list[tuple[int, int]]:
    """The (smallest, largest) of each value over the ranks, found in one message."""
    mine = torch.tensor(values, device=communication_device(group))
    both = torch.cat([-mine, mine])  # a minimum is the negated maximum of the negated values
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    negated, largest = both.view(2, -1).tolist()
    return [(-low, high) for low, high in zip(negated, largest, strict=True)]


def sums(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The sum over the ranks of each 1-d int64 tensor, as a new CPU tensor, found in one message."""
    everything = torch.cat(list(tensors)).to(communication_device(group))
    dist.all_reduce(everything, dist.ReduceOp.SUM, group)
    return [part.clone() for part in everything.cpu().split([len(tensor) for tensor in tensors])]


def communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """The device whose tensors the group's backend takes; nccl takes only those of the accelerator."""
    if dist.get_backend(group) in ("gloo", "mpi", "ucc", "undefined"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
