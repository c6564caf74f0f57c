"""How kernels are launched. Which ones, and in which shape, says planner.py."""

import functools
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from pdl_kernels.kernels import cross_entropy as kernels
from pdl_kernels.kernels import planner
from pdl_kernels.kernels.launcher import TRITON_VERSION, Launcher, direct_stream
from pdl_kernels.kernels.planner import VECTOR_BYTES, Device, RowLaunch, next_power_of_two, plan_rows
from pdl_kernels.kernels.single_pass import single_pass_rows_kernel
from pdl_kernels.options import SCALARS, LossInputs, LossOptions, LossOutputs, RowOutputs

REDUCE_BLOCK = 2048  # rows per step of the single-program kernels
INTERPRETER_MULTIPROCESSORS = 8  # stands in for a device, so that both one program per row and slices are exercised

# exp, log and fused multiply-add are meant to fuse: said here because Triton's default changes with its version.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
# A capped logit is a product. Where the compiler fuses it with the subtraction that follows, one of two equal logits is
# rounded and the other is not, and exp(z - z) is not 1. What has to fuse says tl.fma.
SOFTCAP_OPTIONS = {"enable_fp_fusion": False}
REDUCE_OPTIONS = {"num_warps": 16, **COMPILE_OPTIONS}  # of the single-program kernels

FORCE_VARIABLE = "PDL_KERNELS_FORCE_KERNEL"  # meant for tests: the one kernel that forms losses

RowTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # LossInputs without the normalizer
_NOTHING = nullcontext()


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
    return Device(
        properties.multi_processor_count, getattr(properties, "warp_size", 32), nvidia, capability,
        getattr(properties, "L2_cache_size", 0),
    )  # fmt: skip


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' device is."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


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


def row_compile_options(plan: RowLaunch, limits_registers: bool, *, softcap: bool = False) -> dict[str, Any]:
    """Keyword arguments of a row kernel's launch.

    Large programs name their limit: left alone, the assembler at times spills to fit more of them than were planned.
    Small ones are better left alone, where a limit makes it use, and then spill, all it was given.
    """
    limit = {"maxnreg": plan.registers} if limits_registers and plan.registers else {}
    cluster = {"num_ctas": plan.ctas} if plan.ctas > 1 else {}
    return {"num_warps": plan.warps, **cluster, **limit, **fusion_options(softcap)}


def fusion_options(softcap: bool) -> dict[str, Any]:
    return SOFTCAP_OPTIONS if softcap else COMPILE_OPTIONS


class RowCall:
    """The row kernels of one call: their plan, their variant and the numbers that they share. It holds no tensor.

    It fits all tensors with the shapes, strides, dtypes, device and alignment of those that it was made for.
    """

    def __init__(
        self, inputs: LossInputs, options: LossOptions, gradient: Tensor | None, plan: RowLaunch, device: Device
    ) -> None:
        self.rows = inputs.rows
        self.plan = plan
        self.device = device
        self.variant = make_variant(inputs.logits, options, gradient, plan)
        self.shape = (inputs.rows, inputs.logits.shape[1], inputs.vocab_size, *inputs.logits.stride())
        self.gradient_strides = (0, 0, 1) if gradient is None else gradient.stride()
        self.numbers = (
            options.ignore_index,
            float(options.label_smoothing),
            float(options.z_loss),
            float(options.softcap or 1.0),
            float(options.logit_scale),
        )
        self.compile_options = row_compile_options(plan, device.limits_registers, softcap=self.variant.softcap)
        self._gradient_launchers: dict[tuple[int, bool], Launcher] = {}

    def loss_rows(
        self, tensors: RowTensors, gradient: Tensor | None, scalars: Tensor, outputs: RowOutputs, stream: int | None
    ) -> None:
        if self.plan.slices == 1:
            self._loss_launcher(tensors[0], gradient, *tensors[1:], scalars, *outputs, stream=stream)
            return
        slice_state = scalars.new_empty(2, self.rows, self.plan.slices)
        self._slice_launcher(*tensors, scalars, slice_state, stream=stream)
        self._merge_launcher(*tensors, scalars, slice_state, *outputs, stream=stream)
        if gradient is not None:
            self.gradient_rows(tensors, gradient, scalars, outputs.state, None, None, stream)

    def gradient_rows(
        self,
        tensors: RowTensors,
        gradient: Tensor,
        scalars: Tensor,
        row_state: Tensor,
        upstream: Tensor | None,
        remembered: Tensor | None,
        stream: int | None,
        *,
        unless_expected: bool = False,
    ) -> None:
        upstream_stride = 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)
        launcher = self._gradient_launchers.get((upstream_stride, unless_expected))
        if launcher is None:
            numbers = (
                upstream_stride, *self.shape, *self.gradient_strides, *self.numbers,
                self.plan.slice_tiles, unless_expected, self.variant,
            )  # fmt: skip
            grid = (self.rows, self.plan.slices)
            launcher = Launcher(kernels.gradient_rows_kernel, grid, numbers, self.compile_options)
            self._gradient_launchers[upstream_stride, unless_expected] = launcher
        launcher(tensors[0], gradient, *tensors[1:], scalars, row_state, upstream, remembered, stream=stream)

    @functools.cached_property
    def _loss_launcher(self) -> Launcher:
        held = self.plan.kernel == planner.SINGLE_PASS
        kernel = single_pass_rows_kernel if held else kernels.loss_rows_kernel
        numbers = (*self.shape, *self.gradient_strides, *self.numbers, self.variant)
        return Launcher(kernel, (self.rows,), numbers, self.compile_options)

    @functools.cached_property
    def _slice_launcher(self) -> Launcher:
        numbers = (*self.shape, *self.numbers, self.plan.slice_tiles, self.plan.slices, self.variant)
        return Launcher(kernels.slice_rows_kernel, (self.rows, self.plan.slices), numbers, self.compile_options)

    @functools.cached_property
    def _merge_launcher(self) -> Launcher:
        slices = self.plan.slices
        numbers = (*self.shape, *self.numbers, slices, next_power_of_two(slices), self.variant)
        options = {"num_warps": 1, **fusion_options(self.variant.softcap)}
        return Launcher(kernels.merge_rows_kernel, (self.rows,), numbers, options)


class _LossRows:
    """The row kernels of `loss_rows`: the best plan that Triton can compile. It holds no tensor, as RowCall."""

    def __init__(self, inputs: LossInputs, options: LossOptions, gradient: Tensor | None) -> None:
        device = device_of(inputs.logits.device)
        plans = loss_plans(inputs, options, gradient, device) if inputs.rows > 0 else []
        self.calls = [RowCall(inputs, options, gradient, plan, device) for plan in plans]  # best first
        self.chosen: RowCall | None = None

    def __call__(
        self, tensors: RowTensors, gradient: Tensor | None, scalars: Tensor, outputs: RowOutputs, stream: int | None
    ) -> None:
        if self.chosen is not None:
            self.chosen.loss_rows(tensors, gradient, scalars, outputs, stream)
            return
        for call in self.calls:
            run = functools.partial(call.loss_rows, tensors, gradient, scalars, outputs, stream)
            if _compiles(call.plan, call.device, run):
                self.chosen = call
                return


class LossCall:
    """Everything that `forward` launches. It holds no tensor, and fits what a RowCall fits."""

    def __init__(self, inputs: LossInputs, options: LossOptions, gradient: Tensor | None) -> None:
        self.per_row = options.reduction == "none"
        self.stats = options.return_stats
        self.rows = inputs.rows
        needed = gradient is not None or options.label_smoothing > 0 or options.return_stats
        normalized = options.reduction in ("mean", "token_mean")
        self.denominators = _denominators_launcher(inputs, options) if needed or normalized else None
        self.loss_rows = _LossRows(inputs, options, gradient)
        self.reduce = _reduce_launcher(inputs.rows, options)

    def __call__(
        self,
        tensors: RowTensors,
        normalizer: Tensor | float | None,
        gradient: Tensor | None,
        remembered: Tensor | None = None,
    ) -> LossOutputs:
        """What `forward` returns and writes."""
        per_row, stats, rows = self.per_row, self.stats, self.rows
        make = torch.zeros if self.denominators is None else torch.empty
        scalars = make(len(SCALARS), dtype=torch.float32, device=tensors[0].device)
        new_empty = scalars.new_empty
        token_count = new_empty((), dtype=torch.int64) if stats else None
        outputs = RowOutputs(new_empty(rows), new_empty(2, rows), new_empty(2, rows) if stats else None)
        loss = outputs.loss if per_row else new_empty(size=())  # half the time of `(())`, which torch parses last
        with on_device(scalars):
            stream = direct_stream()
            if self.denominators is not None:
                self.denominators(*tensors[1:], normalizer, remembered, scalars, token_count, stream=stream)
            self.loss_rows(tensors, gradient, scalars, outputs, stream)
            if self.reduce is not None:
                self.reduce(outputs.loss, outputs.stats, scalars, token_count, None if per_row else loss, stream=stream)
        return LossOutputs(loss, outputs.state, scalars, token_count)


def forward(
    inputs: LossInputs, options: LossOptions, gradient: Tensor | None, remembered: Tensor | None = None
) -> LossOutputs:
    """The loss, and its gradient written to `gradient` where one is given.

    For an upstream gradient of 1, or for the one in `remembered`, which becomes `scalars[EXPECTED_UPSTREAM]`.
    """
    return LossCall(inputs, options, gradient)(inputs[:4], inputs.normalizer, gradient, remembered)


def denominators(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """`LossOutputs.scalars`, statistics still missing, and the number of counted tokens. No logit is read."""
    scalars = torch.empty(len(SCALARS), dtype=torch.float32, device=inputs.targets.device)
    token_count = scalars.new_empty((), dtype=torch.int64)
    with on_device(scalars):
        _denominators_launcher(inputs, options)(*inputs[1:], None, scalars, token_count)
    return scalars, token_count


def _denominators_launcher(inputs: LossInputs, options: LossOptions) -> Launcher:
    numbers = (
        inputs.rows, inputs.vocab_size, options.ignore_index,
        options.reduction, isinstance(inputs.normalizer, float),
        options.label_smoothing > 0 and inputs.weights is not None, REDUCE_BLOCK,
    )  # fmt: skip
    return Launcher(kernels.denominators_kernel, (1,), numbers, REDUCE_OPTIONS)


def loss_rows(inputs: LossInputs, options: LossOptions, scalars: Tensor, gradient: Tensor | None) -> RowOutputs:
    """Each row's loss, and the gradient for the expected upstream gradient written to `gradient` where one is given.

    `gradient` may be the logits themselves.
    """
    rows = inputs.rows
    stats = scalars.new_empty(2, rows) if options.return_stats else None
    outputs = RowOutputs(scalars.new_empty(rows), scalars.new_empty(2, rows), stats)
    with on_device(inputs.logits):
        _LossRows(inputs, options, gradient)(inputs[:4], gradient, scalars, outputs, None)
    return outputs


def loss_plans(inputs: LossInputs, options: LossOptions, gradient: Tensor | None, device: Device) -> list[RowLaunch]:
    """The launches that can serve, best first. PDL_KERNELS_FORCE_KERNEL, meant for tests, names the only one."""
    itemsize = inputs.logits.element_size()
    unit_stride, vectors = has_unit_stride(inputs.logits), uses_vectors(inputs.logits, gradient)
    head = "head" in layouts(inputs.logits, gradient)
    smoothing = options.label_smoothing > 0
    forced = os.environ.get(FORCE_VARIABLE)
    if forced not in (None, *planner.KERNELS):
        raise ValueError(f"{FORCE_VARIABLE} is {forced!r}; accepted are {', '.join(planner.KERNELS)}")
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
    loss = rows.loss if per_row else scalars.new_empty(())
    launcher = _reduce_launcher(rows.loss.numel(), options)
    if launcher is not None:
        with on_device(scalars):
            launcher(rows.loss, rows.stats, scalars, token_count, None if per_row else loss)
    return loss


def _reduce_launcher(rows: int, options: LossOptions) -> Launcher | None:
    if options.reduction == "none" and not options.return_stats:
        return None
    return Launcher(kernels.reduce_rows_kernel, (1,), (rows, options.return_stats, REDUCE_BLOCK), REDUCE_OPTIONS)


def backward(
    inputs: LossInputs, options: LossOptions, row_state: Tensor, scalars: Tensor, upstream: Tensor, gradient: Tensor
) -> None:
    """Write the gradient for `upstream`, (N,) with any stride or 0-d, to `gradient`."""
    if inputs.rows > 0:
        with on_device(inputs.logits):
            call = gradient_call(inputs, options, gradient)
            call.gradient_rows(inputs[:4], gradient, scalars, row_state, upstream, None, None)


def adjust(
    inputs: LossInputs | None,
    options: LossOptions,
    row_state: Tensor | None,
    scalars: Tensor | None,
    upstream: Tensor,
    gradient: Tensor,
    remembered: Tensor | None = None,
) -> None:
    """Make `gradient`, formed for the upstream gradient that `scalars` expects, right for the 0-d `upstream`.

    Without reading it here. From the logits while they are still there: one rounding, and fp16 gradients that need
    loss scaling do not underflow before they are scaled. Otherwise by multiplying. Without scalars 1 was expected.
    """
    rows_outer, rows_inner, V = gradient.shape
    rows = rows_outer * rows_inner
    if rows == 0:
        return
    if inputs is not None and row_state is not None and scalars is not None:
        with on_device(inputs.logits):
            call = gradient_call(inputs, options, gradient)
            call.gradient_rows(
                inputs[:4], gradient, scalars, row_state, upstream, remembered, None, unless_expected=True
            )
        return
    device = device_of(gradient.device)
    plan = plan_rows(
        rows, V, gradient.element_size(), device.multiprocessors, two_passes=False,
        unit_stride=has_unit_stride(gradient), vectors=uses_vectors(gradient, None), warp_size=device.warp_size,
    )  # fmt: skip
    variant = make_variant(gradient, LossOptions(), None, plan)
    with on_device(gradient):
        kernels.scale_rows_kernel[(rows, plan.slices)](
            gradient, upstream, scalars, rows_inner, V, *gradient.stride(), plan.slice_tiles, variant,
            **row_compile_options(plan, device.limits_registers),
        )  # fmt: skip


def gradient_call(inputs: LossInputs, options: LossOptions, gradient: Tensor) -> RowCall:
    """A call for `gradient_rows` alone."""
    # Statistics belong to forward: without them backward needs one variant fewer.
    options = options._replace(return_stats=False)
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
    return RowCall(inputs, options, gradient, plan, device)
