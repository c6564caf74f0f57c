"""Which kernels run, in which shape, and how they are launched. The choices are pure functions of sizes."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_kernels.kernels import cross_entropy as kernels
from pdl_kernels.options import LossInputs, LossOptions, LossOutputs, RowOutputs

VECTOR_BYTES = 16  # one load or store instruction of a thread
MAX_SLICES = 64
REDUCE_BLOCK = 2048  # rows per step of the single-program kernels
INTERPRETER_MULTIPROCESSORS = 8  # stands in for a device, so that both one program per row and slices are exercised

# exp, log and fused multiply-add are meant to fuse: said here because Triton's default changes with its version.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
REDUCE_OPTIONS = {"num_warps": 16, **COMPILE_OPTIONS}  # of the single-program kernels


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
    unroll: int  # vectors per thread and step


class RowLaunch(NamedTuple):
    """How rows are spread over programs."""

    lanes: int
    unroll: int
    warps: int
    registers: int | None  # at most so many per thread, on NVIDIA
    slices: int
    slice_tiles: int  # a tile is unroll * lanes vectors


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def plan_rows(
    rows: int,
    vocab_size: int,
    itemsize: int,
    multiprocessors: int,
    *,
    two_passes: bool,
    smoothing: bool = False,
    unit_stride: bool = True,
    vectors: bool = True,
    warp_size: int = 32,
) -> RowLaunch:
    """Choose the shape of a row kernel's launch from sizes alone.

    Args:
        two_passes: the row is read twice and the second read is meant to hit the second-level cache.
        smoothing: the kernel also streams the weights. Its loss needs the whole row's sum before the second walk, so
            one program takes the row.
        unit_stride: the columns of a row are neighbours in memory.
        vectors: and they are read and written 16 bytes at a time.
    """
    vector = VECTOR_BYTES // itemsize
    # 64 bytes in flight per thread; 128 spill at 1024 threads, and so does anything but one vector with 64-bit offsets.
    unroll = 4 if unit_stride else 1
    row_bytes = vocab_size * itemsize
    # 1024 threads fit on a multiprocessor at 64 registers each. One row a program, so more warps a program means fewer
    # rows in flight: about 4 up to 64 KB, 2 up to 128 KB, 1 beyond, which keeps the rows in flight on an H200 under 40
    # of its 50 MB of second-level cache (a model of the cache, not measured on a GPU yet).
    max_warps = 8
    if two_passes:
        max_warps = 8 if row_bytes <= 80 * 1024 else 16 if row_bytes <= 160 * 1024 else 32
    # Streaming the weights too, or a load per column, take twice the registers, hence at most half the threads.
    heavy = smoothing or not unit_stride or not vectors
    max_warps = min(max_warps, (512 if heavy else 1024) // warp_size)
    warps = min(next_power_of_two(max(vocab_size // (warp_size * vector * unroll), 1)), max_warps)

    few_rows = not smoothing and 0 < rows < 2 * multiprocessors
    if few_rows:
        warps = min(warps, 8)
    tiles = -(-vocab_size // (warps * warp_size * vector * unroll))
    slice_tiles = -(-tiles // min(-(-2 * multiprocessors // rows), tiles, MAX_SLICES)) if few_rows else tiles
    registers = None if warps * warp_size < 512 else 128 if heavy else 64
    return RowLaunch(warps * warp_size, unroll, warps, registers, -(-tiles // slice_tiles), slice_tiles)


class Device(NamedTuple):
    """What the choices need to know of a device. benchmarks.roofline describes devices that are not there."""

    multiprocessors: int
    warp_size: int
    limits_registers: bool


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device(INTERPRETER_MULTIPROCESSORS, 32, False)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32), torch.version.hip is None)


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
    )


def row_compile_options(plan: RowLaunch, limits_registers: bool) -> dict[str, Any]:
    """Keyword arguments of a row kernel's launch.

    Large programs name their limit: left alone, the assembler at times spills to fit more of them than were planned.
    Small ones are better left alone, where a limit makes it use, and then spill, all it was given.
    """
    limit = {"maxnreg": plan.registers} if limits_registers and plan.registers else {}
    return {"num_warps": plan.warps, **limit, **COMPILE_OPTIONS}


class _RowCall:
    """One call's row kernels: their plan, their variant and the arguments that they share."""

    def __init__(self, inputs: LossInputs, options: LossOptions, gradient: Tensor | None, *, two_passes: bool) -> None:
        device = device_of(inputs.logits.device)
        self.inputs = inputs
        self.gradient = gradient
        self.plan = plan_rows(
            inputs.rows,
            inputs.vocab_size,
            inputs.logits.element_size(),
            device.multiprocessors,
            two_passes=two_passes,
            smoothing=options.label_smoothing > 0,
            unit_stride=has_unit_stride(inputs.logits),
            vectors=uses_vectors(inputs.logits, gradient),
            warp_size=device.warp_size,
        )
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
        kernels.loss_rows_kernel[(self.inputs.rows,)](
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
        two_passes = gradient is not None or options.label_smoothing > 0
        with _on_device(inputs.logits):
            call = _RowCall(inputs, options, gradient, two_passes=two_passes)
            run = call.sliced_loss_rows if call.plan.slices > 1 else call.loss_rows
            run(scalars, *outputs)
    return outputs


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
        call = _RowCall(inputs, options, gradient, two_passes=False)
        call.gradient_rows(scalars, row_state, upstream, unless_one=unless_one)
