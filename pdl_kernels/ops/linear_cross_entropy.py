"""The output projection and the loss as one differentiable operation that never holds the logits of all tokens.

Where the reduction gives one number, all products happen in forward, for the upstream gradient that the caller expects;
the gradients wait in `accumulate_dtype` until backward multiplies them for another one and rounds them once. For "none"
each row waits for its own upstream gradient, and backward makes the logits again. Every later backward starts from the
saved tensors.
"""

from typing import Any

import torch
from torch import Tensor

from pdl_kernels.backends import choose_backend
from pdl_kernels.ops import linear_operators
from pdl_kernels.ops.chunks import Run
from pdl_kernels.ops.tracing import autocast_dtype, refuse_transforms
from pdl_kernels.options import LinearInputs, LinearOptions, LinearOutputs, LossOptions

NAME = "pdl_linear_cross_entropy"
DOUBLE_BACKWARD_MESSAGE = (
    f"{NAME} cannot be differentiated twice: its gradients are formed by kernels that autograd does not see; for "
    "second derivatives use torch.nn.functional.linear and cross_entropy"
)


def linear_cross_entropy(
    inputs: LinearInputs,
    normalizer: Tensor | float | None,
    expected_upstream: Tensor | float,
    options: LossOptions,
    linear: LinearOptions,
    backend: str,
    *,
    traced: bool = False,  # see tracing.py
) -> LinearOutputs:
    """Only `loss` is differentiable, in hidden, lm_head_weight and bias."""
    differentiable = inputs[:3]
    # What torch.jit.trace records must not depend on it: it checks its graph without grad. Backward does all there.
    enabled = torch.is_grad_enabled() and not torch.jit.is_tracing()
    needs = tuple(t is not None and t.requires_grad and enabled for t in differentiable)
    dtype = inputs.hidden.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(inputs.hidden.device) or dtype
    if traced:
        return linear_operators.forward(inputs, normalizer, options, linear, backend, dtype, needs)
    backend = choose_backend(backend, inputs.hidden.device, dtype)
    if not any(needs):
        return Run(inputs, options, linear, backend, dtype, (False,) * 3).forward(normalizer)[0]
    numbers = normalizer, expected_upstream
    return LinearOutputs(*_LinearCrossEntropy.apply(*inputs, numbers, options, linear, backend, dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, numbers, options, linear, backend, dtype = arguments
        inputs = LinearInputs(*tensors)
        needs = tuple(ctx.needs_input_grad[:3])
        outputs, ctx.gradients, ctx.index = Run(inputs, options, linear, backend, dtype, needs).forward(*numbers)
        ctx.settings = (options, linear, backend, dtype, needs)
        ctx.handed_over = options.reduction == "none"
        ctx.save_for_backward(*inputs, outputs.row_state, outputs.scalars)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 12
        refuse_transforms(f"the backward of {NAME}", upstream)
        *tensors, row_state, scalars = ctx.saved_tensors
        run = Run(LinearInputs(*tensors), *ctx.settings)
        with torch.no_grad():
            if ctx.settings[0].reduction == "none":
                finished = run.finish(*run.backward_rows(upstream, row_state, scalars), scalars, None)
            else:
                gradients, index = ctx.gradients, ctx.index
                if ctx.handed_over:
                    gradients, index = run.gradients_again(scalars)
                ctx.gradients, ctx.handed_over = None, True
                finished = run.finish(gradients, index, scalars, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            finished = [
                None if gradient is None else _RefuseDoubleBackward.apply(gradient, upstream, *tensors[:2])
                for gradient in finished
            ]
        return (*finished, *(None,) * 9)


class _RefuseDoubleBackward(torch.autograd.Function):
    """The identity on a gradient, so that differentiating it again raises instead of being silently wrong."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(DOUBLE_BACKWARD_MESSAGE)
