"""The loss on logits as one differentiable operation: an autograd function, and operators for tensors that are traced.

In eager mode forward also forms the gradient, for the upstream gradient that the caller expects, and the first backward
hands it over. If the upstream gradient turns out to be another, backward forms the gradient again from the logits; in
place, where the logits are gone, it multiplies it. Once handed over, the gradient is never touched again, because
`.grad` may share its storage: every later backward starts from the saved logits. Where tensors are traced, two
functional operators do the same without mutation: forward returns the loss, backward forms the gradient.
"""

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_kernels import backends
from pdl_kernels.ops.gradients import RefuseDoubleBackward, no_gradients, refuse
from pdl_kernels.ops.inplace import refuse_inplace, share_storage
from pdl_kernels.ops.row_groups import joined, split_names, sum_denominators, sum_statistics
from pdl_kernels.ops.rows import as_operand, as_rows, empty_gradient, inputs_as_rows, on_device, same_rows
from pdl_kernels.options import DECLARED, SCALARS, LossInputs, LossOptions, LossOutputs

NAME = "pdl_cross_entropy"
VALIDATE_VARIABLE = "PDL_KERNELS_VALIDATE"


def cross_entropy(inputs: LossInputs, options: LossOptions, backend: str, *, inplace: bool = False) -> LossOutputs:
    """The loss of checked inputs, differentiable in the logits. The other outputs serve the statistics."""
    logits, targets, weights, token_weights, normalizer, expected_upstream, *_ = inputs
    traced = backends.is_traced(logits, targets, weights, token_weights)
    if not torch.compiler.is_compiling():
        backends.refuse_transforms(NAME, logits)
    if traced:
        tensors = logits, targets, weights, token_weights, as_operand(normalizer, logits)
        return LossOutputs(*_forward_operator(*tensors, *options, backend, joined(inputs.row_groups)))
    inputs = inputs._replace(
        normalizer=on_device(normalizer, logits.device), expected_upstream=on_device(expected_upstream, logits.device)
    )
    call = _Call(inputs, options, _backend_of(backend, logits), inplace)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _run_forward(call)[0]
    if inplace:
        refuse_inplace(logits)
    loss = _CrossEntropy.apply(logits, call)
    assert call.outputs is not None
    return call.outputs._replace(loss=loss)


def _backend_of(requested: str, logits: Tensor) -> ModuleType:
    return backends.backend_module(backends.choose_backend(requested, logits.device, logits.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Eager mode


@dataclass
class _Call:
    """One call on its way through autograd, which itself passes nothing but tensors on."""

    inputs: LossInputs  # of any shape
    options: LossOptions
    backend: ModuleType
    inplace: bool
    outputs: LossOutputs | None = None  # left here by forward


class _Kept(NamedTuple):
    """What backward needs beside the tensors that autograd saves: right even if the logits have changed since."""

    scalars: Tensor
    row_state: Tensor
    options: LossOptions
    backend: ModuleType


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        # With "none" each row waits for its own upstream gradient.
        outputs, gradient = _run_forward(call, with_gradient=call.options.reduction != "none")
        call.outputs = outputs
        ctx.kept = _Kept(outputs.scalars, outputs.row_state, call.options, call.backend)
        ctx.inplace = gradient is call.inputs.logits
        if ctx.inplace:
            # Whoever saved the logits before this gets autograd's error. They are saved below, after the bump.
            torch.autograd.graph.increment_version(logits)
            ctx.handed_over = False
            ctx.save_for_backward(logits)  # the gradient is in them, and no other tensor is needed
        else:
            ctx.gradient = gradient
            ctx.save_for_backward(logits, call.inputs.targets, call.inputs.weights, call.inputs.token_weights)
        ctx.set_materialize_grads(False)
        return outputs.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None]:
        if upstream is None:
            return None, None
        backends.refuse_transforms(f"the backward of {NAME}", upstream)
        find = _gradient_in_place if ctx.inplace else _gradient
        if not torch.is_grad_enabled():
            return find(ctx, upstream), None
        logits = ctx.saved_tensors[0]  # before the gradient is written into them in place, after which autograd refuses
        with torch.no_grad():  # create_graph=True
            gradient = find(ctx, upstream)
        return RefuseDoubleBackward.apply(NAME, gradient, upstream, logits), None


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        return _run_backward(LossInputs(*ctx.saved_tensors), ctx.kept, upstream)
    scalars, row_state, options, backend = ctx.kept
    saved = _saved_unless_changed(ctx)
    if saved is None:
        backend.scale(as_rows(gradient), scalars, upstream)
    else:
        inputs = inputs_as_rows(LossInputs(*saved))
        logits, rows = same_rows(inputs.logits, gradient)
        backend.backward(
            inputs._replace(logits=logits), options, row_state, scalars, upstream, rows, unless_expected=True
        )
    return gradient


def _saved_unless_changed(ctx: Any) -> tuple[Any, ...] | None:
    """The saved tensors, or None if one was written to since forward, which the first backward allows."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            return None
        raise


def _gradient_in_place(ctx: Any, upstream: Tensor) -> Tensor:
    if ctx.handed_over:
        raise RuntimeError(
            f"a second backward through {NAME}(..., inplace=True): the first one handed over the gradient that had "
            "overwritten the logits, and nothing is left to form it from; use inplace=False"
        )
    gradient = ctx.saved_tensors[0].detach()  # raises if something has been written over the gradient
    ctx.handed_over = True
    rows = as_rows(gradient)  # a copy, where a hook on saved tensors returned other strides
    ctx.kept.backend.scale(rows, ctx.kept.scalars, upstream)
    return rows.reshape(gradient.shape)


# ---------------------------------------------------------------------------------------------------------------------
# What eager mode and the operators share


def _run_forward(call: _Call, *, with_gradient: bool = False) -> tuple[LossOutputs, Tensor | None]:
    """The loss, and if asked its gradient for the expected upstream gradient, (..., V).

    In place the gradient is the logits themselves, unless they had to be copied.
    """
    logits, targets = call.inputs.logits, call.inputs.targets
    check_targets(targets, logits.shape[-1], call.options.ignore_index)
    rows = inputs_as_rows(call.inputs)
    inplace = call.inplace and share_storage(rows.logits, logits)
    gradient = None
    if with_gradient:
        gradient = rows.logits if inplace else empty_gradient(rows.logits)
    outputs = (
        _of_all_ranks(call, rows, gradient) if rows.row_groups else call.backend.forward(rows, call.options, gradient)
    )
    if call.options.reduction == "none":
        outputs = outputs._replace(loss=outputs.loss.view(targets.shape))
    if gradient is not None:
        gradient = logits if inplace else gradient.reshape(logits.shape)
    return outputs, gradient


def _of_all_ranks(call: _Call, rows: LossInputs, gradient: Tensor | None) -> LossOutputs:
    """The backend's `forward`, with the denominators and statistics of all ranks' tokens."""
    scalars, token_count = call.backend.denominators(rows, call.options)
    sum_denominators(rows, call.options, scalars, token_count, rows.row_groups)
    found = call.backend.loss_rows(rows, call.options, scalars, gradient)
    loss = call.backend.reduce_rows(found, call.options, scalars, token_count)
    sum_statistics(call.options, scalars, rows.row_groups)
    return LossOutputs(loss, found.state, scalars, token_count)


def _run_backward(inputs: LossInputs, kept: _Kept, upstream: Tensor, *, contiguous: bool = False) -> Tensor:
    """The gradient for `upstream` in new memory, (..., V)."""
    rows = inputs_as_rows(inputs)
    gradient = empty_gradient(rows.logits, contiguous=contiguous)
    flat_upstream = upstream.reshape(-1) if kept.options.reduction == "none" else upstream
    kept.backend.backward(rows, kept.options, kept.row_state.contiguous(), kept.scalars, flat_upstream, gradient)
    return gradient.reshape(inputs.logits.shape)


def validates(targets: Tensor) -> bool:
    """Whether what a call is given is looked at: always on a CPU.

    On other devices it would wait for the device, so only with PDL_KERNELS_VALIDATE=1.
    """
    if targets.device.type == "cpu":
        return True
    if not asked_to_validate():
        return False
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{VALIDATE_VARIABLE}=1 reads the targets back from the device, which a CUDA graph capture forbids; "
            "unset it while capturing"
        )
    return True


def asked_to_validate() -> bool:
    return os.environ.get(VALIDATE_VARIABLE) == "1"


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError for a target that is neither a class nor `ignore_index`, where `validates` says so."""
    if not validates(targets) or targets.numel() == 0:
        return
    lowest, highest = torch.aminmax(targets)
    if lowest >= 0 and highest < vocab_size:
        return
    wide = targets.long()  # torch would wrap ignore_index to the dtype of the targets
    wrong = (wide != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        index = ", ".join(map(str, position))
        raise IndexError(
            f"targets[{index}] is {targets[position].item()}; accepted are class indices from 0 to {vocab_size - 1} "
            f"and ignore_index={ignore_index}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Operators for tensors that are traced

_SETTINGS = ", ".join([*(declared.schema for declared in DECLARED[LossOptions]), "str backend"])
_TENSORS = "Tensor logits, Tensor targets, Tensor? weights, Tensor? token_weights"


def _forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    normalizer: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, backend, row_groups = settings
    inputs = LossInputs(logits, targets, weights, token_weights, normalizer, row_groups=split_names(row_groups))
    call = _Call(inputs, LossOptions(*options), _backend_of(backend, logits), inplace=False)
    (loss, row_state, scalars, token_count), _ = _run_forward(call)
    return loss, row_state, scalars, targets.new_zeros((), dtype=torch.int64) if token_count is None else token_count


def _fake_forward(logits: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, *options, _, _ = arguments
    return empty_outputs(logits, targets, LossOptions(*options))


def empty_outputs(logits: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, row state, scalars and token count without numbers."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    per_row = options.reduction == "none"
    return (
        targets.new_empty(targets.shape if per_row else (), dtype=dtype),
        targets.new_empty((2, targets.numel()), dtype=dtype),
        targets.new_empty((len(SCALARS),), dtype=dtype),
        targets.new_empty((), dtype=torch.int64),
    )


def _backward(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    row_state: Tensor,
    scalars: Tensor,
    *settings: Any,
) -> Tensor:
    *options, backend = settings
    kept = _Kept(scalars, row_state, LossOptions(*options), _backend_of(backend, logits))
    # Contiguous, as the fake implementation promises to the compiler.
    return _run_backward(LossInputs(logits, targets, weights, token_weights), kept, upstream, contiguous=True)


def fake_backward(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_forward_operator = torch.library.custom_op(
    "pdl_kernels::cross_entropy", _forward, mutates_args=(),
    schema=f"({_TENSORS}, Tensor? normalizer, {_SETTINGS}, str row_groups) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
_backward_operator = torch.library.custom_op(
    "pdl_kernels::cross_entropy_backward", _backward, mutates_args=(),
    schema=f"(Tensor upstream, {_TENSORS}, Tensor row_state, Tensor scalars, {_SETTINGS}) -> Tensor",
)  # fmt: skip
_forward_operator.register_fake(_fake_forward)
_backward_operator.register_fake(fake_backward)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, weights, token_weights, _, *ctx.settings, _ = inputs
    _, row_state, scalars, _ = output
    ctx.save_for_backward(logits, targets, weights, token_weights, row_state, scalars)
    ctx.mark_non_differentiable(*output[1:])


def _operator_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = _backward_operator(upstream, *ctx.saved_tensors, *ctx.settings)
    return gradient, *no_gradients(ctx, after=1)


_forward_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)
_backward_operator.register_autograd(lambda *_: refuse(NAME))
