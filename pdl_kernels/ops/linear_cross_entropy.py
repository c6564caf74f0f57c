"""The output projection and the loss as one differentiable operation that never holds the logits of all tokens.

Where the reduction gives one number, all products happen in forward, for the upstream gradient that the caller expects.
The gradients wait in `accumulate_dtype` until backward multiplies them for another one and rounds them once. With
"none" each row waits for its own upstream gradient, and backward makes the logits again. Every later backward starts
from the saved tensors. Where tensors are traced, two functional operators do the same without mutation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_kernels import backends
from pdl_kernels.ops import flops
from pdl_kernels.ops.chunks import Gradients, Run
from pdl_kernels.ops.gradients import RefuseDoubleBackward, no_gradients, refuse
from pdl_kernels.ops.rows import as_operand, moved, on_device
from pdl_kernels.ops.sharded_chunks import make_run
from pdl_kernels.options import DECLARED, SCALARS, LinearInputs, LinearOptions, LinearOutputs, LossOptions

NAME = "pdl_linear_cross_entropy"


def linear_cross_entropy(
    inputs: LinearInputs,
    options: LossOptions,
    linear: LinearOptions,
    backend: str,
    group: str | None = None,  # its name
) -> LinearOutputs:
    """The loss of checked inputs, differentiable in the parameters. The other outputs serve the statistics."""
    hidden = inputs.hidden
    *tensors, seed, normalizer, expected_upstream = inputs
    traced = backends.is_traced(*tensors)
    if not torch.compiler.is_compiling():
        backends.refuse_transforms(NAME, hidden)
        backends.refuse_transforms(NAME, inputs.lm_head_weight)
    # What torch.jit.trace records must not depend on it: it checks its graph without grad. Backward does all there.
    enabled = torch.is_grad_enabled() and not torch.jit.is_tracing()
    needs = tuple(t is not None and t.requires_grad and enabled for t in inputs.parameters)
    dtype = hidden.dtype
    if dtype != torch.float64:
        dtype = backends.autocast_dtype(hidden.device) or dtype
    seed = _seed_tensor(seed, hidden) if linear.row_sampling > 0 else None
    if traced:
        if not torch.compiler.is_compiling():
            flops.share_formulas()
        denominator = as_operand(normalizer, hidden)
        outputs = _forward_operator(*tensors, seed, denominator, *options, *linear, backend, dtype, group or "", *needs)
        return LinearOutputs(*outputs[:4])
    inputs = inputs._replace(
        seed=seed,
        normalizer=on_device(normalizer, hidden.device),
        expected_upstream=on_device(expected_upstream, hidden.device),
    )
    call = _Call(inputs, options, linear, backends.choose_backend(backend, hidden.device, dtype), dtype, group)
    if not any(needs):
        return call.run((False, False, False)).forward()[0]
    loss = _LinearCrossEntropy.apply(*inputs.parameters, call)
    assert call.outputs is not None
    return call.outputs._replace(loss=loss)


def _seed_tensor(seed: Any, hidden: Tensor) -> Tensor:
    """The seed as a 0-d tensor like `hidden`, so that it is fake where hidden is. Without one, torch draws it."""
    if seed is None:
        return torch.randint_like(hidden.new_empty((), dtype=torch.int64), 2**31)
    return moved(seed, hidden.device) if isinstance(seed, Tensor) else hidden.new_full((), seed, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Eager mode


@dataclass
class _Call:
    """One call on its way through autograd, which itself passes nothing but tensors on."""

    inputs: LinearInputs
    options: LossOptions
    linear: LinearOptions
    backend: str
    dtype: torch.dtype  # of the products
    group: str | None
    outputs: LinearOutputs | None = None  # left here by forward

    def run(self, needs: tuple[bool, ...]) -> Run:
        return make_run(self.inputs, self.options, self.linear, self.backend, self.dtype, needs, self.group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        *needs, _ = ctx.needs_input_grad
        ctx.needs = tuple(needs)
        outputs, ctx.waiting = call.run(ctx.needs).forward()
        call.outputs = outputs
        ctx.settings = (call.options, call.linear, call.backend, call.dtype, ctx.needs, call.group)
        ctx.per_row = call.options.reduction == "none"
        *tensors, seed, _, _ = call.inputs
        ctx.save_for_backward(*tensors, seed, outputs.row_state, outputs.scalars)
        ctx.set_materialize_grads(False)
        return outputs.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return no_gradients(ctx, after=0)
        backends.refuse_transforms(f"the backward of {NAME}", upstream)
        *tensors, row_state, scalars = ctx.saved_tensors
        run = make_run(LinearInputs(*tensors), *ctx.settings)
        waiting, ctx.waiting = ctx.waiting, None
        with torch.no_grad():
            if ctx.per_row:
                gradients = run.finish(run.backward_rows(upstream, row_state, scalars), scalars, None)
            else:
                if waiting is None:  # handed over before
                    waiting = run.gradients_again(scalars)
                gradients = run.finish(waiting, scalars, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            sources = upstream, *run.inputs.parameters[:2]
            gradients = [None if g is None else RefuseDoubleBackward.apply(NAME, g, *sources) for g in gradients]
        return *gradients, None


# ---------------------------------------------------------------------------------------------------------------------
# Operators for tensors that are traced

_TENSORS = (
    "Tensor hidden, Tensor lm_head_weight, Tensor? bias, Tensor targets, Tensor? weights, Tensor? token_weights, "
    "Tensor? seed"
)
_SETTINGS = ", ".join(
    [
        *(declared.schema for declared in (*DECLARED[LossOptions], *DECLARED[LinearOptions])),
        "str backend, ScalarType dtype, str group",
        "bool needs_hidden, bool needs_weight, bool needs_bias",
    ]
)


class _Settings(NamedTuple):
    """The arguments that _SETTINGS names, grouped."""

    options: LossOptions
    linear: LinearOptions
    backend: str  # as requested
    dtype: torch.dtype
    group: str | None
    needs: tuple[bool, ...]

    def run(self, *tensors: Tensor | None) -> Run:
        inputs = LinearInputs(*tensors)  # type: ignore[arg-type]
        backend = backends.choose_backend(self.backend, inputs.hidden.device, self.dtype)
        return make_run(inputs, self.options, self.linear, backend, self.dtype, self.needs, self.group)


def _parse_settings(settings: Sequence[Any]) -> _Settings:
    first, second = len(DECLARED[LossOptions]), len(DECLARED[LossOptions]) + len(DECLARED[LinearOptions])
    options, linear = LossOptions(*settings[:first]), LinearOptions(*settings[first:second])
    backend, dtype, group, *needs = settings[second:]
    return _Settings(options, linear, backend, dtype, group or None, tuple(needs))


def _forward(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    seed: Tensor | None,
    normalizer: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, row state, scalars, token count, and the gradients for an upstream gradient of 1, empty where not needed.

    The gradient of hidden has a row for every token here: how many contribute is not known to the compiler.
    """
    taken = _parse_settings(settings)
    run = taken.run(hidden, lm_head_weight, bias, targets, weights, token_weights, seed, normalizer)
    outputs, (gradients, positions) = run.forward()
    if taken.options.reduction == "none":
        gradients = Gradients(None, None, None)
    to_hidden, to_weight, to_bias = (_or_empty(gradient, outputs.scalars) for gradient in gradients)
    if gradients.hidden is not None and positions is not None:
        zeros = to_hidden.new_zeros(hidden.numel() // hidden.shape[-1], hidden.shape[-1])
        to_hidden = zeros.index_copy_(0, positions, to_hidden)
    return (*outputs, to_hidden, to_weight, to_bias)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _fake_forward(
    hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None, targets: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    flops.share_formulas()  # with whoever counts a graph that is recorded here
    _, _, _, _, *settings = arguments
    options, linear, _, dtype, _, (needs_hidden, needs_weight, needs_bias) = _parse_settings(settings)
    per_row = options.reduction == "none"
    result = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.promote_types(dtype, linear.accumulate_dtype)

    def gradient(needed: bool, *shape: Any) -> Tensor:
        if per_row or not needed:
            return targets.new_empty((0,), dtype=result)
        return targets.new_empty(shape, dtype=sums)

    rows = targets.numel()
    V, H = lm_head_weight.shape
    return (
        targets.new_empty(targets.shape if per_row else (), dtype=result),
        targets.new_empty((2, rows if per_row else 0), dtype=result),
        targets.new_empty((len(SCALARS),), dtype=result),
        targets.new_empty((), dtype=torch.int64),
        gradient(needs_hidden, math.prod(hidden.shape[:-1]), H),
        gradient(needs_weight, V, H),
        gradient(needs_bias, V),
    )


def _backward(
    upstream: Tensor,
    to_hidden: Tensor,
    to_weight: Tensor,
    to_bias: Tensor,
    row_state: Tensor,
    scalars: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for `upstream`, from those that forward has formed if it has formed all that are needed."""
    tensors, settings = arguments[:7], _parse_settings(arguments[7:])
    per_row = settings.options.reduction == "none"
    parameters = LinearInputs(*tensors).parameters
    wanted = [parameter if needed else None for parameter, needed in zip(parameters, settings.needs, strict=True)]
    pairs = list(zip(wanted, (to_hidden, to_weight, to_bias), strict=True))
    # Where the call was recorded, fewer gradients may have been needed than here: then they do not wait.
    if not per_row and all(p is None or gradient.numel() == p.numel() for p, gradient in pairs):
        scaled = [
            upstream.new_empty(0) if p is None else (gradient * upstream).to(p.dtype).reshape(p.shape)
            for p, gradient in pairs
        ]
        return scaled[0], scaled[1], scaled[2]
    run = settings.run(*tensors)
    if per_row:
        finished = run.finish(run.backward_rows(upstream, row_state, scalars), scalars, None)
    else:
        finished = run.finish(run.gradients_again(scalars), scalars, upstream)
    first, second, third = (_or_empty(gradient, upstream) for gradient in finished)
    return first.contiguous(), second, third


def _fake_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, _, _, hidden, lm_head_weight, bias, *_, needs_hidden, needs_weight, needs_bias = arguments
    return tuple(
        torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if needed and parameter is not None
        else upstream.new_empty((0,))
        for parameter, needed in ((hidden, needs_hidden), (lm_head_weight, needs_weight), (bias, needs_bias))
    )


_forward_operator = torch.library.custom_op(
    "pdl_kernels::linear_cross_entropy", _forward, mutates_args=(),
    schema=f"({_TENSORS}, Tensor? normalizer, {_SETTINGS}) -> ({', '.join(['Tensor'] * 7)})",
)  # fmt: skip
_forward_operator.register_fake(_fake_forward)
_backward_operator = torch.library.custom_op(
    "pdl_kernels::linear_cross_entropy_backward", _backward, mutates_args=(),
    schema="(Tensor upstream, Tensor to_hidden, Tensor to_weight, Tensor to_bias, Tensor row_state, Tensor scalars, "
    f"{_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
_backward_operator.register_fake(_fake_backward)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs[:8]  # without the normalizer
    *ctx.settings, _, _, _ = inputs[8:]  # without what forward needed: backward knows what it needs
    _, row_state, scalars, _, *gradients = output
    # As eager mode saves them, and then the gradients: a checkpoint may run one of the two after the other.
    ctx.save_for_backward(*tensors, row_state, scalars, *gradients)
    ctx.mark_non_differentiable(*output[1:])


def _operator_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    needs = needs_hidden, needs_weight, needs_bias
    *tensors, row_state, scalars, to_hidden, to_weight, to_bias = ctx.saved_tensors
    gradients = _backward_operator(
        upstream, to_hidden, to_weight, to_bias, row_state, scalars, *tensors, *ctx.settings, *needs
    )
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return *wanted, *no_gradients(ctx, after=3)


_forward_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)
_backward_operator.register_autograd(lambda *_: refuse(NAME))
