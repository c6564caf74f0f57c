"""The output projection and the loss, tokens taken in chunks: no more than one chunk's logits exist at a time.

The library's matrix product makes a chunk's logits, the backend's row kernels turn them into the loss and, in the same
memory, into the gradient of the logits, and two more products make its shares of the gradients of hidden states and
weight, which are summed in `accumulate_dtype`.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pdl_kernels.backends import backend_module
from pdl_kernels.ops.cross_entropy import check_targets
from pdl_kernels.ops.products import add_product
from pdl_kernels.ops.row_sampling import sample_rows
from pdl_kernels.options import (
    EXPECTED_UPSTREAM,
    INVERSE_DENOMINATOR,
    INVERSE_Z_DENOMINATOR,
    WEIGHT_TOTAL,
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
        self.vocab_size, self.hidden_size = inputs.lm_head_weight.shape
        wide = torch.promote_types(dtype, linear.accumulate_dtype)
        self.accumulate_dtype = wide
        self.weight = inputs.lm_head_weight.detach().to(dtype)  # (V, H)
        self.bias = None if inputs.bias is None else inputs.bias.detach().to(dtype)  # (V,)
        capturing = inputs.hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        self.compact = not capturing if linear.compact is None else linear.compact
        if linear.row_sampling > 0 and (capturing or not self.compact):
            raise RuntimeError(
                "row_sampling needs to know how many rows it keeps; accepted are compact=None or True, and no CUDA "
                "graph capture"
            )
        # A stand-in for all logits, one element large: what is asked of it is shape, dtype and device.
        rows = inputs.targets.numel()
        nothing = torch.empty((), dtype=dtype, device=inputs.hidden.device).expand(1, rows, self.vocab_size)
        self.tokens = LossInputs(
            nothing,
            inputs.targets.reshape(-1).contiguous(),
            None if inputs.weights is None else inputs.weights.contiguous(),
            None if inputs.token_weights is None else inputs.token_weights.reshape(-1).contiguous(),
            None,
        )

    def forward(
        self, normalizer: Tensor | float | None, expected_upstream: Tensor | float = 1.0
    ) -> tuple[LinearOutputs, Gradients, Tensor | None]:
        """The loss; the gradients for the expected upstream gradient, of the rows in the third result (None: all)."""
        check_targets(self.inputs.targets, self.vocab_size, self.options.ignore_index)
        with torch.no_grad(), torch.autocast(self.inputs.hidden.device.type, enabled=False):
            tokens = self.tokens._replace(normalizer=normalizer, expected_upstream=expected_upstream)
            scalars, token_count = self.backend.denominators(tokens, self.options)
            return self._forward(scalars, token_count)

    def gradients_again(self, scalars: Tensor) -> tuple[Gradients, Tensor | None]:
        """The gradients of `forward` once more, from what it found."""
        with torch.no_grad(), torch.autocast(self.inputs.hidden.device.type, enabled=False):
            _, gradients, index = self._forward(scalars.clone(), scalars.new_zeros((), dtype=torch.int64))
            return gradients, index

    def _forward(self, scalars: Tensor, token_count: Tensor) -> tuple[LinearOutputs, Gradients, Tensor | None]:
        per_row = self.options.reduction == "none"
        forms_gradients = any(self.needs) and not per_row
        contributing = self._contributing()
        differentiated = self._differentiated(contributing)
        scale, kept = None, differentiated if forms_gradients else contributing
        if forms_gradients and self.linear.row_sampling > 0:
            assert self.inputs.seed is not None
            factors = torch.where(kept, self._row_factors(scalars), 0)
            sample = sample_rows(factors, self.linear.row_sampling, self.inputs.seed)
            scale, kept = sample.scale, sample.kept & kept
        index, backward_rows = self._pack(contributing, kept)
        tokens, hidden = self._take(index, contributing)
        # Without packing, rows that only the statistics need are among those of the backward products.
        only_read = None if self.compact or differentiated is contributing else contributing & ~differentiated
        if scale is not None:
            scale = scale if index is None else scale[index]
            u = torch.ones_like(scale) if tokens.token_weights is None else tokens.token_weights
            tokens = tokens._replace(token_weights=u * scale)

        rows = tokens.rows
        step = self.linear.chunk_size or plan_chunk(rows, self.hidden_size, self.vocab_size, self.dtype.itemsize)
        range_factor = self._range_factor(scalars, tokens) if forms_gradients else None
        row_options, row_scalars = self.options, scalars
        if range_factor is not None:
            row_options, row_scalars = self._scaled_by(range_factor, scalars)
        total = RowOutputs(
            scalars.new_empty(rows),
            scalars.new_empty(2, rows),
            scalars.new_empty(2, rows) if self.options.return_stats else None,
        )
        sums = _Sums(self, backward_rows if forms_gradients else 0)
        for chunk, logits in self._chunks(hidden, step, (0, backward_rows, rows) if forms_gradients else (0, rows)):
            with_gradient = forms_gradients and chunk.start < backward_rows
            found = self.backend.loss_rows(
                _rows_of(tokens, chunk, logits), row_options, row_scalars, logits if with_gradient else None
            )
            total.loss[chunk] = found.loss
            total.state[:, chunk] = found.state
            if total.stats is not None:
                total.stats[:, chunk] = found.stats
            if with_gradient:
                rows_of_hidden = hidden[chunk]
                if only_read is not None:
                    rows_of_hidden = torch.where(only_read[chunk, None], 0, rows_of_hidden)
                sums.add(chunk, logits[0], rows_of_hidden)
        if scale is not None:
            total.loss.div_(scale)  # the loss counts every row as it is
        if range_factor is not None:
            total.loss.div_(range_factor)
            sums.divide_by(range_factor)
        if index is not None:
            total = self._spread(total, index)
        loss = self.backend.reduce_rows(total, self.options, scalars, token_count)
        if per_row:
            loss = loss.view(self.inputs.targets.shape)
        state = total.state if per_row else scalars.new_empty(2, 0)
        index = index if index is None else index[:backward_rows]
        return LinearOutputs(loss, state, scalars, token_count), sums.gradients, index

    def backward_rows(self, upstream: Tensor, row_state: Tensor, scalars: Tensor) -> tuple[Gradients, Tensor | None]:
        """The gradients of reduction "none" for an upstream gradient (N,) per row."""
        with torch.no_grad(), torch.autocast(self.inputs.hidden.device.type, enabled=False):
            upstream = upstream.reshape(-1)
            kept = self._differentiated(self._contributing())
            if self.linear.row_sampling > 0:
                assert self.inputs.seed is not None
                factors = torch.where(kept, self._row_factors(scalars) * upstream, 0)
                sample = sample_rows(factors, self.linear.row_sampling, self.inputs.seed)
                kept, upstream = kept & sample.kept, upstream * sample.scale
            index, _ = self._pack(kept, kept)
            tokens, hidden = self._take(index, kept)
            if index is not None:
                upstream, row_state = upstream[index], row_state[:, index]
            rows = tokens.rows
            step = self.linear.chunk_size or plan_chunk(rows, self.hidden_size, self.vocab_size, self.dtype.itemsize)
            sums = _Sums(self, rows)
            for chunk, logits in self._chunks(hidden, step, (0, rows)):
                inputs = _rows_of(tokens, chunk, logits)
                state = row_state[:, chunk].contiguous()
                self.backend.backward(inputs, self.options, state, scalars, upstream[chunk], logits)
                sums.add(chunk, logits[0], hidden[chunk])
            return sums.gradients, index

    def finish(
        self, gradients: Gradients, index: Tensor | None, scalars: Tensor, upstream: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients in the parameters' dtypes and shapes, made right for the 0-d `upstream`. The input is used up.

        They were formed for the upstream gradient that `scalars` expects; None: they are right already.
        """
        if index is not None and index.numel() == 0:
            upstream = None  # 0 * inf must not appear
        finished: list[Tensor | None] = []
        for number, (gradient, parameter) in enumerate(zip(gradients, self.inputs[:3], strict=True)):
            if gradient is None or parameter is None:
                finished.append(None)
                continue
            gradient = self._finish_one(gradient, parameter.dtype, scalars, upstream)
            if number == 0 and index is not None:
                zeros = gradient.new_zeros(self.tokens.rows, self.hidden_size)
                gradient = zeros.index_copy_(0, index, gradient)
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

    # Rows

    def _contributing(self) -> Tensor:
        """(N,) bool: the rows that must be multiplied by the weight."""
        tokens, options = self.tokens, self.options
        y = tokens.targets.long()
        counted = y != options.ignore_index
        if tokens.token_weights is not None:
            counted &= tokens.token_weights != 0
        return counted if options.return_stats else self._differentiated(counted)

    def _differentiated(self, rows: Tensor) -> Tensor:
        """(N,) bool: those of `rows` whose gradient may differ from 0. `rows` itself where that is all of them."""
        tokens, options = self.tokens, self.options
        if tokens.weights is None or options.label_smoothing > 0 or options.z_loss > 0:
            return rows
        y = tokens.targets.long()
        is_class = (y >= 0) & (y < self.vocab_size)
        return rows & (~is_class | (tokens.weights[torch.where(is_class, y, 0)] != 0))

    def _row_factors(self, scalars: Tensor) -> Tensor:
        """(N,) u_i [(1 - s) w(y_i) + s / V sum_j w_j], without the denominator."""
        tokens, s = self.tokens, self.options.label_smoothing
        y = tokens.targets.long()
        is_class = (y >= 0) & (y < self.vocab_size)
        w = torch.ones(tokens.rows, dtype=scalars.dtype, device=scalars.device)
        if tokens.weights is not None:
            w = tokens.weights[torch.where(is_class, y, 0)].to(scalars.dtype)
        factors = (1 - s) * w
        if s > 0:
            factors = factors + s / self.vocab_size * scalars[WEIGHT_TOTAL]
        return factors if tokens.token_weights is None else factors * tokens.token_weights.to(scalars.dtype)

    def _pack(self, contributing: Tensor, kept: Tensor) -> tuple[Tensor | None, int]:
        """The contributing rows, those of the backward products first, and how many these are. None: all rows.

        It reads two numbers back from the device, at once: how many rows contribute, and how many are kept.
        """
        rows = self.tokens.rows
        if not self.compact:
            return None, rows
        kept_rows, contributing_rows = torch.stack([kept.sum(), contributing.sum()]).tolist()
        if kept_rows == rows:
            return None, rows
        order = torch.where(kept, 0, torch.where(contributing, 1, 2)).argsort(stable=True)
        return order[:contributing_rows], kept_rows

    def _take(self, index: Tensor | None, kept: Tensor) -> tuple[LossInputs, Tensor]:
        """The tokens and the (M, H) hidden states of the chosen rows."""
        hidden = self.inputs.hidden.detach().reshape(-1, self.hidden_size)
        tokens = self.tokens
        if index is None:
            if not self.compact:
                # Rows that do not count may hold nan, which 0 * nan would carry into the weight's gradient.
                hidden = torch.where(kept[:, None], hidden, 0)
            return tokens, hidden.to(self.dtype)
        return tokens._replace(
            logits=tokens.logits[:, : index.numel()],
            targets=tokens.targets[index],
            token_weights=None if tokens.token_weights is None else tokens.token_weights[index],
        ), hidden[index].to(self.dtype)

    def _spread(self, packed: RowOutputs, index: Tensor) -> RowOutputs:
        """The packed rows' results among all rows; 0 for the others."""
        rows = self.tokens.rows
        loss = packed.loss.new_zeros(rows).index_copy_(0, index, packed.loss)
        state = packed.state.new_zeros(2, rows).index_copy_(1, index, packed.state)
        stats = packed.stats
        if stats is not None:
            stats = stats.new_zeros(2, rows).index_copy_(1, index, stats)
        return RowOutputs(loss, state, stats)

    def _range_factor(self, scalars: Tensor, tokens: LossInputs) -> Tensor | None:
        """A power of two that brings float16 logit gradients near 1, where they do not underflow; None elsewhere."""
        if self.dtype != torch.float16 or tokens.rows == 0:
            return None
        factors = self._row_factors(scalars)
        counted = self._contributing()
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

    def _scaled_by(self, factor: Tensor, scalars: Tensor) -> tuple[LossOptions, Tensor]:
        """Options and scalars with which the row kernels multiply every row by `factor`."""
        scaled = scalars.clone()
        if self.options.reduction == "sum":  # its kernels apply no denominator
            scaled[INVERSE_DENOMINATOR] = scaled[INVERSE_Z_DENOMINATOR] = factor
        else:
            scaled[INVERSE_DENOMINATOR] *= factor
            scaled[INVERSE_Z_DENOMINATOR] *= factor
        return self.options._replace(reduction="mean"), scaled

    def _chunks(self, hidden: Tensor, step: int, bounds: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk of rows and its (1, n, V) logits, in memory that the next chunk overwrites.

        `bounds` are rows at which a chunk must end.
        """
        vector = max(ALIGNMENT // self.dtype.itemsize, 1)
        longest = min(step, max(end - begin for begin, end in pairwise(bounds)))
        width = -(-self.vocab_size // vector) * vector
        buffer = torch.empty(longest, width, dtype=self.dtype, device=hidden.device)
        for begin, end in pairwise(bounds):
            for start in range(begin, end, step):
                chunk = slice(start, min(start + step, end))
                logits = buffer[: chunk.stop - chunk.start, : self.vocab_size]
                if self.bias is None:
                    torch.mm(hidden[chunk], self.weight.T, out=logits)
                else:
                    torch.addmm(self.bias, hidden[chunk], self.weight.T, out=logits)
                yield chunk, logits.unsqueeze(0)


class _Sums:
    """The gradients while chunks are added to them."""

    def __init__(self, run: Run, rows: int) -> None:
        self.run = run
        self.first = True
        make: Callable[..., Tensor] = torch.zeros if rows == 0 else torch.empty
        self.gradients = Gradients(
            *(
                make(shape, dtype=run.accumulate_dtype, device=run.inputs.hidden.device) if needed else None
                for needed, shape in zip(
                    run.needs,
                    ((rows, run.hidden_size), (run.vocab_size, run.hidden_size), (run.vocab_size,)),
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


def _rows_of(tokens: LossInputs, chunk: slice, logits: Tensor) -> LossInputs:
    u = tokens.token_weights
    return tokens._replace(logits=logits, targets=tokens.targets[chunk], token_weights=None if u is None else u[chunk])
