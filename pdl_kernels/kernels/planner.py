"""Which kernel runs, in which shape, compiled how: pure functions of sizes, layout, options and device."""

from typing import Any, NamedTuple

from torch import Tensor

from pdl_kernels.options import LossOptions

VECTOR_BYTES = 16  # one load or store instruction of a thread
MAX_SLICES = 64
MANY_ROWS = 1 << 16  # so many are never sliced

SINGLE_PASS = "single pass"
TWO_PASSES = "two passes"
SLICES = "slices"
KERNELS = (SINGLE_PASS, TWO_PASSES, SLICES)

# Clusters (num_ctas > 1) whose reductions go through distributed shared memory: on sm_90 and later, from Triton 3.9 on.
# 3.8 compiles the smaller half of them, 3.6 and 3.7 none. By themselves they are chosen only where a recorded run on a
# GPU has shown them right: on an H100 (benchmarks/results/nvidia-h100-80gb-hbm3/doctor-kit.json, at an earlier
# revision, whose PTX of these kernels was the same, instruction for instruction).
CLUSTER_CAPABILITY = (9, 0)
CLUSTERS_SHOWN_RIGHT = ((9, 0),)
HOPPER = 9  # the major capability whose choices were measured, on an H100
HELD_CAPABILITY = (8, 0)  # NVIDIA; not tried elsewhere
CLUSTER_TRITON = (3, 9)
MAX_CLUSTER = 8  # programs; 16 exist, but not every device and launch takes them
MIN_HELD_BYTES = 16384  # of a row: below, fixed cost is most of its instructions and a second read finds it near
# By bytes per logit: (warps of a program, (most columns of a thread, registers that hold them), ...), best first. Few
# threads with many columns have the least fixed cost per column, and the columns that a multiprocessor holds at once
# are the figure to maximise: the kernel waits for memory. 16-bit columns take half a register each. From machine code
# for sm_90 and sm_100 of Triton 3.9 (benchmarks.roofline), not from measurements.
HELD_SHAPES = {
    2: ((4, ((160, 96), (200, 128), (256, 168))),),
    4: ((4, ((64, 96), (128, 168))), (8, ((80, 112), (128, 168)))),
}
# Columns of a thread: more where no larger cluster exists. On an H100 fewer blocks are faster in bfloat16:
# 2945 GB/s with 4 against 2905 with 8 at 4096 x 128256 (benchmarks/results/nvidia-h100-80gb-hbm3/sweep.json).
COMFORTABLE, COMFORTABLE_ON_HOPPER = 200, 256
# A row that is read twice is as good as one that is held while all rows in flight are in the second-level cache. On an
# H100, bfloat16, clusters gave 3 % less with rows in flight of 65 % of it (V = 128256), and 7 % more at 77 % (151936);
# one block gave 2 % less at V = 32000, the shortest rows that were measured, and takes 8 s to compile instead of 1
# (benchmarks/results/cpu/compile-ahead-3.6.0.json).
CACHE_SHARE = 0.7
SHORTEST_MEASURED = 64000  # bytes of a row
REGISTER_FILE = 65536  # of a multiprocessor, in words
# Statistics or z-loss take a few registers more, and so does everything on sm_100, above all many columns. Which limits
# spill is a matter of chance: the assembler spills with 148 registers what it holds in 137.
EXTRA_REGISTERS = 9
MANY_COLUMNS, EXTRA_FOR_MANY_COLUMNS = 160, 28
EXTRA_IN_ONE_BLOCK = 24  # for z-loss with as many columns as one block can hold

# exp, log and fused multiply-add are meant to fuse: said here because Triton's default changes with its version.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
# A capped logit is a product. Where the compiler fuses it with the subtraction that follows, one of two equal logits is
# rounded and the other is not, and exp(z - z) is not 1. What has to fuse says tl.fma.
SOFTCAP_OPTIONS = {"enable_fp_fusion": False}


class Device(NamedTuple):
    """What the choices need to know of a device. benchmarks.roofline describes devices that are not there."""

    multiprocessors: int
    warp_size: int
    limits_registers: bool
    capability: tuple[int, int] = (0, 0)  # of NVIDIA devices
    cache_bytes: int = 0  # of the second level; 0: not known


class Layout(NamedTuple):
    """How the rows of the logits and of a gradient lie in memory. Without a gradient, its fields say "any"."""

    logits: str  # "aligned": every row starts on 16 bytes; "head": some do not; "any"
    gradient: str  # the same; "head" means: aligned where the logits are
    unit_stride: bool  # the vocabulary dimension of the logits has stride 1
    vectors: bool  # logits, and the gradient where there is one, are accessed 16 bytes at a time


class RowLaunch(NamedTuple):
    """How rows are spread over programs."""

    kernel: str
    lanes: int  # threads of a row or slice
    unroll: int
    warps: int
    registers: int | None  # at most so many per thread, on NVIDIA
    slices: int = 1
    slice_tiles: int = 0  # a tile is unroll * lanes vectors
    ctas: int = 1  # blocks of threads that share a row
    chunks: int = 0  # of lanes vectors that hold a row on chip
    full_chunks: int = 0  # of them, those that lie inside every row, wherever its interior starts


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
    shard: bool = False  # other columns of the same rows are elsewhere


def layout_of(logits: Tensor, gradient: Tensor | None) -> Layout:
    """How rows lie in (rows_outer, rows_inner, V) logits, and in a gradient of the same shape."""
    based, aligned, strides = _alignment(logits)
    unit_stride = logits.stride(-1) == 1 or logits.shape[-1] == 1
    found = "aligned" if aligned else "head" if based else "any"
    if gradient is None or found == "any":
        return Layout(found, "any", unit_stride, found != "any" and gradient is None)
    gradient_based, gradient_aligned, gradient_strides = _alignment(gradient)
    alike = (aligned and gradient_aligned) or (gradient_based and gradient_strides == strides)
    return Layout(found, found if alike else "any", unit_stride, alike)


def _alignment(tensor: Tensor) -> tuple[bool, bool, tuple[int, int]]:
    """(the storage starts on 16 bytes and the last stride is 1, every row starts on 16 bytes, strides between rows)."""
    outer, inner, V = tensor.shape
    stride_outer, stride_row, stride_column = tensor.stride()
    # A dimension with one entry is not stepped through.
    strides = (stride_outer if outer > 1 else 0, stride_row if inner > 1 else 0)
    vector = VECTOR_BYTES // tensor.element_size()
    based = tensor.data_ptr() % VECTOR_BYTES == 0 and (stride_column == 1 or V == 1)
    return based, based and strides[0] % vector == 0 and strides[1] % vector == 0, strides


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def plan_loss(
    rows: int,
    vocab_size: int,
    itemsize: int,
    device: Device,
    triton_version: tuple[int, int],
    *,
    gradient: bool = True,
    smoothing: bool = False,
    transform: bool = False,
    stats: bool = False,
    z_loss: bool = False,
    unit_stride: bool = True,
    vectors: bool = True,
    head: bool = False,
    clusters: bool | None = None,
    only: str | None = None,
    warps: int | None = None,
    ctas: int = 1,
) -> list[RowLaunch]:
    """The launches that can form the loss of `rows`, best first; the last one compiles everywhere.

    Args:
        gradient: its gradient too.
        smoothing: the weights are streamed too.
        transform: softcap, or a scale of the logits.
        unit_stride, vectors: as for `plan_rows`.
        head: rows do not all start on 16 bytes.
        clusters: rows may be held by more than one block of threads; None: where that has been shown right.
        only: the one kernel of KERNELS that may be chosen, wherever it can serve. Rows are then held by `ctas` blocks
            of `warps` warps, of as many as the planner would take by default.
    """
    if only not in (None, *KERNELS):
        raise ValueError(f"only is {only!r}; accepted are {', '.join(KERNELS)}, or None")
    # Smoothing and softcap take more registers than are left beside a held row.
    can_hold = gradient and vectors and not smoothing and not transform
    if only == SINGLE_PASS and can_hold:
        warps = HELD_SHAPES[itemsize][0][0] if warps is None else warps
        return [held_row(vocab_size, itemsize, warps=warps, ctas=ctas, registers=None, head=head)]
    two_passes = plan_rows(
        {TWO_PASSES: MANY_ROWS, SLICES: 1}.get(only or "", rows),
        vocab_size,
        itemsize,
        device.multiprocessors,
        two_passes=gradient or smoothing,
        smoothing=smoothing,
        unit_stride=unit_stride,
        vectors=vectors,
        warp_size=device.warp_size,
    )
    found = [two_passes]
    if can_hold and only is None:
        held = plan_held_row(
            vocab_size, itemsize, device, triton_version, head=head, stats=stats, z_loss=z_loss, clusters=clusters
        )
        # Few rows: a cluster each must give every multiprocessor two programs, or else slices fill them better.
        if held is not None and rows * held.ctas >= 2 * device.multiprocessors:
            near = two_passes.kernel == TWO_PASSES and reads_again_near(two_passes, vocab_size * itemsize, device)
            if not near:
                found.insert(0, held)
    return found


def reads_again_near(plan: RowLaunch, row_bytes: int, device: Device) -> bool:
    """Whether the second read of rows that are read twice finds them in the second-level cache, as far as is known."""
    if device.capability[0] != HOPPER or row_bytes < SHORTEST_MEASURED:
        return False
    threads = plan.warps * device.warp_size
    resident = REGISTER_FILE // (threads * (plan.registers or 64))  # programs of a multiprocessor
    return device.multiprocessors * max(resident, 1) * row_bytes <= CACHE_SHARE * device.cache_bytes


def plan_held_row(
    vocab_size: int,
    itemsize: int,
    device: Device,
    triton_version: tuple[int, int],
    *,
    head: bool = False,
    stats: bool = False,
    z_loss: bool = False,
    clusters: bool | None = None,
) -> RowLaunch | None:
    """How a row of 16-byte vectors is held on chip; None where it does not fit, or the compiler lacks what it takes.

    `clusters` as for `plan_loss`.
    """
    if device.capability < HELD_CAPABILITY or vocab_size * itemsize < MIN_HELD_BYTES:
        return None
    compiled = device.capability >= CLUSTER_CAPABILITY and triton_version >= CLUSTER_TRITON
    wanted = device.capability in CLUSTERS_SHOWN_RIGHT if clusters is None else clusters
    max_ctas = MAX_CLUSTER if compiled and wanted else 1
    comfortable = COMFORTABLE_ON_HOPPER if device.capability[0] == HOPPER else COMFORTABLE
    for warps, shapes in HELD_SHAPES[itemsize]:
        threads = warps * device.warp_size
        ctas = min(next_power_of_two(-(-vocab_size // (min(shapes[-1][0], comfortable) * threads))), max_ctas)
        columns = -(-vocab_size // (ctas * threads))
        registers = next((count for most, count in shapes if columns <= most), None)
        if registers is not None:
            sm_100 = device.capability >= (10, 0)
            if (stats or z_loss or sm_100) and columns <= COMFORTABLE:
                registers += EXTRA_FOR_MANY_COLUMNS if sm_100 and columns > MANY_COLUMNS else EXTRA_REGISTERS
            elif z_loss and not sm_100 and ctas == 1 and columns > COMFORTABLE:
                registers += EXTRA_IN_ONE_BLOCK
            return held_row(vocab_size, itemsize, warps=warps, ctas=ctas, registers=registers, head=head)
    return None


def held_row(
    vocab_size: int, itemsize: int, *, warps: int, ctas: int, registers: int | None, head: bool, warp_size: int = 32
) -> RowLaunch:
    """A row held on chip by `ctas` blocks of `warps` warps."""
    vector = VECTOR_BYTES // itemsize
    lanes = ctas * warps * warp_size
    size = lanes * vector
    shortest = vocab_size - 2 * (vector - 1) if head else vocab_size  # interior of a row
    return RowLaunch(
        SINGLE_PASS,
        lanes,
        1,
        warps,
        registers,
        ctas=ctas,
        chunks=max(-(-vocab_size // size), 1),
        full_chunks=max(shortest // size, 0),
    )


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
    # rows in flight, which the second read should find in the second-level cache: 4, 2 or 1. On an H100 the best were 2
    # for rows of 64000 and 100514 bytes, and 1 for 128000 and more (benchmarks/results/nvidia-h100-80gb-hbm3).
    max_warps = 8
    if two_passes:
        max_warps = 8 if row_bytes <= 40 * 1024 else 16 if row_bytes <= 112 * 1024 else 32
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
    slices = -(-tiles // slice_tiles)
    kernel = SLICES if slices > 1 else TWO_PASSES
    return RowLaunch(kernel, warps * warp_size, unroll, warps, registers, slices, slice_tiles)


def make_variant(vocab_size: int, itemsize: int, options: LossOptions, layout: Layout, launch: RowLaunch) -> Variant:
    """What to compile for logits of this layout and these options."""
    vector = VECTOR_BYTES // itemsize
    return Variant(
        normalized=options.reduction in ("mean", "token_mean"),
        smoothing=options.label_smoothing > 0,
        z_loss=options.z_loss > 0,
        softcap=options.softcap is not None,
        scale=options.logit_scale != 1,
        stats=options.return_stats,
        layout=layout.logits,
        gradient_layout=layout.gradient,
        unit_stride=layout.unit_stride,
        edges=layout.logits == "head" or vocab_size % vector != 0,
        vector=vector,
        lanes=launch.lanes,
        unroll=launch.unroll,
        chunks=launch.chunks,
        full_chunks=launch.full_chunks,
        # float32 logits and exponentials take the same registers, and the second exponential is saved.
        hold_exps=launch.chunks > 0 and vector == 4,
    )


def row_compile_options(launch: RowLaunch, limits_registers: bool, *, softcap: bool = False) -> dict[str, Any]:
    """Keyword arguments of a row kernel's launch.

    Large programs name their limit: left alone, the assembler at times spills to fit more of them than were planned.
    Small ones are better left alone, where a limit makes it use, and then spill, all it was given.
    """
    limit = {"maxnreg": launch.registers} if limits_registers and launch.registers else {}
    cluster = {"num_ctas": launch.ctas} if launch.ctas > 1 else {}
    return {"num_warps": launch.warps, **cluster, **limit, **fusion_options(softcap=softcap)}


def fusion_options(*, softcap: bool) -> dict[str, Any]:
    return SOFTCAP_OPTIONS if softcap else COMPILE_OPTIONS
