"""The loss fused with the output projection as functional operators, for torch.compile: no graph break, no mutation."""

from typing import Any

import torch
from torch import Tensor

from pdl_kernels.backends import choose_backend
from pdl_kernels.ops.linear_chunks import Gradients, Run
from pdl_kernels.options import SCALARS, LinearInputs, LinearOptions, LinearOutputs, LossOptions


def forward(
    inputs: LinearInputs,
    normalizer: Tensor | float | None,
    options: LossOptions,
    linear: LinearOptions,
    backend: str,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> LinearOutputs:
    outputs = _forward_operator(*inputs, normalizer, *options, *linear, backend, dtype, *needs)
    return LinearOutputs(*outputs[:4])


@torch.library.custom_op("pdl_kernels::linear_cross_entropy", mutates_args=())
def _forward_operator(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    seed: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_stats: bool,
    chunk_size: int | None,
    accumulate_dtype: torch.dtype,
    compact: bool | None,
    row_sampling: float,
    backend: str,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, row state, scalars, token count, and the gradients for an upstream gradient of 1, empty where not needed.

    The gradient of hidden has a row for every token here: how many contribute is not known to the compiler.
    """
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_stats)
    linear = LinearOptions(chunk_size, accumulate_dtype, compact, row_sampling)
    inputs = LinearInputs(hidden, lm_head_weight, bias, targets, weights, token_weights, seed)
    backend = choose_backend(backend, hidden.device, dtype)
    run = Run(inputs, options, linear, backend, dtype, (needs_hidden, needs_weight, needs_bias))
    outputs, gradients, index = run.forward(normalizer)
    if reduction == "none":
        gradients = Gradients(None, None, None)
    to_hidden, to_weight, to_bias = (_or_empty(gradient, outputs.scalars) for gradient in gradients)
    if gradients.hidden is not None and index is not None:
        zeros = to_hidden.new_zeros(targets.numel(), hidden.shape[-1])
        to_hidden = zeros.index_copy_(0, index, to_hidden)
    return (*outputs, to_hidden, to_weight, to_bias)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


@_forward_operator.register_fake
def _(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    seed: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_stats: bool,
    chunk_size: int | None,
    accumulate_dtype: torch.dtype,
    compact: bool | None,
    row_sampling: float,
    backend: str,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    result = torch.float64 if dtype == torch.float64 else torch.float32
    rows = targets.numel()
    per_row = reduction == "none"
    sums = torch.promote_types(dtype, accumulate_dtype)

    def gradient(needed: bool, *shape: Any) -> Tensor:
        if per_row or not needed:
            return targets.new_empty((0,), dtype=result)
        return targets.new_empty(shape, dtype=sums)

    V, H = lm_head_weight.shape
    return (
        targets.new_empty(targets.shape if per_row else (), dtype=result),
        targets.new_empty((2, rows if per_row else 0), dtype=result),
        targets.new_empty((len(SCALARS),), dtype=result),
        targets.new_empty((), dtype=torch.int64),
        gradient(needs_hidden, rows, H),
        gradient(needs_weight, V, H),
        gradient(needs_bias, V),
    )


@torch.library.custom_op("pdl_kernels::linear_cross_entropy_backward", mutates_args=())
def _backward_operator(
    upstream: Tensor,
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    seed: Tensor | None,
    row_state: Tensor,
    scalars: Tensor,
    to_hidden: Tensor,
    to_weight: Tensor,
    to_bias: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_stats: bool,
    chunk_size: int | None,
    accumulate_dtype: torch.dtype,
    compact: bool | None,
    row_sampling: float,
    backend: str,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if reduction != "none":
        parameters = zip(
            (to_hidden, to_weight, to_bias),
            (hidden, lm_head_weight, bias),
            (needs_hidden, needs_weight, needs_bias),
            strict=True,
        )
        scaled = [
            (gradient * upstream).to(parameter.dtype).reshape(parameter.shape)
            if needed and parameter is not None
            else upstream.new_empty(0)
            for gradient, parameter, needed in parameters
        ]
        return scaled[0], scaled[1], scaled[2]
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_stats)
    linear = LinearOptions(chunk_size, accumulate_dtype, compact, row_sampling)
    inputs = LinearInputs(hidden, lm_head_weight, bias, targets, weights, token_weights, seed)
    backend = choose_backend(backend, hidden.device, dtype)
    run = Run(inputs, options, linear, backend, dtype, (needs_hidden, needs_weight, needs_bias))
    finished = run.finish(*run.backward_rows(upstream, row_state, scalars), None)
    first, second, third = (_or_empty(gradient, upstream) for gradient in finished)
    return first.contiguous(), second, third


@_backward_operator.register_fake
def _(upstream: Tensor, hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    *_, needs_hidden, needs_weight, needs_bias = rest
    return tuple(
        torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if needed and parameter is not None
        else upstream.new_empty((0,))
        for parameter, needed in ((hidden, needs_hidden), (lm_head_weight, needs_weight), (bias, needs_bias))
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, settings = inputs[:7], inputs[8:]
    _, row_state, scalars, _, *gradients = output
    ctx.save_for_backward(*tensors, row_state, scalars, *gradients)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = settings


def _operator_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = _backward_operator(upstream, *ctx.saved_tensors, *ctx.settings)
    needs = ctx.settings[-3:]
    wanted = tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return (*wanted, *(None,) * 21)


_forward_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    from pdl_kernels.ops.linear_cross_entropy import DOUBLE_BACKWARD_MESSAGE

    raise RuntimeError(DOUBLE_BACKWARD_MESSAGE)


_backward_operator.register_autograd(_refuse_double_backward)
