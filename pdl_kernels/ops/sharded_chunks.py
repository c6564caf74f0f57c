"""The output projection and the loss, chunk by chunk, where every rank of a group has some rows of the weight.

A chunk's all-gather runs while the next chunk's logits are made, so the logits of two chunks exist at a time. What the
ranks have to add up of the gradients is that of the hidden states, once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_kernels.distributed import collectives
from pdl_kernels.distributed.vocabulary import (
    SHARDED,
    Call,
    Split,
    agreed_split,
    check_claims,
    claims_of,
    dtype_name,
    remember,
)
from pdl_kernels.ops.chunks import Run, Sums, Waiting
from pdl_kernels.ops.cross_entropy import validates
from pdl_kernels.ops.shards import Exchange, Shards
from pdl_kernels.options import (
    EXPECTED_UPSTREAM,
    WEIGHT_TOTAL,
    LinearInputs,
    LinearOptions,
    LossInputs,
    LossOptions,
    RowOutputs,
)

NAME = "pdl_linear_cross_entropy(..., group=...)"


class Sharding(NamedTuple):
    """How a call is spread over a group."""

    group: str  # its name
    sizes: tuple[int, ...] = ()  # rows of the weight on each rank; none: the ranks agree on them
    weights: str = ""  # vocabulary.NONE, WHOLE or SHARDED, where the sizes are known


def make_run(
    inputs: LinearInputs,
    options: LossOptions,
    linear: LinearOptions,
    backend: str,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
    sharding: Sharding | None,
) -> Run:
    """One pass over the tokens of one call."""
    if sharding is None:
        return Run(inputs, options, linear, backend, dtype, needs)
    return ShardedRun(inputs, options, linear, backend, dtype, needs, sharding)


class ShardedRun(Run):
    """Of which this rank has some of the columns, and every rank takes the same chunks."""

    buffers = 2

    def __init__(
        self,
        inputs: LinearInputs,
        options: LossOptions,
        linear: LinearOptions,
        backend: str,
        dtype: torch.dtype,
        needs: tuple[bool, ...],
        sharding: Sharding,
    ) -> None:
        super().__init__(inputs, options, linear, backend, dtype, needs)
        self.sharding = sharding
        self.group = collectives.group_of(sharding.group)
        self.call = self._described()
        if sharding.sizes:
            split, self.known = Split(sharding.sizes, dist.get_rank(self.group), sharding.weights), True
        else:
            split, self.known = agreed_split(self.group, self.call)
        self.widest = max(split.sizes)
        self.split = split
        self.shards = Shards(split, self.group, options, backend, gathers_weights=False)
        self.agreed: Tensor | None = None  # () bool, where it is not looked at here
        self.weight_total: Tensor | None = None  # of the whole table, where it is needed

    def _prepare(self) -> None:
        with self._plain_arithmetic():
            self.tokens, self.weight_total = self._whole_tokens()

    def _described(self) -> Call:
        weights = self.inputs.weights
        more = (
            self.hidden_size, self.linear.chunk_size, self.linear.compact, dtype_name(self.accumulate_dtype),
            dtype_name(self.dtype), self.options.reduction == "none", self.linear.sequence_parallel,
        )  # fmt: skip
        return Call(
            NAME,
            self.columns,
            None if weights is None else len(weights),
            dtype_name(torch.float64 if self.dtype == torch.float64 else torch.float32),
            self.options.label_smoothing > 0,
            str(more),
        )

    def _whole_tokens(self) -> tuple[LossInputs, Tensor | None]:
        """The tokens as every rank sees them, and the sum of all weights: from one exchange before any product."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        device = self.inputs.hidden.device
        claim = torch.tensor(claims_of(self.split)[self.split.rank], dtype=dtype, device=device)
        claims, _ = collectives.all_gather(claim, self.group)
        if self.sharding.sizes:
            pass
        elif self.known and not validates(self.tokens.targets):
            self.agreed = (claims == claims.new_tensor(claims_of(self.split))).all()
        else:
            check_claims(claims.tolist(), self.split)
            remember(self.group, self.call, self.split)
        weights, total = self.tokens.weights, None
        tokens = self.shards.inputs_of(self.tokens)
        if self.split.weights == SHARDED:
            assert weights is not None
            own = self.shards.own_weights(weights, self.tokens.targets).to(dtype)  # (N,)
            both = collectives.all_reduce(torch.cat([own, weights.sum(dtype=dtype)[None]]), self.group)
            tokens, total = self.shards.inputs_of(self.tokens, both[:-1]), both[-1]
        elif weights is not None and self.options.label_smoothing > 0:
            total = weights.sum(dtype=dtype)
        return tokens, total

    def _denominators(self) -> tuple[Tensor, Tensor]:
        scalars, token_count = super()._denominators()
        if self.weight_total is not None:
            scalars[WEIGHT_TOTAL].copy_(self.weight_total)
        return scalars, token_count

    def _hidden_rows(self) -> Tensor:
        """(N, H), of all ranks where each has a part."""
        hidden = self.inputs.hidden.detach()
        if self.linear.sequence_parallel:
            hidden, _ = collectives.all_gather(hidden, self.group)  # (R, S / R, ..., H)
        return hidden.reshape(-1, self.hidden_size)

    def _loss_of_chunks(
        self, parts: Iterator[tuple[slice, LossInputs, bool]], options: LossOptions, scalars: Tensor
    ) -> Iterator[tuple[slice, RowOutputs, Tensor | None]]:
        def finish(
            chunk: slice, inputs: LossInputs, differentiated: bool, exchange: Exchange
        ) -> tuple[slice, RowOutputs, Tensor | None]:
            exchanged = exchange.wait()
            if self.agreed is not None:
                self.shards.spoil(exchanged, self.agreed)
            found = self.shards.merge(inputs, options, scalars, exchanged)
            if not differentiated:
                return chunk, found, None
            gradient = inputs.logits
            self.backend.backward(inputs, options, found.state, scalars, scalars[EXPECTED_UPSTREAM], gradient)
            return chunk, found, gradient

        under_way: Any = None
        for chunk, inputs, differentiated in parts:
            exchange = self.shards.start_exchange(inputs, wait=False)
            if under_way is not None:
                yield finish(*under_way)
            under_way = chunk, inputs, differentiated, exchange
        if under_way is not None:
            yield finish(*under_way)

    def _waiting(self, sums: Sums, positions: Tensor | None) -> Waiting:
        """The gradient of the hidden states is the sum of what every rank's columns say."""
        to_hidden = sums.gradients.hidden
        if to_hidden is None:
            return super()._waiting(sums, positions)
        if self.linear.sequence_parallel:
            if positions is not None:
                to_hidden = to_hidden.new_zeros(self.rows, self.hidden_size).index_copy_(0, positions, to_hidden)
                positions = None
            to_hidden = collectives.reduce_scatter(to_hidden, self.group)
        else:
            collectives.all_reduce(to_hidden, self.group)
        return Waiting(sums.gradients._replace(hidden=to_hidden), positions)
