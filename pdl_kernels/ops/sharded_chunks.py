"""The output projection and the loss, chunk by chunk, where every rank of a group has some rows of the weight.

A chunk's all-gather runs while the next chunk's logits are made, so the logits of two chunks exist at a time. What the
ranks have to add up of the gradients is that of the hidden states, once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pdl_kernels.distributed import collectives
from pdl_kernels.distributed.vocabulary import (
    SHARDED,
    Call,
    check_claims,
    dtype_name,
    remember,
)
from pdl_kernels.ops.chunks import Run, Sums, Waiting
from pdl_kernels.ops.cross_entropy import validates
from pdl_kernels.ops.shards import Exchange, Shards, agree, claims_on
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


def make_run(
    inputs: LinearInputs,
    options: LossOptions,
    linear: LinearOptions,
    backend: str,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
    group: str | None,  # its name
) -> Run:
    """One pass over the tokens of one call."""
    if group is None:
        return Run(inputs, options, linear, backend, dtype, needs)
    return ShardedRun(inputs, options, linear, backend, dtype, needs, group)


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
        group: str,
    ) -> None:
        super().__init__(inputs, options, linear, backend, dtype, needs)
        self.device = inputs.hidden.device
        self.result = torch.float64 if dtype == torch.float64 else torch.float32  # of the loss, and what is exchanged
        self.group = collectives.group_of(group)
        self.backend_name = backend
        self.agreed: Tensor | None = None  # () bool, where it is not looked at here
        self.weight_total: Tensor | None = None  # of the whole table, where it is needed

    def _prepare(self) -> None:
        with self._plain_arithmetic():
            call = self._described()
            self.split, known = agree(self.group, call, self.tokens, self.options)
            self.shards = Shards(self.split, self.group, self.options, self.backend_name, gathers_weights=False)
            self.widest = max(self.split.sizes)
            self._check_split(call, known)
            self._take_weights()

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
            dtype_name(self.result),
            self.options.label_smoothing > 0,
            str(more),
        )

    def _check_split(self, call: Call, known: bool) -> None:
        """Whether all ranks take the same for the split, before they take chunks whose sizes follow from it."""
        expected = claims_on(self.split, self.result, self.device)  # (R, 3)
        claims, _ = collectives.all_gather(expected[self.split.rank], self.group)
        if known and not validates(self.tokens.targets):
            self.agreed = (claims == expected).all()
        else:
            check_claims(claims.tolist(), self.split)
            remember(self.group, call, self.split)

    def _take_weights(self) -> None:
        """What the weights say of each target, wherever the rank is that has its column, and the sum of all."""
        weights = self.tokens.weights
        row_weights = None
        if self.split.weights == SHARDED:
            assert weights is not None
            own = self.shards.own_weights(weights, self.tokens.targets).to(self.result)  # (N,)
            total = weights.sum(dtype=self.result)[None]
            both = collectives.all_reduce(torch.cat([own, total]), self.group)
            row_weights, self.weight_total = both[:-1], both[-1]
        elif weights is not None and self.options.label_smoothing > 0:
            self.weight_total = weights.sum(dtype=self.result)
        self.tokens = self.shards.inputs_of(self.tokens, row_weights)

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
