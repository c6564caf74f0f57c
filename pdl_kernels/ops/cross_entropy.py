"""The loss on logits as one differentiable operation: an autograd function, and operators for torch.compile.

In eager mode the gradient is formed in forward, for the upstream gradient that the last backward met on this device
(loss scaling, accumulation and averaging over ranks use the same one for thousands of steps), and handed over by the
first backward, which adjusts it if the upstream gradient turns out to be another. In place it is formed for an upstream
gradient of 1: nothing would be left to form another from. It is never touched again: `.grad` may share its
storage. Every later backward starts from the saved logits. Under torch.compile two functional operators do the same
without mutation: forward returns the loss, backward forms the gradient from the logits.
"""

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pdl_kernels.backends import backend_module, choose_backend
from pdl_kernels.eager import cross_entropy as eager
from pdl_kernels.ops.rows import as_rows, empty_gradient, same_rows, share_storage
from pdl_kernels.options import (
    EXPECTED_UPSTREAM,
    LARGEST_EXPECTED,
    SCALARS,
    SMALLEST_EXPECTED,
    LossInputs,
    LossOptions,
    LossOutputs,
)

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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, differentiable in `logits`; with `return_stats` also LossOutputs.scalars and token_count."""
    if torch.compiler.is_compiling():
        loss, _, scalars, token_count = _forward_operator(
            logits, targets, weights, token_weights, normalizer, *options, backend
        )
        return loss, scalars, token_count
    backend = choose_backend(backend, logits.device, logits.dtype)
    if logits.requires_grad and torch.is_grad_enabled():
        call = (targets, weights, token_weights, normalizer, options, backend, inplace)
        found = _CrossEntropy.apply(logits, call)
        return found if options.return_stats else (found, None, None)
    outputs, *_ = _run_forward(logits, targets, weights, token_weights, normalizer, options, backend)
    return outputs.loss, outputs.scalars, outputs.token_count


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
    *,
    with_gradient: bool = False,
    inplace: bool = False,
) -> tuple[LossOutputs, Tensor | None, Any]:
    """The loss, if asked its gradient for `scalars[EXPECTED_UPSTREAM]`, (..., V), and Triton's call for `adjust`.

    With `inplace` the gradient is the logits themselves, unless they had to be copied, and 1 is expected.
    """
    check_targets(targets, logits.shape[-1], options.ignore_index)
    if backend == "triton":
        calls = _triton_calls()
        tensors = calls.plain(logits, targets, weights, token_weights)
        inplace = inplace and tensors[0] is logits
        outputs, gradient, call = calls.forward(tensors, normalizer, options, with_gradient, inplace)
        if gradient is not None and tensors[0] is not logits:
            gradient = gradient.view(logits.shape)
    else:
        inputs = _loss_inputs(logits, targets, weights, token_weights, normalizer)
        gradient = call = None
        if with_gradient:
            inplace = inplace and share_storage(inputs.logits, logits)
            gradient = inputs.logits if inplace else empty_gradient(inputs.logits)
        expected = 1.0 if inplace or gradient is None else _expected_upstream(logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            outputs = eager.forward(inputs, options, gradient, expected)
        if gradient is not None:
            gradient = logits if inplace else gradient.reshape(logits.shape)
    if options.reduction == "none":
        outputs = outputs._replace(loss=outputs.loss.view(targets.shape))
    return outputs, gradient, call


@functools.cache
def _triton_calls() -> ModuleType:
    from pdl_kernels.ops import repeated_calls  # imports Triton

    return repeated_calls


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
        backend_module(backend).backward(inputs, options, row_state.contiguous(), scalars, flat_upstream, gradient)
    return gradient.reshape(logits.shape)


@functools.cache
def validates_on_device() -> bool:
    """Asked for once: looking for a variable that is not there takes four microseconds."""
    return os.environ.get(VALIDATE_VARIABLE, "0") == "1"


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError for a target that is neither a class nor `ignore_index`.

    Always on CPU tensors. On other devices it would wait for the device, so only with PDL_KERNELS_VALIDATE=1, set
    before the first call.
    """
    if targets.device.type != "cpu":
        if not validates_on_device():
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
    def forward(ctx: Any, logits: Tensor, call: tuple[Any, ...]) -> Any:
        # Each argument, and each attribute of ctx, costs a microsecond or half of one. So they come as one.
        targets, weights, token_weights, normalizer, options, backend, inplace = call
        outputs, gradient, call_of_forward = _run_forward(
            logits, targets, weights, token_weights, normalizer, options, backend,
            with_gradient=options.reduction != "none",  # there each row waits for its own upstream gradient
            inplace=inplace,
        )  # fmt: skip
        ctx.inplace = gradient is logits
        if ctx.inplace:
            # Whoever saved the logits before this gets autograd's error. They are saved below, after the bump.
            torch.autograd.graph.increment_version(logits)
            ctx.handed_over, ctx.options, ctx.backend = False, options, backend
            ctx.save_for_backward(logits)  # the gradient is in them, and nothing else is needed
        else:
            ctx.gradient = gradient
            # Kept here and not saved: they say what `gradient` is even if the logits have changed.
            ctx.kept = outputs.scalars, outputs.row_state, options, backend, call_of_forward
            ctx.save_for_backward(logits, targets, weights, token_weights)
        ctx.set_materialize_grads(False)
        if not options.return_stats:
            return outputs.loss
        ctx.mark_non_differentiable(outputs.scalars, outputs.token_count)
        return outputs.loss, outputs.scalars, outputs.token_count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None
        refuse_transforms("the backward of pdl_cross_entropy", upstream)
        find = _gradient_in_place if ctx.inplace else _gradient
        if not torch.is_grad_enabled():
            return find(ctx, upstream), None
        logits = ctx.saved_tensors[0]  # before the gradient is written into them in place, after which autograd refuses
        with torch.no_grad():  # create_graph=True
            gradient = find(ctx, upstream)
        return _RefuseDoubleBackward.apply(gradient, upstream, logits), None


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, ctx.gradient = ctx.gradient, None
    scalars, row_state, options, backend, call = ctx.kept
    if gradient is None:
        logits, targets, weights, token_weights = ctx.saved_tensors
        return _run_backward(logits, targets, weights, token_weights, row_state, scalars, options, backend, upstream)
    if backend == "eager" and upstream.device.type == "cpu":
        _remember(upstream.item())  # which waits for nothing on a CPU
        if upstream.item() == scalars[EXPECTED_UPSTREAM].item():
            return gradient
    saved = _saved_unless_changed(ctx)
    inputs = None
    if saved is None:
        rows = as_rows(gradient)
    elif backend == "triton":
        calls = _triton_calls()
        calls.adjust(call, calls.plain(*saved), row_state, scalars, upstream, gradient, options)
        return gradient
    else:
        logits, targets, weights, token_weights = saved
        inputs = _loss_inputs(logits, targets, weights, token_weights, None)
        logits, rows = same_rows(inputs.logits, gradient)
        inputs = inputs._replace(logits=logits)
    with torch.autocast(gradient.device.type, enabled=False):
        backend_module(backend).adjust(inputs, options, row_state, scalars, upstream, rows)
    return gradient


_last_upstream = 1.0  # that a backward of the eager backend met on the CPU; the Triton backend's are on the devices


def _remember(upstream: float) -> None:
    global _last_upstream
    _last_upstream = upstream


def _expected_upstream(device: torch.device) -> float:
    last = _last_upstream
    return last if device.type == "cpu" and SMALLEST_EXPECTED <= abs(last) <= LARGEST_EXPECTED else 1.0


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
    outputs, *_ = _run_forward(logits, targets, weights, token_weights, normalizer, options, backend)
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
