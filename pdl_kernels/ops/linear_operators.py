"""The loss fused with the output projection as functional operators, for tensors that are traced: no mutation."""

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from pdl_kernels.backends import choose_backend
from pdl_kernels.ops.chunks import Gradients, Run
from pdl_kernels.ops.tracing import number_as_tensor
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
    if not torch.compiler.is_compiling():
        _share_flop_formulas()
    denominator = number_as_tensor(normalizer, inputs.hidden)
    outputs = _forward_operator(*inputs, denominator, *options, *linear, backend, dtype, *needs)
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
    _share_flop_formulas()  # with whoever counts a graph that is recorded here
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
    needs = (needs_hidden, needs_weight, needs_bias)
    parameters = (hidden, lm_head_weight, bias)
    wanted = [parameter if needed else None for parameter, needed in zip(parameters, needs, strict=True)]
    pairs = list(zip(wanted, (to_hidden, to_weight, to_bias), strict=True))
    # Where the call was recorded, fewer gradients may have been needed than here: then they do not wait.
    if reduction != "none" and all(p is None or gradient.numel() == p.numel() for p, gradient in pairs):
        scaled = [
            upstream.new_empty(0) if p is None else (gradient * upstream).to(p.dtype).reshape(p.shape)
            for p, gradient in pairs
        ]
        return scaled[0], scaled[1], scaled[2]
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_stats)
    linear = LinearOptions(chunk_size, accumulate_dtype, compact, row_sampling)
    inputs = LinearInputs(hidden, lm_head_weight, bias, targets, weights, token_weights, seed)
    backend = choose_backend(backend, hidden.device, dtype)
    run = Run(inputs, options, linear, backend, dtype, needs)
    if reduction == "none":
        finished = run.finish(*run.backward_rows(upstream, row_state, scalars), scalars, None)
    else:
        finished = run.finish(*run.gradients_again(scalars), scalars, upstream)
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
    tensors, settings = inputs[:7], inputs[8:-3]
    _, row_state, scalars, _, *gradients = output
    ctx.save_for_backward(*tensors, row_state, scalars, *gradients)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = settings


def _operator_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    gradients = _backward_operator(upstream, *ctx.saved_tensors, *ctx.settings, *needs)
    wanted = tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return (*wanted, *(None,) * 21)


_forward_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    from pdl_kernels.ops.linear_cross_entropy import DOUBLE_BACKWARD_MESSAGE

    raise RuntimeError(DOUBLE_BACKWARD_MESSAGE)


_backward_operator.register_autograd(_refuse_double_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Floating point operations, as torch.utils.flop_counter.FlopCounterMode counts those of F.linear: of matrix products
# alone, two for each multiplication and addition, and of every token, whether it contributes or not.


def _forward_flops(hidden: Any, lm_head_weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    to_hidden, to_weight = out_shape[4:6]
    return _products(hidden, lm_head_weight, 1 + (len(to_hidden) == 2) + (len(to_weight) == 2))


def _backward_flops(
    upstream: Any,
    hidden: Any,
    lm_head_weight: Any,
    bias: Any,
    targets: Any,
    weights: Any,
    token_weights: Any,
    seed: Any,
    row_state: Any,
    scalars: Any,
    to_hidden: Any,
    to_weight: Any,
    to_bias: Any,
    *_: Any,
    out_shape: Any,
    **__: Any,
) -> int:
    found, waiting = map(math.prod, out_shape), map(math.prod, (to_hidden, to_weight, to_bias))
    if all(size in (0, waits) for size, waits in zip(found, waiting, strict=True)):
        return 0  # forward has formed them
    first, second, _bias = out_shape
    return _products(hidden, lm_head_weight, 1 + (math.prod(first) > 0) + (math.prod(second) > 0))


def _products(hidden: Any, lm_head_weight: Any, number: int) -> int:
    return 2 * number * math.prod(hidden[:-1]) * math.prod(lm_head_weight)


_FLOP_FORMULAS = {
    torch.ops.pdl_kernels.linear_cross_entropy: _forward_flops,
    torch.ops.pdl_kernels.linear_cross_entropy_backward: _backward_flops,
}


def _share_flop_formulas() -> None:
    """Register the formulas where the counter is imported; importing it for that would import Triton."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    for operator, formula in _FLOP_FORMULAS.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, counting.FlopCounterMode):  # has copied what was registered when it was made
            for operator in _FLOP_FORMULAS:
                counter.flop_registry.setdefault(operator, counting.flop_registry[operator])
