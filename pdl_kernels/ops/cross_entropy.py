"""The loss on logits as one differentiable operation: an autograd function, and operators for torch.compile.

In eager mode the gradient is formed in forward, for an upstream gradient of 1, and handed over by the first backward,
which adjusts it if the upstream gradient turns out to be another. It is never touched again: `.grad` may share its
storage. Every later backward starts from the saved logits. Under torch.compile two functional operators do the same
without mutation: forward returns the loss, backward forms the gradient from the logits.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pdl_kernels.backends import backend_module, choose_backend
from pdl_kernels.options import LossInputs, LossOptions, LossOutputs

VALIDATE_VARIABLE = "PDL_KERNELS_VALIDATE"
DOUBLE_BACKWARD_MESSAGE = (
    "pdl_cross_entropy cannot be differentiated twice: its gradient is formed by a kernel that autograd does not see; "
    "for second derivatives use torch.nn.functional.cross_entropy"
)


def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    weights: Tensor | None,  # (V,)
    token_weights: Tensor | None,  # (...)
    normalizer: Tensor | float | None,  # ()
    options: LossOptions,
    backend: str,
    inplace: bool,
) -> LossOutputs:
    """The loss as LossOutputs; only `loss` is differentiable, and only in `logits`."""
    if torch.compiler.is_compiling():
        outputs = _forward_operator(logits, targets, weights, token_weights, normalizer, *options, backend)
        return LossOutputs(*outputs)
    backend = choose_backend(backend, logits.device, logits.dtype)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _run_forward(logits, targets, weights, token_weights, normalizer, options, backend, None)
    return LossOutputs(
        *_CrossEntropy.apply(logits, targets, weights, token_weights, normalizer, options, backend, inplace)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, checks and calls that eager mode and the operators share


def refuse_transforms(what: str, tensor: Tensor) -> None:
    """RuntimeError under functorch transforms and forward-mode differentiation, which would miss the kernels."""
    batched = torch._C._functorch.is_legacy_batchedtensor(tensor)  # is_grads_batched=True
    if batched or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{what} does not support functorch transforms (torch.func.grad, vmap, jvp, is_grads_batched, ...); "
            "use torch.autograd.grad, or torch.nn.functional.cross_entropy inside transforms"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(
            f"{what} does not support forward-mode differentiation; use torch.nn.functional.cross_entropy for it"
        )


def as_rows(logits: Tensor) -> Tensor:
    """(..., V) as (rows_outer, rows_inner, V), a view unless the leading dimensions cannot be merged into two."""
    V = logits.shape[-1]
    leading = logits.shape[:-1]
    if logits.dim() == 1:
        return logits.view(1, 1, V)
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    if logits.numel() == 0:
        return logits.reshape(1, leading.numel(), V)
    # Merge neighbouring dimensions where one stride steps through both.
    shape: list[int] = []
    strides: list[int] = []
    for size, stride in zip(leading, logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if shape and strides[-1] == size * stride:
            shape[-1] *= size
            strides[-1] = stride
        else:
            shape.append(size)
            strides.append(stride)
    if len(shape) > 2:
        return logits.reshape(1, leading.numel(), V)
    while len(shape) < 2:
        shape.insert(0, 1)
        strides.insert(0, 0)
    return logits.as_strided((*shape, V), (*strides, logits.stride(-1)))


def empty_gradient(rows: Tensor, *, contiguous: bool = False) -> Tensor:
    """Uninitialised memory for the gradient of (rows_outer, rows_inner, V) logits.

    Laid out as the logits are, so that their rows have the same alignment, unless that would leave large gaps or make
    elements share memory; contiguous then.
    """
    steps = sorted((stride, size) for stride, size in zip(rows.stride(), rows.shape, strict=True) if size > 1)
    span = 1  # elements from the first to the last
    apart = True
    for stride, size in steps:
        apart = apart and stride >= span
        span += (size - 1) * stride
    if not contiguous and rows.stride(-1) == 1 and apart and span <= 1.25 * rows.numel():
        return torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype, device=rows.device)
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


def _loss_inputs(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    normalizer: Tensor | float | None,
) -> LossInputs:
    return LossInputs(
        as_rows(logits.detach()),
        targets.reshape(-1).contiguous(),
        None if weights is None else weights.contiguous(),
        None if token_weights is None else token_weights.reshape(-1).contiguous(),
        normalizer,
    )


def _run_forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    normalizer: Tensor | float | None,
    options: LossOptions,
    backend: str,
    gradient: Tensor | None,  # (rows_outer, rows_inner, V)
) -> LossOutputs:
    check_targets(targets, logits.shape[-1], options.ignore_index)
    inputs = _loss_inputs(logits, targets, weights, token_weights, normalizer)
    with torch.autocast(logits.device.type, enabled=False):
        outputs = backend_module(backend).forward(inputs, options, gradient)
    if options.reduction == "none":
        outputs = outputs._replace(loss=outputs.loss.view(targets.shape))
    return outputs


def _run_backward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    row_state: Tensor,
    scalars: Tensor,
    options: LossOptions,
    backend: str,
    upstream: Tensor,
    *,
    contiguous: bool = False,
) -> Tensor:
    """The gradient for `upstream` in new memory, (..., V)."""
    inputs = _loss_inputs(logits, targets, weights, token_weights, None)
    gradient = empty_gradient(inputs.logits, contiguous=contiguous)
    flat_upstream = upstream.reshape(-1) if options.reduction == "none" else upstream
    with torch.autocast(logits.device.type, enabled=False):
        backend_module(backend).backward(inputs, options, row_state, scalars, flat_upstream, gradient)
    return gradient.reshape(logits.shape)


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError for a target that is neither a class nor `ignore_index`.

    Always on CPU tensors. On other devices it would wait for the device, so only with PDL_KERNELS_VALIDATE=1.
    """
    if targets.device.type != "cpu":
        if os.environ.get(VALIDATE_VARIABLE, "0") != "1":
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
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        token_weights: Tensor | None,
        normalizer: Tensor | float | None,
        options: LossOptions,
        backend: str,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        gradient = None
        ctx.inplace = False
        ctx.logits_shape = logits.shape
        if options.reduction != "none":  # otherwise each row waits for its own upstream gradient
            rows = as_rows(logits.detach())
            ctx.inplace = inplace and rows.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
            gradient = rows if ctx.inplace else empty_gradient(rows)
        outputs = _run_forward(logits, targets, weights, token_weights, normalizer, options, backend, gradient)
        if ctx.inplace:
            # Whoever saved the logits before this gets autograd's error. They are saved below, after the bump.
            torch.autograd.graph.increment_version(logits)
            gradient = None
        ctx.gradient = gradient
        ctx.handed_over = False
        ctx.options, ctx.backend = options, backend
        if ctx.inplace:
            ctx.save_for_backward(logits)  # the gradient is in them, and nothing else is needed
        else:
            ctx.save_for_backward(logits, targets, weights, token_weights, outputs.row_state, outputs.scalars)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        refuse_transforms("the backward of pdl_cross_entropy", upstream)
        with torch.no_grad():
            gradient = _gradient_in_place(ctx, upstream) if ctx.inplace else _gradient(ctx, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _RefuseDoubleBackward.apply(gradient, upstream, ctx.saved_tensors[0])
        return (gradient,) + (None,) * 7


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        logits, targets, weights, token_weights, row_state, scalars = ctx.saved_tensors
        return _run_backward(
            logits, targets, weights, token_weights, row_state, scalars, ctx.options, ctx.backend, upstream
        )
    if ctx.backend == "eager" and upstream.device.type == "cpu" and upstream.item() == 1:
        return gradient.reshape(ctx.logits_shape)
    saved = _saved_unless_changed(ctx)
    inputs = row_state = scalars = None
    if saved is not None:
        logits, targets, weights, token_weights, row_state, scalars = saved
        inputs = _loss_inputs(logits, targets, weights, token_weights, None)
    with torch.autocast(gradient.device.type, enabled=False):
        backend_module(ctx.backend).adjust(inputs, ctx.options, row_state, scalars, upstream, gradient)
    return gradient.reshape(ctx.logits_shape)


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
    with torch.autocast(gradient.device.type, enabled=False):
        backend_module(ctx.backend).adjust(None, ctx.options, None, None, upstream, as_rows(gradient))
    return gradient


class _RefuseDoubleBackward(torch.autograd.Function):
    """The identity on a gradient, so that differentiating it again raises instead of being silently wrong."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, upstream: Tensor, logits: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(DOUBLE_BACKWARD_MESSAGE)


# ---------------------------------------------------------------------------------------------------------------------
# Operators for torch.compile


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
    return tuple(_run_forward(logits, targets, weights, token_weights, normalizer, options, backend, None))  # type: ignore[return-value]


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
    return loss, row_state, targets.new_empty((6,), dtype=dtype), targets.new_empty((), dtype=torch.int64)


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
    return _run_backward(
        logits, targets, weights, token_weights, row_state, scalars, options, backend, upstream, contiguous=True
    )


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
