"""Whether the ranks of a group have the same, and errors that all of them raise where one of them fails.

Here a group of None is this process alone: nothing is sent, and torch.distributed need not be initialised. Otherwise
every rank of the group has to call; one that does not keeps the others waiting until the group's timeout.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_kernels.distributed import groups

NAMED = 4  # ranks in a message, at most; of the rest it says how many there are
DESCRIPTION = 200  # characters of a value in a message, at most


class Fingerprint(NamedTuple):
    """What ranks send each other in place of a value."""

    description: str  # for people
    digest: str  # SHA-256 of its bytes


ABSENT = Fingerprint("none", "")


def check_equal(caller: str, values: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise on every rank of the group where they do not all have the same values.

    Tensors are the same where dtype, shape and every bit are, whatever their device and strides, so that nan equals
    itself; other values where their `repr` is. Ranks send each other a few kilobytes, however long the tensors are.

    Args:
        caller: for messages, what is being done.
        values: by the names that they have in messages. None is a value, and so is a name that a rank lacks.

    Raises:
        ValueError: on every rank of the group. It names the values, and the ranks, by their global numbers, that have
            others than the majority; where there is no majority, others than the group's first rank.
        RuntimeError, TypeError: see `together`.
    """
    if group is None:
        return
    with together(caller, group):
        mine = {name: _fingerprint(value) for name, value in values.items()}
    found = _gather(mine, group)
    names = dict.fromkeys(name for fingerprints in found.values() for name in fingerprints)
    differences = [
        f"{name} ({difference})"
        for name in names
        if (difference := _difference({rank: held.get(name, ABSENT) for rank, held in found.items()}))
    ]
    if differences:
        raise ValueError(
            f"{caller}: the ranks of the group do not have the same {', '.join(differences)}; accepted is the same on "
            "every rank"
        )


@contextmanager
def together(caller: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """A block that every rank of the group leaves with an error, at its end, where one of them does.

    A rank whose block raises gets that exception. The block itself may not wait for other ranks.

    Raises:
        RuntimeError: another rank's block has raised; names the rank, by its global number, and its error. Or
            torch.distributed is not initialised.
        ValueError: this process is not in the group.
        TypeError: `group` is no group.
    """
    if group is None:
        yield
        return
    _check_group(caller, group)
    try:
        yield
    except Exception as error:
        _gather(f"{type(error).__name__}: {error}", group)
        raise
    failed = [f"on rank {rank}: {reason}" for rank, reason in _gather(None, group).items() if reason is not None]
    if failed:
        raise RuntimeError(f"{caller} failed {_enumerate(failed, '; ')}")


def is_first(group: dist.ProcessGroup | None) -> bool:
    """Whether this process does what one rank of the group does for all."""
    return group is None or dist.get_rank(group) == 0


def _check_group(caller: str, group: Any) -> None:
    groups.require(caller)
    outside = dist.GroupMember.NON_GROUP_MEMBER  # what torch.distributed.new_group gives ranks that are not in it
    if group != outside and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; accepted is a torch.distributed.ProcessGroup, such as "
            "torch.distributed.group.WORLD or mesh.get_group(), or None for this process alone"
        )
    if group == outside or dist.get_rank(group) < 0:
        raise ValueError(f"group does not hold this process, rank {dist.get_rank()}; accepted are groups that do")


def _gather(mine: Any, group: dist.ProcessGroup) -> dict[int, Any]:
    """What each rank gives, by global rank number, in the group's order."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (dist.get_rank(), mine), group)
    return dict(found)


def _fingerprint(value: Any) -> Fingerprint:
    if value is None:
        return ABSENT
    if isinstance(value, Tensor):
        description = f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        content: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        description = repr(value)
        content = description.encode()
        if len(description) > DESCRIPTION:
            description = f"{description[: DESCRIPTION - 3]}..."
    return Fingerprint(description, hashlib.sha256(content).hexdigest())


def _difference(found: Mapping[int, Fingerprint]) -> str:
    """What most ranks have, or the first where no value has a majority, and who has something else; "" for nobody."""
    first = next(iter(found))
    usual, ranks = Counter(found.values()).most_common(1)[0]
    whose = "most ranks"
    if 2 * ranks <= len(found):
        usual, whose = found[first], f"rank {first}"
    others = [
        f"{'other values' if mine.description == usual.description else mine.description} on rank {rank}"
        for rank, mine in found.items()
        if mine != usual
    ]
    return f"{usual.description} on {whose}, {_enumerate(others, ', ')}" if others else ""


def _enumerate(texts: Sequence[str], separator: str) -> str:
    more = len(texts) - NAMED
    return separator.join(texts[:NAMED]) + (f" and {more} more" if more > 0 else "")
