"""The output projection and the loss, tokens taken in chunks: no more than one chunk's logits exist at a time.

The library's matrix product makes a chunk's logits, the backend's row kernels turn them into the loss and, in the same
memory, into the gradient of the logits, and two more products make its shares of the gradients of hidden states and
weight, which are summed in `accumulate_dtype`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pdl_kernels.backends import backend_module
from pdl_kernels.ops.cross_entropy import check_targets
from pdl_kernels.ops.products import add_product
from pdl_kernels.ops.row_sampling import sample_rows
from pdl_kernels.ops.row_selection import (
    Rows,
    Sampling,
    choose_rows,
    contributing,
    differentiated,
    pack_order,
    row_factors,
)
from pdl_kernels.options import (
    EXPECTED_UPSTREAM,
    INVERSE_DENOMINATOR,
    INVERSE_Z_DENOMINATOR,
    LinearInputs,
    LinearOptions,
    LinearOutputs,
    LossInputs,
    LossOptions,
    RowOutputs,
)

CHUNK_BYTES = 1 << 26  # of logits; more where the weight's gradient is large anyway
CHUNK_ROWS = 128  # fewer leave a matrix unit idle
ROUND_ROWS = 64
ALIGNMENT = 16  # bytes between the starts of rows of logits, so that kernels read them 16 bytes at a time


class Gradients(NamedTuple):
    """Of hidden (M, H), lm_head_weight (V, H) and bias (V,); None for those that nobody needs."""

    hidden: Tensor | None
    lm_head_weight: Tensor | None
    bias: Tensor | None


class Waiting(NamedTuple):
    """Gradients that wait for their upstream gradient, in the dtype in which they were added up."""

    gradients: Gradients
    positions: Tensor | None  # (M,) which token each row of gradients.hidden belongs to; None: every token, in order


def plan_chunk(rows: int, hidden_size: int, vocab_size: int, itemsize: int) -> int:
    """Tokens per chunk, from the shape alone.

    A chunk's logits take at most 64 MiB or a quarter of the weight's float32 gradient, whichever is more, unless 128
    rows take more than that. Chunks are about equally long: a product over few rows costs almost as much as a full one.
    """
    # V H bytes, a quarter of the float32 gradient, over V itemsize bytes a row.
    most = max(CHUNK_BYTES // (vocab_size * itemsize), hidden_size // itemsize, CHUNK_ROWS)
    most -= most % ROUND_ROWS
    chunks = max(-(-rows // most), 1)
    if chunks == 1:
        return max(rows, 1)
    return -(-rows // (chunks * ROUND_ROWS)) * ROUND_ROWS


class Run:
    """One pass over the tokens of one call."""

    buffers = 1  # chunks whose logits exist at a time

    def __init__(
        self,
        inputs: LinearInputs,
        options: LossOptions,
        linear: LinearOptions,
        backend: str,
        dtype: torch.dtype,  # of the products
        needs: tuple[bool, ...],  # gradients of hidden, lm_head_weight, bias
    ) -> None:
        self.inputs = inputs
        self.options = options
        self.linear = linear
        self.backend = backend_module(backend)
        self.dtype = dtype
        self.needs = needs
        self.columns, self.hidden_size = inputs.lm_head_weight.shape  # V, of which another run may have some alone
        self.widest = self.columns  # of all ranks that take the same chunks
        self.accumulate_dtype = torch.promote_types(dtype, linear.accumulate_dtype)
        self.weight = inputs.lm_head_weight.detach().to(dtype)  # (V, H)
        self.bias = None if inputs.bias is None else inputs.bias.detach().to(dtype)  # (V,)
        self.rows = inputs.targets.numel()
        # A stand-in for all logits, one element large: what is asked of it is shape, dtype and device.
        nothing = torch.empty((), dtype=dtype, device=inputs.hidden.device).expand(1, self.rows, self.columns)
        self.tokens = LossInputs(
            nothing,
            inputs.targets.reshape(-1).contiguous(),
            None if inputs.weights is None else inputs.weights.contiguous(),
            None if inputs.token_weights is None else inputs.token_weights.reshape(-1).contiguous(),
            inputs.normalizer,
            inputs.expected_upstream,
        )
        capturing = inputs.hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        self.compact = not capturing if linear.compact is None else linear.compact
        self.sampling = None
        if linear.row_sampling > 0:
            if capturing or not self.compact:
                raise RuntimeError(
                    "row_sampling needs to know how many rows it keeps; accepted are compact=None or True, and no CUDA "
                    "graph capture"
                )
            assert inputs.seed is not None
            self.sampling = Sampling(linear.row_sampling, inputs.seed)

    def forward(self) -> tuple[LinearOutputs, Waiting]:
        """The loss, and the gradients for the expected upstream gradient."""
        self._prepare()
        check_targets(self.inputs.targets, self.tokens.vocab_size, self.options.ignore_index)
        with self._plain_arithmetic():
            return self._pass(*self._denominators())

    def _prepare(self) -> None:
        """What has to be known before tokens are looked at."""

    def _denominators(self) -> tuple[Tensor, Tensor]:
        scalars, token_count = self.backend.denominators(self.tokens, self.options)
        return scalars, token_count

    def gradients_again(self, scalars: Tensor) -> Waiting:
        """The gradients of `forward` once more, from what it found."""
        self._prepare()
        with self._plain_arithmetic():
            return self._pass(scalars.clone(), scalars.new_zeros((), dtype=torch.int64))[1]

    def _pass(self, scalars: Tensor, token_count: Tensor) -> tuple[LinearOutputs, Waiting]:
        """Choose rows, scale them, take them chunk by chunk, and put what was found in its place."""
        per_row = self.options.reduction == "none"
        forms_gradients = any(self.needs) and not per_row
        rows = choose_rows(
            self.tokens, self.options, scalars,
            compact=self.compact, gradients=forms_gradients, sampling=self.sampling,
        )  # fmt: skip
        range_factor = self._range_factor(scalars) if forms_gradients else None
        found, sums = self._run_chunks(rows, forms_gradients, *self._scaled_by(range_factor, scalars))
        if rows.scale is not None:
            found.loss.div_(rows.scale)  # the loss counts every row as it is
        if range_factor is not None:
            found.loss.div_(range_factor)
            sums.divide_by(range_factor)
        waiting = self._waiting(sums, None if rows.positions is None else rows.positions[: rows.backward])
        found = rows.among_all(found, self.rows)
        loss = self.backend.reduce_rows(found, self.options, scalars, token_count)
        if per_row:
            loss = loss.view(self.inputs.targets.shape)
        state = found.state if per_row else scalars.new_empty(2, 0)
        return LinearOutputs(loss, state, scalars, token_count), waiting

    def _waiting(self, sums: "Sums", positions: Tensor | None) -> Waiting:
        return Waiting(sums.gradients, positions)

    def _run_chunks(
        self, rows: Rows, forms_gradients: bool, options: LossOptions, scalars: Tensor
    ) -> tuple[RowOutputs, "Sums"]:
        """What is found for these rows, and the sums of their gradients."""
        tokens, hidden = rows.take(self.tokens, self._hidden_rows())
        hidden = hidden.to(self.dtype)
        end = tokens.targets.numel()
        stats = scalars.new_empty(2, end) if options.return_stats else None
        found = RowOutputs(scalars.new_empty(end), scalars.new_empty(2, end), stats)
        backward_rows = rows.backward if forms_gradients else 0
        sums = Sums(self, backward_rows, self.needs if forms_gradients else (False, False, False))
        chunks = self._chunks(hidden, (0, backward_rows, end) if forms_gradients else (0, end))
        parts = ((chunk, tokens.take(chunk, logits), chunk.start < backward_rows) for chunk, logits in chunks)
        for chunk, part, gradient in self._loss_of_chunks(parts, options, scalars):
            found.loss[chunk] = part.loss
            found.state[:, chunk] = part.state
            if found.stats is not None and part.stats is not None:
                found.stats[:, chunk] = part.stats
            if gradient is not None:
                sums.add(chunk, gradient[0], rows.of_gradient(hidden, chunk))
        return found, sums

    def _loss_of_chunks(
        self, parts: Iterator[tuple[slice, LossInputs, bool]], options: LossOptions, scalars: Tensor
    ) -> Iterator[tuple[slice, RowOutputs, Tensor | None]]:
        """What is found for each chunk, and, where it is asked for, the gradient, in the memory of its logits."""
        for chunk, inputs, forms_gradient in parts:
            gradient = inputs.logits if forms_gradient else None
            yield chunk, self.backend.loss_rows(inputs, options, scalars, gradient), gradient

    def _hidden_rows(self) -> Tensor:
        """(N, H), a copy where the leading dimensions cannot be merged: nobody keeps it longer than its rows."""
        return self.inputs.hidden.detach().reshape(-1, self.hidden_size)

    def backward_rows(self, upstream: Tensor, row_state: Tensor, scalars: Tensor) -> Waiting:
        """The gradients of reduction "none" for an upstream gradient (N,) per row."""
        self._prepare()
        with self._plain_arithmetic():
            upstream = upstream.reshape(-1)
            kept = differentiated(self.tokens, self.options, contributing(self.tokens, self.options))
            if self.sampling is not None:
                factors = row_factors(self.tokens, self.options, scalars) * upstream
                sample = sample_rows(torch.where(kept, factors, 0), *self.sampling)
                kept, upstream = kept & sample.kept, upstream * sample.scale
            rows = Rows(*pack_order(kept, kept)) if self.compact else Rows(None, self.rows, uncounted=~kept)
            tokens, hidden = rows.take(self.tokens, self._hidden_rows())
            hidden = hidden.to(self.dtype)
            if rows.positions is not None:
                upstream, row_state = upstream[rows.positions], row_state[:, rows.positions]
            sums = Sums(self, len(hidden), self.needs)
            for chunk, logits in self._chunks(hidden, (0, len(hidden))):
                inputs = tokens.take(chunk, logits)
                state = row_state[:, chunk].contiguous()
                self.backend.backward(inputs, self.options, state, scalars, upstream[chunk], logits)
                sums.add(chunk, logits[0], hidden[chunk])
            return self._waiting(sums, rows.positions)

    def finish(self, waiting: Waiting, scalars: Tensor, upstream: Tensor | None) -> list[Tensor | None]:
        """Gradients in the parameters' dtypes and shapes, made right for the 0-d `upstream`. The input is used up.

        They were formed for the upstream gradient that `scalars` expects; None: they are right already.
        """
        positions = waiting.positions
        if positions is not None and positions.numel() == 0:
            upstream = None  # 0 * inf must not appear
        finished: list[Tensor | None] = []
        for gradient, parameter in zip(waiting.gradients, self.inputs.parameters, strict=True):
            if gradient is None or parameter is None:
                finished.append(None)
                continue
            if gradient is waiting.gradients.hidden and positions is not None:
                packed = self._finish_one(gradient, parameter.dtype, scalars, upstream)
                gradient = packed.new_zeros(self.rows, self.hidden_size).index_copy_(0, positions, packed)
            else:
                gradient = self._finish_one(gradient, parameter.dtype, scalars, upstream)
            finished.append(gradient.reshape(parameter.shape))
        return finished

    def _finish_one(self, gradient: Tensor, dtype: torch.dtype, scalars: Tensor, upstream: Tensor | None) -> Tensor:
        if upstream is None:
            return gradient.to(dtype)
        if gradient.dtype != dtype:
            factor = upstream / scalars[EXPECTED_UPSTREAM]
            return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
        if gradient.numel() > 0:
            self.backend.scale(gradient.reshape(1, -1, gradient.shape[-1]), scalars, upstream)
        return gradient

    def _range_factor(self, scalars: Tensor) -> Tensor | None:
        """A power of two that brings float16 logit gradients near 1, where they do not underflow; None elsewhere."""
        if self.dtype != torch.float16 or self.rows == 0:
            return None
        factors = row_factors(self.tokens, self.options, scalars)
        counted = contributing(self.tokens, self.options)
        divided = self.options.reduction != "sum"
        largest = torch.where(counted, factors, 0).abs().amax()
        if divided:
            largest = largest * scalars[INVERSE_DENOMINATOR].abs()
        if self.options.z_loss > 0:  # its gradient is 2 z_loss |u| lse p, whatever the weights
            u = counted if self.tokens.token_weights is None else torch.where(counted, self.tokens.token_weights, 0)
            z_term = 2 * self.options.z_loss * u.to(scalars.dtype).abs().amax()
            largest = torch.maximum(largest, z_term * scalars[INVERSE_Z_DENOMINATOR].abs() if divided else z_term)
        largest = largest * scalars[EXPECTED_UPSTREAM].abs()
        usable = (largest > 0) & largest.isfinite()
        exponent = -torch.frexp(torch.where(usable, largest, 1)).exponent
        return torch.ldexp(torch.ones_like(largest), exponent.clamp(-100, 100))

    def _scaled_by(self, factor: Tensor | None, scalars: Tensor) -> tuple[LossOptions, Tensor]:
        """Options and scalars with which the row kernels multiply every row by `factor`."""
        if factor is None:
            return self.options, scalars
        scaled = scalars.clone()
        if self.options.reduction == "sum":  # its kernels apply no denominator
            scaled[INVERSE_DENOMINATOR] = scaled[INVERSE_Z_DENOMINATOR] = factor
        else:
            scaled[INVERSE_DENOMINATOR] *= factor
            scaled[INVERSE_Z_DENOMINATOR] *= factor
        return self.options._replace(reduction="mean"), scaled

    def _chunks(self, hidden: Tensor, bounds: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk of rows and its (1, n, V) logits, in memory that the next chunk, or the one after, overwrites.

        `bounds` are rows at which a chunk must end.
        """
        step = self.linear.chunk_size or plan_chunk(len(hidden), self.hidden_size, self.widest, self.dtype.itemsize)
        vector = max(ALIGNMENT // self.dtype.itemsize, 1)
        longest = min(step, max(end - begin for begin, end in pairwise(bounds)))
        width = -(-self.columns // vector) * vector
        chunks = [
            slice(start, min(start + step, end)) for begin, end in pairwise(bounds) for start in range(begin, end, step)
        ]
        buffers = torch.empty(min(self.buffers, len(chunks)), longest, width, dtype=self.dtype, device=hidden.device)
        for number, chunk in enumerate(chunks):
            logits = buffers[number % self.buffers, : chunk.stop - chunk.start, : self.columns]
            if self.bias is None:
                torch.mm(hidden[chunk], self.weight.T, out=logits)
            else:
                torch.addmm(self.bias, hidden[chunk], self.weight.T, out=logits)
            yield chunk, logits.unsqueeze(0)

    @contextmanager
    def _plain_arithmetic(self) -> Iterator[None]:
        """Neither recorded by autograd nor cast by autocast."""
        with torch.no_grad(), torch.autocast(self.inputs.hidden.device.type, enabled=False):
            yield


class Sums:
    """The gradients while chunks are added to them."""

    def __init__(self, run: Run, rows: int, needs: tuple[bool, ...]) -> None:
        self.run = run
        self.first = True
        make: Callable[..., Tensor] = torch.zeros if rows == 0 else torch.empty
        self.gradients = Gradients(
            *(
                make(shape, dtype=run.accumulate_dtype, device=run.inputs.hidden.device) if needed else None
                for needed, shape in zip(
                    needs,
                    ((rows, run.hidden_size), (run.columns, run.hidden_size), (run.columns,)),
                    strict=True,
                )
            )
        )

    def add(self, chunk: slice, logit_gradient: Tensor, hidden: Tensor) -> None:
        """`logit_gradient` (n, V), `hidden` (n, H)."""
        to_hidden, to_weight, to_bias = self.gradients
        if to_hidden is not None:
            add_product(to_hidden[chunk], logit_gradient, self.run.weight, first=True)
        if to_weight is not None:
            add_product(to_weight, logit_gradient.T, hidden, first=self.first)
        if to_bias is not None:
            column_sums = logit_gradient.sum(0, dtype=to_bias.dtype)
            to_bias.copy_(column_sums) if self.first else to_bias.add_(column_sums)
        self.first = False

    def divide_by(self, factor: Tensor) -> None:
        for gradient in self.gradients:
            if gradient is not None:
                gradient.div_(factor)
