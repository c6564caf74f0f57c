"""The loss on logits whose columns are split over the ranks of a group, as one differentiable operation.

Forward reads this rank's columns once and exchanges a few numbers of every token. Backward forms the gradient of this
rank's columns, for whatever the upstream gradient is, from the logits and the exchanged numbers, and sends nothing.
Where tensors are traced, two functional operators do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_kernels import backends
from pdl_kernels.distributed.collectives import group_of, name_of
from pdl_kernels.distributed.vocabulary import Call, Split, agreed_split, dtype_name, remember
from pdl_kernels.ops.cross_entropy import check_targets, empty_outputs, fake_backward, validates
from pdl_kernels.ops.gradients import RefuseDoubleBackward, no_gradients, refuse
from pdl_kernels.ops.inplace import refuse_inplace
from pdl_kernels.ops.row_groups import joined, split_names, sum_denominators, sum_statistics
from pdl_kernels.ops.rows import as_operand, empty_gradient, inputs_as_rows, on_device
from pdl_kernels.ops.shards import Shards, agree
from pdl_kernels.options import DECLARED, LossInputs, LossOptions, LossOutputs

NAME = "pdl_cross_entropy(..., group=...)"


def sharded_cross_entropy(
    inputs: LossInputs,
    options: LossOptions,
    backend: str,
    group: dist.ProcessGroup,
    split: Split | None,  # None: the ranks agree on it
    *,
    inplace: bool = False,
) -> LossOutputs:
    """The loss of checked inputs, differentiable in the logits. The other outputs serve the statistics."""
    logits, targets, weights, token_weights, normalizer, expected_upstream, *_ = inputs
    traced = backends.is_traced(logits, targets, weights, token_weights)
    if not torch.compiler.is_compiling():
        backends.refuse_transforms(NAME, logits)
    if traced:
        sizes, parts = ([], "") if split is None else (list(split.sizes), split.weights)
        tensors = logits, targets, weights, token_weights, as_operand(normalizer, logits)
        where = name_of(group), sizes, parts, joined(inputs.row_groups)
        outputs = _forward_operator(*tensors, *options, backend, *where)
        return LossOutputs(*outputs[:4])
    device = logits.device
    inputs = inputs._replace(
        normalizer=on_device(normalizer, device), expected_upstream=on_device(expected_upstream, device)
    )
    call = _Call(inputs, options, backends.choose_backend(backend, device, logits.dtype), group, split, inplace)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return call.forward()[0]
    if inplace:
        refuse_inplace(logits)
    loss = _ShardedCrossEntropy.apply(logits, call)
    assert call.outputs is not None
    return call.outputs._replace(loss=loss)


@dataclass
class _Call:
    """One call on its way through autograd, which itself passes nothing but tensors on."""

    inputs: LossInputs  # of any shape
    options: LossOptions
    backend: str
    group: dist.ProcessGroup
    split: Split | None
    inplace: bool = False
    outputs: LossOutputs | None = None  # left here by forward

    def forward(self) -> tuple[LossOutputs, Shards, Tensor | None]:
        """The loss, what backward needs, and the weights of the targets."""
        inputs, options = self.inputs, self.options
        split, known = (self.split, True) if self.split is not None else self.agreed()
        shards = Shards(split, self.group, options, self.backend)
        rows = shards.inputs_of(inputs_as_rows(inputs))
        exchanged = shards.start_exchange(rows).wait()
        if self.split is None:
            if known and not validates(inputs.targets):
                shards.spoil_unless_agreed(exchanged)
            else:
                shards.check(exchanged)
                remember(self.group, self._described(), shards.split)
        # After the exchange, which all ranks come to: they see the same targets and raise the same error.
        check_targets(inputs.targets, shards.split.vocab_size, options.ignore_index)
        rows = shards.with_row_weights(rows, exchanged)
        scalars, token_count = shards.denominators(rows, exchanged.totals)
        if rows.row_groups:
            sum_denominators(rows, options, scalars, token_count, rows.row_groups)
        found = shards.merge(rows, options, scalars, exchanged)
        loss = shards.backend.reduce_rows(found, options, scalars, token_count)
        sum_statistics(options, scalars, rows.row_groups)
        if options.reduction == "none":
            loss = loss.view(inputs.targets.shape)
        assert rows.shard is not None
        return LossOutputs(loss, found.state, scalars, token_count), shards, rows.shard.row_weights

    def agreed(self) -> tuple[Split, bool]:
        return agree(self.group, self._described(), self.inputs, self.options)

    def shards_again(self) -> Shards:
        """What forward has found."""
        split, _ = (self.split, True) if self.split is not None else agreed_split(self.group, self._described())
        return Shards(split, self.group, self.options, self.backend)

    def _described(self) -> Call:
        logits, _, weights, *_ = self.inputs
        return Call(
            NAME,
            logits.shape[-1],
            None if weights is None else len(weights),
            dtype_name(torch.float64 if logits.dtype == torch.float64 else torch.float32),
            self.options.label_smoothing > 0,
        )


def _gradient(
    shards: Shards,
    inputs: LossInputs,  # of any shape
    row_weights: Tensor | None,
    row_state: Tensor,
    scalars: Tensor,
    upstream: Tensor,
    *,
    inplace: bool = False,
    contiguous: bool = False,
) -> Tensor:
    """The gradient of this rank's columns for `upstream`, (..., V), in new memory or over the logits."""
    rows = shards.inputs_of(inputs_as_rows(inputs), row_weights)
    gradient = rows.logits if inplace else empty_gradient(rows.logits, contiguous=contiguous)
    flat_upstream = upstream.reshape(-1) if shards.options.reduction == "none" else upstream
    shards.backend.backward(rows, shards.options, row_state.contiguous(), scalars, flat_upstream, gradient)
    return gradient.reshape(inputs.logits.shape)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        outputs, ctx.shards, row_weights = call.forward()
        call.outputs = outputs
        ctx.inplace, ctx.handed_over = call.inplace, False
        ctx.state = outputs.row_state, outputs.scalars
        _, targets, weights, token_weights, *_ = call.inputs
        ctx.save_for_backward(logits, targets, weights, token_weights, row_weights)
        ctx.set_materialize_grads(False)
        return outputs.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None]:
        if upstream is None:
            return None, None
        backends.refuse_transforms(f"the backward of {NAME}", upstream)
        if ctx.handed_over:
            raise RuntimeError(
                f"a second backward through {NAME} with inplace=True: the first one has overwritten the logits with "
                "the gradient, and nothing is left to form it from; use inplace=False"
            )
        logits, targets, weights, token_weights, row_weights = ctx.saved_tensors
        inputs = LossInputs(logits, targets, weights, token_weights)
        with torch.no_grad():
            row_state, scalars = ctx.state
            gradient = _gradient(ctx.shards, inputs, row_weights, row_state, scalars, upstream, inplace=ctx.inplace)
        if ctx.inplace:
            # Whoever saved the logits and comes to its own backward after this gets autograd's error.
            torch.autograd.graph.increment_version(logits)
            ctx.handed_over = True
        if torch.is_grad_enabled():  # create_graph=True
            return RefuseDoubleBackward.apply(NAME, gradient, upstream, logits), None
        return gradient, None


# ---------------------------------------------------------------------------------------------------------------------
# Operators for tensors that are traced

_TENSORS = "Tensor logits, Tensor targets, Tensor? weights, Tensor? token_weights"
_SETTINGS = ", ".join(
    [
        *(declared.schema for declared in DECLARED[LossOptions]),
        "str backend, str group, int[] sizes, str weights_of",
    ]
)


def _call_of(inputs: LossInputs, settings: Sequence[Any]) -> _Call:
    *options, backend, name, sizes, parts = settings
    group = group_of(name)
    split = Split(tuple(sizes), dist.get_rank(group), parts) if sizes else None
    backend = backends.choose_backend(backend, inputs.logits.device, inputs.logits.dtype)
    return _Call(inputs, LossOptions(*options), backend, group, split)


def _forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    normalizer: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, row state, scalars, token count, and the weights of the targets, empty where there are none."""
    *rest, row_groups = settings
    inputs = LossInputs(logits, targets, weights, token_weights, normalizer, row_groups=split_names(row_groups))
    call = _call_of(inputs, rest)
    (loss, row_state, scalars, token_count), _, row_weights = call.forward()
    assert token_count is not None
    row_weights = scalars.new_empty(0) if row_weights is None else row_weights.to(scalars.dtype)
    return loss, row_state, scalars, token_count, row_weights


def _fake_forward(
    logits: Tensor, targets: Tensor, weights: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, *options, _, _, _, _, _ = arguments
    outputs = empty_outputs(logits, targets, LossOptions(*options))
    _, _, scalars, _ = outputs
    return *outputs, scalars.new_empty((0 if weights is None else targets.numel(),))


def _backward(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    row_state: Tensor,
    scalars: Tensor,
    row_weights: Tensor,
    *settings: Any,
) -> Tensor:
    inputs = LossInputs(logits, targets, weights, token_weights)
    call = _call_of(inputs, settings)
    of_targets = None if weights is None else row_weights
    # Contiguous, as the fake implementation promises to the compiler.
    return _gradient(call.shards_again(), inputs, of_targets, row_state, scalars, upstream, contiguous=True)


_forward_operator = torch.library.custom_op(
    "pdl_kernels::sharded_cross_entropy", _forward, mutates_args=(),
    schema=f"({_TENSORS}, Tensor? normalizer, {_SETTINGS}, str row_groups) -> ({', '.join(['Tensor'] * 5)})",
)  # fmt: skip
_backward_operator = torch.library.custom_op(
    "pdl_kernels::sharded_cross_entropy_backward", _backward, mutates_args=(),
    schema=f"(Tensor upstream, {_TENSORS}, Tensor row_state, Tensor scalars, Tensor row_weights, {_SETTINGS}) "
    "-> Tensor",
)  # fmt: skip
_forward_operator.register_fake(_fake_forward)
_backward_operator.register_fake(fake_backward)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, weights, token_weights, _, *ctx.settings, _ = inputs
    _, row_state, scalars, _, row_weights = output
    ctx.save_for_backward(logits, targets, weights, token_weights, row_state, scalars, row_weights)
    ctx.mark_non_differentiable(*output[1:])


def _operator_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = _backward_operator(upstream, *ctx.saved_tensors, *ctx.settings)
    return gradient, *no_gradients(ctx, after=1)


_forward_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)
_backward_operator.register_autograd(lambda *_: refuse(NAME))
