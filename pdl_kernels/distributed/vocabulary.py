"""How a vocabulary is split over the ranks of a group: what they agree on before they exchange numbers.

Ranks that send each other tensors of different lengths hang or read garbage. So before the first call of a kind, each
tells the others through the group's store, which is no collective and has a timeout, how many columns it has and what
decides how long its messages are. All of them look at the same answers, so that all of them raise the same error.

Later calls take the split from here, by the number of their own columns. Another output layer may give some ranks as
many columns as before and others not, so every message ends with what its sender takes for the split, and all ranks see
whether that fits together.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

NONE, WHOLE, SHARDED = "none", "whole", "sharded"


class Split(NamedTuple):
    """How the columns are split, and what of the weights every rank has."""

    sizes: tuple[int, ...]  # columns of each rank
    rank: int  # in the group
    weights: str  # NONE, WHOLE: the table of all columns, or SHARDED: of its own columns

    @property
    def first(self) -> int:
        """This rank's first column."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)


class Call(NamedTuple):
    """What of a call decides how the ranks' messages look; all but `columns` and `weights` must be equal on them."""

    loss: str
    columns: int  # of the logits
    weights: int | None  # length of the table
    dtype: str  # of the numbers that are exchanged
    label_smoothing: bool
    more: str = ""  # of the loss fused with the output projection


ONE_SPLIT = (
    "accepted is one split for a group, or several where every rank has the same number of columns: make a group of "
    "its own for the other one, with torch.distributed.new_group"
)
FIELDS = {  # of a call, equal on all ranks
    "loss": "the loss",
    "dtype": "what numbers are exchanged in",
    "label_smoothing": "whether there is label smoothing",
    "more": "what decides on the chunks",
}


@dataclass
class _Agreed:
    """What the ranks of a group have agreed on."""

    splits: dict[Call, dict[int, Split]] = field(default_factory=dict)  # by kind of call; by columns of this rank
    exchanges: int = 0  # so far, which every rank counts alike


_groups: WeakKeyDictionary[dist.ProcessGroup, _Agreed] = WeakKeyDictionary()


def agreed_split(group: dist.ProcessGroup, call: Call) -> tuple[Split, bool]:
    """The split, and whether it is known, after an exchange with the other ranks if this is the first call of its kind.

    If there were such calls, but this rank had other numbers of columns in them, an even split is supposed.

    Raises:
        ValueError: on every rank, where they do not fit together.
        RuntimeError: a rank does not come before the store's timeout, which `init_process_group(timeout=...)` sets.
    """
    known = _known(group, call)
    if not known:
        known[call.columns] = split_of(_exchange(group, call), dist.get_rank(group))
    if call.columns in known:
        return known[call.columns], True
    weights = next(iter(known.values())).weights
    return Split((call.columns,) * dist.get_world_size(group), dist.get_rank(group), weights), False


def split_said_again(group: dist.ProcessGroup, call: Call) -> Split:
    """The split by what the ranks say, whatever they have said before. Every rank has to come to it, and waits.

    Raises:
        ValueError: on every rank, where they do not fit together.
    """
    known = _known(group, call).get(call.columns)
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, (tuple(call), known and known.sizes), group)
    split = split_of([Call(*one) for one, _ in said], dist.get_rank(group))
    before = [sizes for _, sizes in said if sizes is not None and sizes != split.sizes]
    if before:
        raise ValueError(
            f"the ranks of the group hold {list(split.sizes)} columns of the logits, and held {list(before[0])} in an "
            f"earlier call, of another output layer; {ONE_SPLIT}"
        )
    remember(group, call, split)
    return split


def remember(group: dist.ProcessGroup, call: Call, split: Split) -> None:
    """For later calls."""
    _known(group, call)[call.columns] = split


def _known(group: dist.ProcessGroup, call: Call) -> dict[int, Split]:
    """The splits of this kind of call: whose messages have one form, equal on all ranks, whatever their columns."""
    weights = -1 if call.weights == call.columns else call.weights
    kind = call._replace(columns=0, weights=weights)
    return _groups.setdefault(group, _Agreed()).splits.setdefault(kind, {})


def claims_of(split: Split) -> list[list[int]]:
    """What each rank says at the end of its messages where all of them take this for the split: its columns, the first
    of them, and of how many."""
    ends = list(accumulate(split.sizes))
    return [[size, end - size, split.vocab_size] for size, end in zip(split.sizes, ends, strict=True)]


def check_claims(claims: list[list[float]], split: Split) -> None:
    """ValueError, the same on every rank, where the ranks do not take the same for the split."""
    sizes = [int(columns) for columns, _, _ in claims]
    if claims != claims_of(split._replace(sizes=tuple(sizes))):
        said = ", ".join(f"{int(first)} to {int(first + columns)} of {int(V)}" for columns, first, V in claims)
        raise ValueError(
            f"the ranks of the group hold {sizes} columns of the logits, and take them for columns {said}: an earlier "
            f"call with this group, of another output layer, split them otherwise; {ONE_SPLIT}"
        )


def split_of(calls: list[Call], rank: int) -> Split:
    """The split of what every rank has said. ValueError, the same on every rank, where it does not fit together."""
    for name, meaning in FIELDS.items():
        said = [getattr(call, name) for call in calls]
        if len(set(said)) > 1:
            raise ValueError(
                f"the ranks of the group call with different arguments: {meaning} is {said} on its ranks 0 to "
                f"{len(said) - 1}; accepted is the same on all"
            )
    sizes = tuple(call.columns for call in calls)
    lengths = [call.weights for call in calls]
    V = sum(sizes)
    if V == 0:
        raise ValueError(
            f"logits have {list(sizes)} columns on the ranks of the group; accepted is one column at least"
        )
    if all(length is None for length in lengths):
        return Split(sizes, rank, NONE)
    if all(length == V for length in lengths):
        return Split(sizes, rank, WHOLE)
    if all(length == size for length, size in zip(lengths, sizes, strict=True)):
        return Split(sizes, rank, SHARDED)
    raise ValueError(
        f"weights have lengths {lengths} on the ranks of the group, and the logits {list(sizes)} columns, {V} in all; "
        f"accepted are the whole table on every rank, ({V},), or the rank's own columns of it on every rank, or None "
        "on every rank"
    )


def even_split(vocab_size: int, group: dist.ProcessGroup, weights: str) -> Split:
    """As DTensor and torch.chunk split: equal parts, rounded up, of which the last ranks have less, or none."""
    ranks = dist.get_world_size(group)
    part = -(-vocab_size // ranks)
    ends = [min(part * (rank + 1), vocab_size) for rank in range(ranks)]
    return Split(
        tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False)), dist.get_rank(group), weights
    )


def _exchange(group: dist.ProcessGroup, mine: Call) -> list[Call]:
    """What each rank of the group says in this round."""
    from torch.distributed import distributed_c10d  # not there in builds of torch without it

    store = distributed_c10d._get_process_group_store(group)
    agreed, rank = _groups[group], dist.get_rank(group)
    keys = [f"pdl_kernels/{agreed.exchanges}/{other}" for other in range(dist.get_world_size(group))]
    members = dist.get_process_group_ranks(group)
    default = distributed_c10d._get_default_store()
    default.set(f"pdl_kernels/group of {dist.get_rank()}", json.dumps(members))
    store.set(keys[rank], json.dumps(mine))
    store.set(f"{keys[rank]} came", "")
    try:
        store.wait(keys)
    except RuntimeError as error:
        with suppress(RuntimeError):  # of stores that cannot
            store.delete_key(keys[rank])  # whoever comes now must not take it for an answer
        missing = [member for member, key in zip(members, keys, strict=True) if not store.check([f"{key} came"])]
        said = "; ".join(f"rank {member} {_whereabouts(default, member)}" for member in missing)
        raise RuntimeError(
            f"{mine.loss} with the group of ranks {members} waited for {_seconds(store)} s for ranks that do "
            f"not call it: {said}"
        ) from error
    agreed.exchanges += 1  # not where a rank was missed: it will come to this one
    return [Call(*json.loads(store.get(key))) for key in keys]


def _whereabouts(default: Any, member: int) -> str:
    key = f"pdl_kernels/group of {member}"
    if not default.check([key]):
        return "has called no loss with a group"
    return f"last asked a group of ranks {json.loads(default.get(key))}"


def _seconds(store: Any) -> int:
    timeout: timedelta = store.timeout
    return round(timeout.total_seconds())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
