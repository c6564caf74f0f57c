"""The loss on logits as one differentiable operation: an autograd function, and operators for tensors that are traced.

In eager mode the gradient is formed in forward, for the upstream gradient that the caller expects, and handed over by
the first backward, which forms it again if the upstream gradient turns out to be another; in place, where nothing is
left to form it from, it is multiplied. It is never touched again: `.grad` may share its storage. Every later backward
starts from the saved logits. Where tensors are traced two functional operators do the same without mutation: forward
returns the loss, backward forms the gradient from the logits.
"""

import os
from typing import Any

import torch
from torch import Tensor

from pdl_kernels.backends import backend_module, choose_backend
from pdl_kernels.ops.tracing import number_as_tensor, refuse_transforms
from pdl_kernels.ops.views import as_rows, empty_gradient, same_rows, share_storage
from pdl_kernels.options import SCALARS, LossInputs, LossOptions, LossOutputs

VALIDATE_VARIABLE = "PDL_KERNELS_VALIDATE"
DOUBLE_BACKWARD_MESSAGE = (
    "pdl_cross_entropy cannot be differentiated twice: its gradient is formed by a kernel that autograd does not see; "
    "for second derivatives use torch.nn.functional.cross_entropy"
)


def cross_entropy(
    inputs: LossInputs,  # of any shape: logits (..., V), targets and token_weights (...)
    options: LossOptions,
    backend: str,
    *,
    inplace: bool = False,
    traced: bool = False,  # see ops/tracing.py
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, differentiable in `logits`; with `return_stats` also LossOutputs.scalars and token_count."""
    logits = inputs.logits
    if traced:
        denominator = number_as_tensor(inputs.normalizer, logits)
        loss, _, scalars, token_count = _forward_operator(*inputs[:4], denominator, *options, backend)
        return loss, scalars, token_count
    backend = choose_backend(backend, logits.device, logits.dtype)
    if logits.requires_grad and torch.is_grad_enabled():
        found = _CrossEntropy.apply(logits, inputs, options, backend, inplace)
        return found if options.return_stats else (found, None, None)
    outputs, _ = _run_forward(inputs, options, backend)
    return outputs.loss, outputs.scalars, outputs.token_count


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, checks and calls that eager mode and the operators share


def _as_rows(inputs: LossInputs) -> LossInputs:
    """The same numbers as backends take them: logits (rows_outer, rows_inner, V), targets and token_weights (N,)."""
    logits, targets, weights, token_weights, normalizer, expected_upstream = inputs
    return LossInputs(
        as_rows(logits.detach()),
        _flat(targets),
        None if weights is None else weights.contiguous(),
        None if token_weights is None else _flat(token_weights),
        normalizer,
        expected_upstream,
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.reshape(-1).contiguous()


def _run_forward(
    inputs: LossInputs, options: LossOptions, backend: str, *, with_gradient: bool = False, inplace: bool = False
) -> tuple[LossOutputs, Tensor | None]:
    """The loss, and if asked its gradient for the expected upstream gradient, (..., V).

    With `inplace` the gradient is the logits themselves, unless they had to be copied.
    """
    logits, targets = inputs.logits, inputs.targets
    check_targets(targets, logits.shape[-1], options.ignore_index)
    rows = _as_rows(inputs)
    inplace = inplace and share_storage(rows.logits, logits)
    gradient = None
    if with_gradient:
        gradient = rows.logits if inplace else empty_gradient(rows.logits)
    outputs = backend_module(backend).forward(rows, options, gradient)
    if options.reduction == "none":
        outputs = outputs._replace(loss=outputs.loss.view(targets.shape))
    if gradient is not None:
        gradient = logits if inplace else gradient.reshape(logits.shape)
    return outputs, gradient


def _run_backward(
    inputs: LossInputs,
    row_state: Tensor,
    scalars: Tensor,
    options: LossOptions,
    backend: str,
    upstream: Tensor,
    *,
    contiguous: bool = False,
) -> Tensor:
    """The gradient for `upstream` in new memory, (..., V)."""
    rows = _as_rows(inputs)
    gradient = empty_gradient(rows.logits, contiguous=contiguous)
    flat_upstream = upstream.reshape(-1) if options.reduction == "none" else upstream
    backend_module(backend).backward(rows, options, row_state.contiguous(), scalars, flat_upstream, gradient)
    return gradient.reshape(inputs.logits.shape)


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError for a target that is neither a class nor `ignore_index`.

    Always on CPU tensors. On other devices it would wait for the device, so only with PDL_KERNELS_VALIDATE=1.
    """
    if targets.device.type != "cpu":
        if os.environ.get(VALIDATE_VARIABLE) != "1":
            return
        if targets.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{VALIDATE_VARIABLE}=1 reads the targets back from the device, which a CUDA graph capture forbids; "
                "unset it while capturing"
            )
    if targets.numel() == 0:
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
# Eager mode


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: LossInputs, options: LossOptions, backend: str, inplace: bool) -> Any:
        outputs, gradient = _run_forward(
            inputs, options, backend,
            with_gradient=options.reduction != "none",  # there each row waits for its own upstream gradient
            inplace=inplace,
        )  # fmt: skip
        ctx.inplace = gradient is inputs.logits
        # Kept here and not saved: they say what `gradient` is even if the logits have changed.
        ctx.kept = outputs.scalars, outputs.row_state, options, backend
        if ctx.inplace:
            # Whoever saved the logits before this gets autograd's error. They are saved below, after the bump.
            torch.autograd.graph.increment_version(logits)
            ctx.handed_over = False
            ctx.save_for_backward(logits)  # the gradient is in them, and no other tensor is needed
        else:
            ctx.gradient = gradient
            ctx.save_for_backward(logits, *inputs[1:4])
        ctx.set_materialize_grads(False)
        if not options.return_stats:
            return outputs.loss
        ctx.mark_non_differentiable(outputs.scalars, outputs.token_count)
        return outputs.loss, outputs.scalars, outputs.token_count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        refuse_transforms("the backward of pdl_cross_entropy", upstream)
        find = _gradient_in_place if ctx.inplace else _gradient
        if not torch.is_grad_enabled():
            return find(ctx, upstream), None, None, None, None
        logits = ctx.saved_tensors[0]  # before the gradient is written into them in place, after which autograd refuses
        with torch.no_grad():  # create_graph=True
            gradient = find(ctx, upstream)
        return _RefuseDoubleBackward.apply(gradient, upstream, logits), None, None, None, None


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, ctx.gradient = ctx.gradient, None
    scalars, row_state, options, backend = ctx.kept
    if gradient is None:
        return _run_backward(LossInputs(*ctx.saved_tensors), row_state, scalars, options, backend, upstream)
    saved = _saved_unless_changed(ctx)
    if saved is None:
        backend_module(backend).scale(as_rows(gradient), scalars, upstream)
    else:
        inputs = _as_rows(LossInputs(*saved))
        logits, rows = same_rows(inputs.logits, gradient)
        if logits is not inputs.logits:
            inputs = inputs._replace(logits=logits)
        backend_module(backend).backward(inputs, options, row_state, scalars, upstream, rows, unless_expected=True)
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
            "a second backward through pdl_cross_entropy(..., inplace=True): the first one handed over the gradient "
            "that had overwritten the logits, and nothing is left to form it from; use inplace=False"
        )
    gradient = ctx.saved_tensors[0].detach()  # raises if something has been written over the gradient
    ctx.handed_over = True
    scalars, _, _, backend = ctx.kept
    rows = as_rows(gradient)  # a copy, where a hook on saved tensors returned other strides
    backend_module(backend).scale(rows, scalars, upstream)
    return rows.reshape(gradient.shape)


class _RefuseDoubleBackward(torch.autograd.Function):
    """The identity on a gradient, so that differentiating it again raises instead of being silently wrong."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, upstream: Tensor, logits: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(DOUBLE_BACKWARD_MESSAGE)


# ---------------------------------------------------------------------------------------------------------------------
# Operators for tensors that are traced


@torch.library.custom_op("pdl_kernels::cross_entropy", mutates_args=())
def _forward_operator(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_stats)
    backend = choose_backend(backend, logits.device, logits.dtype)
    inputs = LossInputs(logits, targets, weights, token_weights, normalizer)
    outputs, _ = _run_forward(inputs, options, backend)
    loss, row_state, scalars, token_count = outputs
    return loss, row_state, scalars, targets.new_zeros((), dtype=torch.int64) if token_count is None else token_count


@_forward_operator.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = targets.new_empty(targets.shape if reduction == "none" else (), dtype=dtype)
    row_state = targets.new_empty((2, targets.numel()), dtype=dtype)
    return loss, row_state, targets.new_empty((len(SCALARS),), dtype=dtype), targets.new_empty((), dtype=torch.int64)


@torch.library.custom_op("pdl_kernels::cross_entropy_backward", mutates_args=())
def _backward_operator(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    row_state: Tensor,
    scalars: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> Tensor:
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale)
    backend = choose_backend(backend, logits.device, logits.dtype)
    # Contiguous, as the fake implementation promises to the compiler.
    inputs = LossInputs(logits, targets, weights, token_weights)
    return _run_backward(inputs, row_state, scalars, options, backend, upstream, contiguous=True)


@_backward_operator.register_fake
def _(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, weights, token_weights, _, *options, _, backend = inputs
    _, row_state, scalars, _ = output
    ctx.save_for_backward(logits, targets, weights, token_weights, row_state, scalars)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options, ctx.backend = options, backend


def _operator_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = _backward_operator(upstream, *ctx.saved_tensors, *ctx.options, ctx.backend)
    return (gradient,) + (None,) * 12


_forward_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(DOUBLE_BACKWARD_MESSAGE)


_backward_operator.register_autograd(_refuse_double_backward)
