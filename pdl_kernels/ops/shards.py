"""One pass over logits of which every rank of a group has some columns: what both sharded losses are made of.

Each rank looks at its own columns, one all-gather tells every rank what the others found, and each forms the same loss.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_kernels import backends
from pdl_kernels.distributed import collectives
from pdl_kernels.distributed.equality import check_equal
from pdl_kernels.distributed.vocabulary import (
    SHARDED,
    WHOLE,
    Call,
    Split,
    agreed_split,
    check_claims,
    claims_of,
    split_said_again,
)
from pdl_kernels.ops.cross_entropy import asked_to_validate
from pdl_kernels.options import WEIGHT_TOTAL, LossInputs, LossOptions, RowOutputs, Shard, ShardLayout


class Exchanged(NamedTuple):
    """What the ranks have told each other."""

    gathered: Tensor  # (R, F, N)
    totals: Tensor | None  # (R,) sum of the weights of each rank's columns, for label smoothing
    claims: Tensor  # (R, 3) what each takes for the split


@dataclass
class Exchange:
    """An all-gather on its way."""

    numbers: Tensor  # (R, F * N + 3 or 4)
    work: Any
    shape: tuple[int, int]  # (F, N)

    def wait(self) -> Exchanged:
        if self.work is not None:
            self.work.wait()
        F, N = self.shape
        gathered = self.numbers[:, : F * N].view(len(self.numbers), F, N)
        totals = self.numbers[:, F * N + 3] if self.numbers.shape[1] > F * N + 3 else None
        return Exchanged(gathered, totals, self.numbers[:, F * N : F * N + 3])


class Shards:
    """The part of the whole that this rank has, and how it talks to the others."""

    def __init__(
        self,
        split: Split,
        group: dist.ProcessGroup,
        options: LossOptions,
        backend: str,
        *,
        gathers_weights: bool = True,  # w(y_i) too, where each rank has those of its own columns
    ) -> None:
        self.split = split
        self.group = group
        self.options = options
        self.backend: ModuleType = backends.backend_module(backend)
        self.module: ModuleType = backends.shards_module(backend)
        smoothing = options.label_smoothing > 0
        self.layout = ShardLayout.of(smoothing=smoothing, row_weights=gathers_weights and split.weights == SHARDED)

    def inputs_of(self, inputs: LossInputs, row_weights: Tensor | None = None) -> LossInputs:
        """The same as backends take it: what the weights say of each target, and of this rank's columns."""
        split, weights = self.split, inputs.weights
        if split.weights == WHOLE:
            assert weights is not None
            if row_weights is None:
                row_weights = _weights_of(weights, inputs.targets)
            weights = weights[split.first : split.first + split.size]
        return inputs._replace(weights=weights, shard=Shard(split.first, split.vocab_size, row_weights))

    def start_exchange(self, inputs: LossInputs, *, wait: bool = True) -> Exchange:
        """Look at this rank's columns of the logits, and send the others what was found."""
        F, N = self.layout.numbers, inputs.targets.numel()
        dtype = torch.float64 if inputs.logits.dtype == torch.float64 else torch.float32
        smoothing = self.layout.smoothing is not None
        mine = torch.empty(F * N + 3 + smoothing, dtype=dtype, device=inputs.targets.device)
        found = mine[: F * N].view(F, N)
        self.module.shard_rows(inputs, self.options, self.layout, found)
        if self.layout.row_weights is not None:
            assert inputs.weights is not None
            found[self.layout.row_weights] = self.own_weights(inputs.weights, inputs.targets)
        mine[F * N : F * N + 3] = claims_on(self.split, dtype, mine.device)[self.split.rank]
        if smoothing:
            if inputs.weights is None:
                mine[-1].fill_(self.split.size)
            else:
                torch.sum(inputs.weights, 0, dtype=dtype, out=mine[-1])
        return Exchange(*collectives.all_gather(mine, self.group, wait=wait), (F, N))

    def own_weights(self, weights: Tensor, targets: Tensor) -> Tensor:
        """(N,) w(y_i), 0 where another rank has the column, or none."""
        if len(weights) == 0:
            return torch.zeros_like(targets)
        columns = targets - self.split.first
        owned = (columns >= 0) & (columns < len(weights))
        return torch.where(owned, weights[torch.where(owned, columns, 0)], 0)

    def check(self, exchanged: Exchanged) -> None:
        """ValueError, on every rank, where they do not take the same for the split. It waits for the device."""
        check_claims(exchanged.claims.tolist(), self.split)

    def spoil_unless_agreed(self, exchanged: Exchanged) -> None:
        """The same without waiting: losses and gradients become nan."""
        claims = exchanged.claims
        self.spoil(exchanged, (claims == claims_on(self.split, claims.dtype, claims.device)).all())

    def spoil(self, exchanged: Exchanged, agreed: Tensor) -> None:
        """Make losses and gradients nan unless `agreed`, () bool."""
        exchanged.gathered[0, self.layout.row_sum].add_(torch.where(agreed, 0.0, torch.nan))

    def with_row_weights(self, inputs: LossInputs, exchanged: Exchanged) -> LossInputs:
        """With the weights of the targets, where each rank had only those of its own columns."""
        place = self.layout.row_weights
        if place is None:
            return inputs
        assert inputs.shard is not None
        # One rank has the column, the others sent 0.
        return inputs._replace(shard=inputs.shard._replace(row_weights=exchanged.gathered[:, place].sum(0)))

    def denominators(self, inputs: LossInputs, totals: Tensor | None) -> tuple[Tensor, Tensor]:
        """As the backend's, of the whole vocabulary."""
        scalars, token_count = self.backend.denominators(inputs, self.options)
        if totals is not None:
            torch.sum(totals, 0, out=scalars[WEIGHT_TOTAL])
        return scalars, token_count

    def merge(self, inputs: LossInputs, options: LossOptions, scalars: Tensor, exchanged: Exchanged) -> RowOutputs:
        """What is known of each row in the whole vocabulary. The options may have another reduction."""
        gathered, totals, _ = exchanged
        found: RowOutputs = self.module.merge_shards(inputs, options, scalars, self.layout, gathered, totals)
        return found


def agree(group: dist.ProcessGroup, call: Call, inputs: LossInputs, options: LossOptions) -> tuple[Split, bool]:
    """The split, and whether it is known before the ranks' first message.

    With PDL_KERNELS_VALIDATE=1 the ranks first compare all that must be the same on them, at each call.
    """
    if not asked_to_validate():
        return agreed_split(group, call)
    same = {"targets": inputs.targets, "token_weights": inputs.token_weights, "options": options}
    check_equal(call.loss, same, group)
    return split_said_again(group, call), True


def _weights_of(weights: Tensor, targets: Tensor) -> Tensor:
    """(N,) w(y_i), and of class 0 where a target is no class; nobody asks for it there."""
    return weights[torch.where((targets >= 0) & (targets < len(weights)), targets, 0)]


@functools.lru_cache(maxsize=64)
def claims_on(split: Split, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(R, 3) `claims_of`, kept: a CUDA graph cannot record a copy from the host."""
    return torch.tensor(claims_of(split), dtype=dtype, device=device)
