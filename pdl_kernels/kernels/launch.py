"""How kernels are launched. Which ones, and in which shape, says planner.py.

What a launch of row kernels needs beside its tensors is worked out once for calls that are alike, and kept: see
`plan_key`. It holds no tensor. Triton itself looks at every launch's arguments, and compiles where they are new to it.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from pdl_kernels.kernels import planner, reductions
from pdl_kernels.kernels import row_kernels as kernels
from pdl_kernels.kernels.planner import (
    COMPILE_OPTIONS,
    VECTOR_BYTES,
    Device,
    Layout,
    RowLaunch,
    Variant,
    fusion_options,
    layout_of,
    make_variant,
    next_power_of_two,
    plan_rows,
    row_compile_options,
)
from pdl_kernels.kernels.single_pass import single_pass_rows_kernel
from pdl_kernels.options import SCALARS, LossInputs, LossOptions, LossOutputs, RowOutputs

_major, _minor, *_ = triton.__version__.split(".")
TRITON_VERSION = (int(_major), int(_minor))
REDUCE_BLOCK = 2048  # rows per step of the single-program kernels
INTERPRETER_MULTIPROCESSORS = 8  # stands in for a device, so that both one program per row and slices are exercised

REDUCE_OPTIONS = {"num_warps": 16, **COMPILE_OPTIONS}  # of the single-program kernels

CLUSTERS_VARIABLE = "PDL_KERNELS_CLUSTERS"
MAX_PLANS = 512  # kept; one takes a few kilobytes
_NOTHING = nullcontext()


class Plan(NamedTuple):
    """What a launch of row kernels needs beside its tensors. The numbers are in the order of the kernels' arguments."""

    launch: RowLaunch
    variant: Variant
    compile_options: dict[str, Any]
    shape: tuple[int, ...]  # rows, rows_inner, V, and the strides of the logits
    gradient_strides: tuple[int, ...]
    numbers: tuple[float, ...]  # of the options


# ---------------------------------------------------------------------------------------------------------------------
# The six functions that both backends have


def forward(inputs: LossInputs, options: LossOptions, gradient: Tensor | None) -> LossOutputs:
    """The loss, and its gradient for the expected upstream gradient written to `gradient` where one is given."""
    normalized = options.reduction in ("mean", "token_mean")
    if normalized or gradient is not None or options.label_smoothing > 0 or options.return_stats:
        scalars, token_count = denominators(inputs, options)
    else:
        scalars = torch.zeros(len(SCALARS), dtype=torch.float32, device=inputs.targets.device)
        token_count = None
    rows = loss_rows(inputs, options, scalars, gradient)
    loss = reduce_rows(rows, options, scalars, token_count)
    return LossOutputs(loss, rows.state, scalars, token_count)


def denominators(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """`LossOutputs.scalars`, statistics still missing, and the number of counted tokens. No logit is read."""
    _, targets, weights, token_weights, normalizer, expected_upstream, shard, _ = inputs
    if shard is not None:
        weights = shard.row_weights
    scalars = torch.empty(len(SCALARS), dtype=torch.float32, device=targets.device)
    token_count = scalars.new_empty(size=(), dtype=torch.int64)
    with on_device(scalars):
        reductions.denominators_kernel[(1,)](
            targets, weights, token_weights, normalizer, expected_upstream, scalars, token_count,
            targets.shape[0], inputs.vocab_size, options.ignore_index,
            options.reduction, isinstance(normalizer, float), isinstance(expected_upstream, float),
            options.label_smoothing > 0 and weights is not None and shard is None, REDUCE_BLOCK, shard is not None,
            **REDUCE_OPTIONS,
        )  # fmt: skip
    return scalars, token_count


def loss_rows(inputs: LossInputs, options: LossOptions, scalars: Tensor, gradient: Tensor | None) -> RowOutputs:
    """Each row's loss, and the gradient for the expected upstream gradient written to `gradient` where one is given.

    `gradient` may be the logits themselves.
    """
    rows = inputs.targets.shape[0]
    stats = scalars.new_empty(2, rows) if options.return_stats else None
    outputs = RowOutputs(scalars.new_empty(rows), scalars.new_empty(2, rows), stats)
    if rows > 0:
        with on_device(inputs.logits):
            *better, last = loss_plans(inputs, options, gradient)
            arguments = inputs, scalars, gradient, outputs
            if not any(_compiled(plan, *arguments) for plan in better):
                launch_loss_rows(last, *arguments)
    return outputs


def reduce_rows(rows: RowOutputs, options: LossOptions, scalars: Tensor, token_count: Tensor | None) -> Tensor:
    """The loss, (N,) for "none" and 0-d otherwise; the statistics go to `scalars`."""
    per_row = options.reduction == "none"
    if per_row and not options.return_stats:
        return rows.loss
    loss = None if per_row else scalars.new_empty(size=())
    with on_device(scalars):
        reductions.reduce_rows_kernel[(1,)](
            rows.loss, rows.stats, scalars, token_count, loss, rows.loss.numel(), options.return_stats, REDUCE_BLOCK,
            **REDUCE_OPTIONS,
        )  # fmt: skip
    return rows.loss if loss is None else loss


def backward(
    inputs: LossInputs,
    options: LossOptions,
    row_state: Tensor,
    scalars: Tensor,
    upstream: Tensor,
    gradient: Tensor,
    *,
    unless_expected: bool = False,
) -> None:
    """Write the gradient for `upstream`, (N,) with any stride or 0-d, to `gradient`.

    With `unless_expected` it already holds the one for the upstream gradient that `scalars` expects, and is left alone
    if they are equal; they are compared on the device. One rounding either way, and float16 gradients that need loss
    scaling do not underflow before they are scaled.
    """
    if gradient.numel() > 0:
        with on_device(inputs.logits):
            plan = gradient_plan(inputs, options, gradient)
            _launch_gradient_rows(plan, inputs, row_state, scalars, upstream, gradient, unless_expected=unless_expected)


def scale(gradient: Tensor, scalars: Tensor, upstream: Tensor) -> None:
    """Multiply a (rows_outer, rows_inner, V) gradient, formed for what `scalars` expects, for the 0-d `upstream`."""
    rows_outer, rows_inner, V = gradient.shape
    rows = rows_outer * rows_inner
    if rows == 0:
        return
    plan = _kept(_plan_gradient, gradient, LossOptions(), None)[0]
    with on_device(gradient):
        kernels.scale_rows_kernel[(rows, plan.launch.slices)](
            gradient, upstream, scalars, rows_inner, V, *gradient.stride(), plan.launch.slice_tiles, plan.variant,
            **plan.compile_options,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def launch_loss_rows(
    plan: Plan,
    inputs: LossInputs,
    scalars: Tensor,
    gradient: Tensor | None,
    outputs: RowOutputs,
) -> None:
    logits, *row_tensors = inputs[:4]
    launch, variant, compile_options, shape, gradient_strides, numbers = plan
    variant, of_shard = shard_arguments(inputs, variant)
    rows, slices = inputs.targets.shape[0], launch.slices
    if slices == 1:
        kernel = single_pass_rows_kernel if launch.kernel == planner.SINGLE_PASS else kernels.loss_rows_kernel
        kernel[(rows,)](
            logits, gradient, *row_tensors, scalars, *outputs, *shape, *gradient_strides, *numbers, variant,
            **of_shard, **compile_options,
        )  # fmt: skip
        return
    slice_state = scalars.new_empty(2, rows, slices)
    kernels.slice_rows_kernel[(rows, slices)](
        logits, *row_tensors, scalars, slice_state, *shape, *numbers, launch.slice_tiles, slices, variant,
        **of_shard, **compile_options,
    )  # fmt: skip
    kernels.merge_rows_kernel[(rows,)](
        logits, *row_tensors, scalars, slice_state, *outputs, *shape, *numbers, slices, next_power_of_two(slices),
        variant,
        **of_shard, num_warps=1, **fusion_options(softcap=variant.softcap),
    )  # fmt: skip
    if gradient is not None:
        _launch_gradient_rows(plan, inputs, outputs.state, scalars, None, gradient)


def _launch_gradient_rows(
    plan: Plan,
    inputs: LossInputs,
    row_state: Tensor,
    scalars: Tensor,
    upstream: Tensor | None,  # None: the expected one
    gradient: Tensor,
    *,
    unless_expected: bool = False,
) -> None:
    launch, variant, compile_options, shape, gradient_strides, numbers = plan
    variant, of_shard = shard_arguments(inputs, variant)
    upstream_stride = 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)
    kernels.gradient_rows_kernel[(inputs.targets.shape[0], launch.slices)](
        inputs.logits, gradient, *inputs[1:4], scalars, row_state, upstream,
        upstream_stride, *shape, *gradient_strides, *numbers, launch.slice_tiles, unless_expected, variant,
        **of_shard, **compile_options,
    )  # fmt: skip


def shard_arguments(inputs: LossInputs, variant: Variant) -> tuple[Variant, dict[str, Any]]:
    """The variant, and what row kernels take besides, where the logits hold some of the columns."""
    if inputs.shard is None:
        return variant, {}
    first, vocab_size, row_weights = inputs.shard
    of_shard = {"row_weights": row_weights, "first_column": first, "vocab_size": vocab_size}
    return variant._replace(shard=True), of_shard


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' device is."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


_refused: set[tuple[tuple[int, int], RowLaunch]] = set()  # by capability: plans that Triton cannot compile


def was_refused(launch: RowLaunch, device: Device) -> bool:
    """Whether an earlier launch of this plan could not be compiled."""
    return (device.capability, launch) in _refused


def _compiled(plan: Plan, inputs: LossInputs, *arguments: Any) -> bool:
    """Launch the plan; False, with a warning the first time, where Triton cannot compile it."""
    device = device_of(inputs.logits.device)
    if was_refused(plan.launch, device):
        return False
    try:
        launch_loss_rows(plan, inputs, *arguments)
    except (TritonError, RuntimeError) as error:
        if not (isinstance(error, TritonError) or "PassManager" in str(error)):
            raise  # not the compiler
        _refused.add((device.capability, plan.launch))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"Triton {triton.__version__} cannot compile the single-pass kernel ({reason}); the two-pass kernel takes "
            "its place, which reads the logits twice",
            stacklevel=2,
        )
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def loss_plans(inputs: LossInputs, options: LossOptions, gradient: Tensor | None) -> list[Plan]:
    """For the kernels that form losses and, where one is given, the gradient: best first."""
    return _kept(_plan_loss, inputs.logits, options, gradient)


def gradient_plan(inputs: LossInputs, options: LossOptions, gradient: Tensor) -> Plan:
    """For the kernel that forms the gradient alone."""
    # Statistics belong to forward: without them backward needs one variant fewer.
    if options.return_stats:
        options = options._replace(return_stats=False)
    return _kept(_plan_gradient, inputs.logits, options, gradient)[0]


_plans: dict[tuple[Any, ...], list[Plan]] = {}
_plan_loss_launches = planner.plan_loss


@contextmanager
def planned_by(plan_loss: Callable[..., list[RowLaunch]]) -> Iterator[None]:
    """Within, this function takes the place of `planner.plan_loss`: for tests, benchmarks and `doctor --check`."""
    global _plan_loss_launches
    before, _plan_loss_launches = _plan_loss_launches, plan_loss
    try:
        yield
    finally:
        _plan_loss_launches = before


def _kept(plan: Callable[..., list[Plan]], logits: Tensor, options: LossOptions, gradient: Tensor | None) -> list[Plan]:
    key = plan_key(plan, logits, options, gradient)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        found = _plans[key] = plan(logits, options, gradient)
    return found


def plan_key(
    plan: Callable[..., list[Plan]], logits: Tensor, options: LossOptions, gradient: Tensor | None
) -> tuple[Any, ...]:
    """Everything that plans depend on: calls with equal keys have equal plans."""
    return (
        plan, _plan_loss_launches, clusters_wanted(),
        device_of(logits.device),
        logits.shape, logits.stride(), logits.dtype, logits.data_ptr() % VECTOR_BYTES,
        options,
        None if gradient is None else (gradient.stride(), gradient.data_ptr() % VECTOR_BYTES),
    )  # fmt: skip


def clusters_wanted() -> bool | None:
    """Whether rows may be held by clusters of more than one block; None: where that has been shown right."""
    value = os.environ.get(CLUSTERS_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{CLUSTERS_VARIABLE} is {value!r}; accepted are 0, 1, or not set")
    return None if value == "" else value == "1"


def _plan_loss(logits: Tensor, options: LossOptions, gradient: Tensor | None) -> list[Plan]:
    device, layout = device_of(logits.device), layout_of(logits, gradient)
    rows_outer, rows_inner, V = logits.shape
    launches = _plan_loss_launches(
        rows_outer * rows_inner,
        V,
        logits.element_size(),
        device,
        TRITON_VERSION,
        gradient=gradient is not None,
        smoothing=options.label_smoothing > 0,
        transform=options.softcap is not None or options.logit_scale != 1,
        stats=options.return_stats,
        z_loss=options.z_loss > 0,
        unit_stride=layout.unit_stride,
        vectors=layout.vectors,
        head=layout.logits == "head",
        clusters=clusters_wanted(),
    )
    plans = []
    for launch in launches:
        plans.append(make_plan(logits, options, gradient, layout, launch, device))
    return plans


def _plan_gradient(logits: Tensor, options: LossOptions, gradient: Tensor | None) -> list[Plan]:
    """One plan; without a gradient, for a finished one in the place of the logits."""
    device, layout = device_of(logits.device), layout_of(logits, gradient)
    rows_outer, rows_inner, V = logits.shape
    launch = plan_rows(
        rows_outer * rows_inner,
        V,
        logits.element_size(),
        device.multiprocessors,
        two_passes=False,
        smoothing=options.label_smoothing > 0,
        unit_stride=layout.unit_stride,
        vectors=layout.vectors,
        warp_size=device.warp_size,
    )
    return [make_plan(logits, options, gradient, layout, launch, device)]


def make_plan(
    logits: Tensor, options: LossOptions, gradient: Tensor | None, layout: Layout, launch: RowLaunch, device: Device
) -> Plan:
    rows_outer, rows_inner, V = logits.shape
    variant = make_variant(V, logits.element_size(), options, layout, launch)
    return Plan(
        launch,
        variant,
        row_compile_options(launch, device.limits_registers, softcap=variant.softcap),
        (rows_outer * rows_inner, rows_inner, V, *logits.stride()),
        (0, 0, 1) if gradient is None else gradient.stride(),
        numbers_of(options),
    )


def numbers_of(options: LossOptions) -> tuple[float, ...]:
    """The options' numbers in the order of the kernels' arguments."""
    floats = options.label_smoothing, options.z_loss, options.softcap or 1.0, options.logit_scale
    return options.ignore_index, *map(float, floats)


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device(INTERPRETER_MULTIPROCESSORS, 32, False)
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    capability = (properties.major, properties.minor) if nvidia else (0, 0)
    return Device(
        properties.multi_processor_count, getattr(properties, "warp_size", 32), nvidia, capability,
        getattr(properties, "L2_cache_size", 0),
    )  # fmt: skip
