"""How kernels are launched. Which ones, and in which shape, says planner.py."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from pdl_kernels.kernels import cross_entropy as kernels
from pdl_kernels.kernels import planner
from pdl_kernels.kernels.planner import VECTOR_BYTES, Device, RowLaunch, next_power_of_two, plan_rows
from pdl_kernels.kernels.single_pass import single_pass_rows_kernel
from pdl_kernels.options import LossInputs, LossOptions, LossOutputs, RowOutputs

REDUCE_BLOCK = 2048  # rows per step of the single-program kernels
INTERPRETER_MULTIPROCESSORS = 8  # stands in for a device, so that both one program per row and slices are exercised

# exp, log and fused multiply-add are meant to fuse: said here because Triton's default changes with its version.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
REDUCE_OPTIONS = {"num_warps": 16, **COMPILE_OPTIONS}  # of the single-program kernels

_major, _minor, *_ = triton.__version__.split(".")
TRITON_VERSION = (int(_major), int(_minor))


class Variant(NamedTuple):
    """Everything about a row kernel that is fixed at compilation."""

    normalized: bool  # a denominator is applied
    smoothing: bool
    z_loss: bool
    softcap: bool
    scale: bool
    stats: bool
    layout: str  # of the logits: "aligned" (every row starts on 16 bytes), "head" (some do not), "any"
    gradient_layout: str  # the same for the gradient; "head" means: aligned where the logits are
    unit_stride: bool  # the vocabulary dimension has stride 1
    edges: bool  # there may be columns outside the interior
    vector: int  # columns in 16 bytes
    lanes: int  # threads
    unroll: int  # vectors per thread and step; in a row held on chip 1
    chunks: int = 0  # of lanes * vector columns that hold a row on chip
    full_chunks: int = 0  # of them, those that are inside every row
    hold_exps: bool = False  # exponentials are held instead of logits


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device(INTERPRETER_MULTIPROCESSORS, 32, False)
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    capability = (properties.major, properties.minor) if nvidia else (0, 0)
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32), nvidia, capability)


@contextmanager
def _on_device(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device, whatever the tensors' device is."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def row_alignment(tensor: Tensor) -> tuple[bool, bool]:
    """(the storage starts on 16 bytes and the last stride is 1, every row starts on 16 bytes)."""
    vector = VECTOR_BYTES // tensor.element_size()
    based = tensor.data_ptr() % VECTOR_BYTES == 0 and has_unit_stride(tensor)
    return based, based and all(stride % vector == 0 for stride in row_strides(tensor))


def row_strides(tensor: Tensor) -> list[int]:
    """The strides between rows that matter: those of dimensions with more than one entry."""
    return [tensor.stride(d) for d in range(tensor.dim() - 1) if tensor.shape[d] > 1]


def has_unit_stride(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def layouts(logits: Tensor, gradient: Tensor | None) -> tuple[str, str]:
    """Variant.layout and Variant.gradient_layout."""
    based, aligned = row_alignment(logits)
    layout = "aligned" if aligned else "head" if based else "any"
    if gradient is not None and layout != "any":
        gradient_based, gradient_aligned = row_alignment(gradient)
        if (aligned and gradient_aligned) or (gradient_based and row_strides(gradient) == row_strides(logits)):
            return layout, layout
    return layout, "any"


def uses_vectors(logits: Tensor, gradient: Tensor | None) -> bool:
    """Whether the logits, and the gradient where there is one, are accessed 16 bytes at a time."""
    layout, gradient_layout = layouts(logits, gradient)
    return layout != "any" and (gradient is None or gradient_layout != "any")


def make_variant(logits: Tensor, options: LossOptions, gradient: Tensor | None, launch: RowLaunch) -> Variant:
    """What to compile for (rows_outer, rows_inner, V) logits, a gradient of the same shape, and these options."""
    layout, gradient_layout = layouts(logits, gradient)
    vector = VECTOR_BYTES // logits.element_size()
    return Variant(
        normalized=options.reduction in ("mean", "token_mean"),
        smoothing=options.label_smoothing > 0,
        z_loss=options.z_loss > 0,
        softcap=options.softcap is not None,
        scale=options.logit_scale != 1,
        stats=options.return_stats,
        layout=layout,
        gradient_layout=gradient_layout,
        unit_stride=has_unit_stride(logits),
        edges=layout == "head" or logits.shape[-1] % vector != 0,
        vector=vector,
        lanes=launch.lanes,
        unroll=launch.unroll,
        chunks=launch.chunks,
        full_chunks=launch.full_chunks,
        # float32 logits and exponentials take the same registers, and the second exponential is saved.
        hold_exps=launch.chunks > 0 and vector == 4 and options.label_smoothing == 0 and not transforms(options),
    )


def transforms(options: LossOptions) -> bool:
    """Whether the loss sees other numbers than the logits."""
    return options.softcap is not None or options.logit_scale != 1


def row_compile_options(plan: RowLaunch, limits_registers: bool) -> dict[str, Any]:
    """Keyword arguments of a row kernel's launch.

    Large programs name their limit: left alone, the assembler at times spills to fit more of them than were planned.
    Small ones are better left alone, where a limit makes it use, and then spill, all it was given.
    """
    limit = {"maxnreg": plan.registers} if limits_registers and plan.registers else {}
    cluster = {"num_ctas": plan.ctas} if plan.ctas > 1 else {}
    return {"num_warps": plan.warps, **cluster, **limit, **COMPILE_OPTIONS}


class _RowCall:
    """One call's row kernels: their plan, their variant and the arguments that they share."""

    def __init__(
        self, inputs: LossInputs, options: LossOptions, gradient: Tensor | None, plan: RowLaunch, device: Device
    ) -> None:
        self.inputs = inputs
        self.gradient = gradient
        self.plan = plan
        self.variant = make_variant(inputs.logits, options, gradient, self.plan)
        strides = inputs.logits.stride()
        self.tensors = (inputs.targets, inputs.weights, inputs.token_weights)
        self.shape = (inputs.rows, inputs.logits.shape[1], inputs.vocab_size, *strides)
        self.gradient_strides = (0, 0, 1) if gradient is None else gradient.stride()
        self.numbers = (
            options.ignore_index,
            float(options.label_smoothing),
            float(options.z_loss),
            float(options.softcap or 1.0),
            float(options.logit_scale),
        )
        self.compile_options = row_compile_options(self.plan, device.limits_registers)

    def loss_rows(self, scalars: Tensor, row_loss: Tensor, row_state: Tensor, row_stats: Tensor | None) -> None:
        held = self.plan.kernel == planner.SINGLE_PASS
        kernel = single_pass_rows_kernel if held else kernels.loss_rows_kernel
        kernel[(self.inputs.rows,)](
            self.inputs.logits, self.gradient, *self.tensors, scalars, row_loss, row_state, row_stats,
            *self.shape, *self.gradient_strides, *self.numbers, self.variant, **self.compile_options,
        )  # fmt: skip

    def sliced_loss_rows(self, scalars: Tensor, row_loss: Tensor, row_state: Tensor, row_stats: Tensor | None) -> None:
        rows, slices = self.inputs.rows, self.plan.slices
        slice_state = torch.empty(2, rows, slices, dtype=torch.float32, device=scalars.device)
        kernels.slice_rows_kernel[(rows, slices)](
            self.inputs.logits, *self.tensors, scalars, slice_state,
            *self.shape, *self.numbers, self.plan.slice_tiles, slices, self.variant, **self.compile_options,
        )  # fmt: skip
        kernels.merge_rows_kernel[(rows,)](
            self.inputs.logits, *self.tensors, scalars, slice_state, row_loss, row_state, row_stats,
            *self.shape, *self.numbers, slices, next_power_of_two(slices), self.variant,
            num_warps=1, **COMPILE_OPTIONS,
        )  # fmt: skip
        if self.gradient is not None:
            self.gradient_rows(scalars, row_state, None, unless_one=False)

    def gradient_rows(self, scalars: Tensor, row_state: Tensor, upstream: Tensor | None, *, unless_one: bool) -> None:
        upstream_stride = 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)
        kernels.gradient_rows_kernel[(self.inputs.rows, self.plan.slices)](
            self.inputs.logits, self.gradient, *self.tensors, scalars, row_state, upstream, upstream_stride,
            *self.shape, *self.gradient_strides, *self.numbers, self.plan.slice_tiles, unless_one, self.variant,
            **self.compile_options,
        )  # fmt: skip


def forward(inputs: LossInputs, options: LossOptions, gradient: Tensor | None) -> LossOutputs:
    """The loss, and its gradient for an upstream gradient of 1 written to `gradient` where one is given."""
    scalars, token_count = denominators(inputs, options)
    rows = loss_rows(inputs, options, scalars, gradient)
    loss = reduce_rows(rows, options, scalars, token_count)
    return LossOutputs(loss, rows.state, scalars, token_count)


def denominators(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """`LossOutputs.scalars`, statistics still missing, and the number of counted tokens. No logit is read."""
    needed = options.reduction in ("mean", "token_mean") or options.label_smoothing > 0 or options.return_stats
    make = torch.empty if needed else torch.zeros
    scalars = make(6, dtype=torch.float32, device=inputs.targets.device)
    token_count = make((), dtype=torch.int64, device=inputs.targets.device)
    if needed:
        with _on_device(inputs.targets):
            kernels.denominators_kernel[(1,)](
                inputs.targets, inputs.weights, inputs.token_weights, inputs.normalizer, scalars, token_count,
                inputs.rows, inputs.vocab_size, options.ignore_index,
                options.reduction, isinstance(inputs.normalizer, float),
                options.label_smoothing > 0 and inputs.weights is not None, REDUCE_BLOCK,
                **REDUCE_OPTIONS,
            )  # fmt: skip
    return scalars, token_count


def loss_rows(inputs: LossInputs, options: LossOptions, scalars: Tensor, gradient: Tensor | None) -> RowOutputs:
    """Each row's loss, and the gradient for an upstream gradient of 1 written to `gradient` where one is given.

    `gradient` may be the logits themselves.
    """
    rows = inputs.rows
    outputs = RowOutputs(
        torch.empty(rows, dtype=torch.float32, device=scalars.device),
        torch.empty(2, rows, dtype=torch.float32, device=scalars.device),
        torch.empty(2, rows, dtype=torch.float32, device=scalars.device) if options.return_stats else None,
    )
    if rows > 0:
        device = device_of(inputs.logits.device)
        with _on_device(inputs.logits):
            for plan in loss_plans(inputs, options, gradient, device):
                call = _RowCall(inputs, options, gradient, plan, device)
                run = call.sliced_loss_rows if plan.slices > 1 else call.loss_rows
                if _compiles(plan, device, lambda: run(scalars, *outputs)):  # noqa: B023 (called at once)
                    break
    return outputs


def loss_plans(inputs: LossInputs, options: LossOptions, gradient: Tensor | None, device: Device) -> list[RowLaunch]:
    """The launches that can serve, best first. PDL_KERNELS_FORCE_KERNEL, meant for tests, names the only one."""
    itemsize = inputs.logits.element_size()
    unit_stride, vectors = has_unit_stride(inputs.logits), uses_vectors(inputs.logits, gradient)
    head = "head" in layouts(inputs.logits, gradient)
    smoothing = options.label_smoothing > 0
    forced = os.environ.get("PDL_KERNELS_FORCE_KERNEL")
    if forced not in (None, *planner.KERNELS):
        raise ValueError(f"PDL_KERNELS_FORCE_KERNEL is {forced!r}; accepted are {', '.join(planner.KERNELS)}")
    if gradient is not None and forced is None:
        return planner.plan_loss_and_gradient(
            inputs.rows,
            inputs.vocab_size,
            itemsize,
            device,
            TRITON_VERSION,
            smoothing=smoothing,
            transform=transforms(options),
            stats=options.return_stats,
            z_loss=options.z_loss > 0,
            unit_stride=unit_stride,
            vectors=vectors,
            head=head,
        )
    if forced == planner.SINGLE_PASS and gradient is not None and vectors:
        warps = 1 if device.capability == (0, 0) else 4
        return [planner.held_row(inputs.vocab_size, itemsize, warps=warps, ctas=1, registers=None, head=head)]
    rows = planner.MANY_ROWS if forced == planner.TWO_PASSES else inputs.rows
    return [
        plan_rows(
            rows,
            inputs.vocab_size,
            itemsize,
            device.multiprocessors,
            two_passes=gradient is not None or smoothing,
            smoothing=smoothing,
            unit_stride=unit_stride,
            vectors=vectors,
            warp_size=device.warp_size,
        )
    ]


_refused: set[tuple[tuple[int, int], RowLaunch]] = set()  # by capability: plans that Triton cannot compile


def was_refused(plan: RowLaunch, device: Device) -> bool:
    """Whether an earlier launch of this plan could not be compiled."""
    return (device.capability, plan) in _refused


def _compiles(plan: RowLaunch, device: Device, run: Callable[[], None]) -> bool:
    """Run it; False, with a warning the first time, where Triton cannot compile a plan that has an alternative."""
    if plan.kernel != planner.SINGLE_PASS:
        run()
        return True
    if was_refused(plan, device):
        return False
    try:
        run()
    except (TritonError, RuntimeError) as error:
        if not (isinstance(error, TritonError) or "PassManager" in str(error)):
            raise  # not the compiler
        _refused.add((device.capability, plan))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"Triton {triton.__version__} cannot compile the single-pass kernel ({reason}); the two-pass kernel takes "
            "its place, which reads the logits twice",
            stacklevel=2,
        )
        return False
    return True


def reduce_rows(rows: RowOutputs, options: LossOptions, scalars: Tensor, token_count: Tensor) -> Tensor:
    """The loss, (N,) for "none" and 0-d otherwise; the statistics go to `scalars`."""
    per_row = options.reduction == "none"
    loss = rows.loss if per_row else torch.empty((), dtype=torch.float32, device=scalars.device)
    if not per_row or options.return_stats:
        with _on_device(scalars):
            kernels.reduce_rows_kernel[(1,)](
                rows.loss, rows.stats, scalars, token_count, None if per_row else loss, rows.loss.numel(),
                options.return_stats, REDUCE_BLOCK, **REDUCE_OPTIONS,
            )  # fmt: skip
    return loss


def backward(
    inputs: LossInputs, options: LossOptions, row_state: Tensor, scalars: Tensor, upstream: Tensor, gradient: Tensor
) -> None:
    """Write the gradient for `upstream`, (N,) with any stride or 0-d, to `gradient`."""
    _gradient(inputs, options, row_state, scalars, upstream, gradient, unless_one=False)


def adjust(
    inputs: LossInputs | None,
    options: LossOptions,
    row_state: Tensor | None,
    scalars: Tensor | None,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """Make `gradient`, formed for an upstream gradient of 1, right for the 0-d `upstream`, without reading it here.

    From the logits while they are still there: one rounding, and fp16 gradients that need loss scaling do not
    underflow before they are scaled. Otherwise by multiplying.
    """
    if inputs is not None and row_state is not None and scalars is not None:
        _gradient(inputs, options, row_state, scalars, upstream, gradient, unless_one=True)
        return
    rows_outer, rows_inner, V = gradient.shape
    rows = rows_outer * rows_inner
    if rows == 0:
        return
    device = device_of(gradient.device)
    plan = plan_rows(
        rows, V, gradient.element_size(), device.multiprocessors, two_passes=False,
        unit_stride=has_unit_stride(gradient), vectors=uses_vectors(gradient, None), warp_size=device.warp_size,
    )  # fmt: skip
    variant = make_variant(gradient, LossOptions(), None, plan)
    with _on_device(gradient):
        kernels.scale_rows_kernel[(rows, plan.slices)](
            gradient, upstream, rows_inner, V, *gradient.stride(), plan.slice_tiles, variant,
            **row_compile_options(plan, device.limits_registers),
        )  # fmt: skip


def _gradient(
    inputs: LossInputs,
    options: LossOptions,
    row_state: Tensor,
    scalars: Tensor,
    upstream: Tensor,
    gradient: Tensor,
    *,
    unless_one: bool,
) -> None:
    if inputs.rows == 0:
        return
    # Statistics belong to forward: without them backward needs one variant fewer.
    options = options._replace(return_stats=False)
    with _on_device(inputs.logits):
        device = device_of(inputs.logits.device)
        plan = plan_rows(
            inputs.rows,
            inputs.vocab_size,
            inputs.logits.element_size(),
            device.multiprocessors,
            two_passes=False,
            smoothing=options.label_smoothing > 0,
            unit_stride=has_unit_stride(inputs.logits),
            vectors=uses_vectors(inputs.logits, gradient),
            warp_size=device.warp_size,
        )
        call = _RowCall(inputs, options, gradient, plan, device)
        call.gradient_rows(scalars, row_state, upstream, unless_one=unless_one)
