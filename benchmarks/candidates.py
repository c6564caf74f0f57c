"""Which launches of loss + gradient the sweep times: those that the planner could choose, for the shapes that count.

What belongs here needs no device: benchmarks.compile_ahead compiles the same launches without one.
"""

from collections.abc import Iterator

from benchmarks.inputs import Case
from benchmarks.ranking import hardware_of, ranked
from pdl_kernels.kernels import planner
from pdl_kernels.kernels.planner import Device, RowLaunch

ROWS = (4096, 512, 16384)  # what matters most comes first
ORDER = (128256, 32000, 262144, 151936, 50257)  # of inputs.VOCABULARIES, too
CLUSTERS = (1, 2, 4, 8, 16)
REGISTERS = {2: (80, 96, 112, 128, 168, 192), 4: (96, 112, 128, 168, 192)}  # by bytes per logit
MOST_COLUMNS = {2: 256, 4: 128}  # of a thread
FEWEST_COLUMNS = 32
TWO_PASS_SHAPES = tuple((warps, unroll) for warps in (8, 16, 32) for unroll in (2, 4, 8))
TWO_PASS_THREADS = (1024, 2048)  # that a multiprocessor holds: the limits on registers
MOST_CANDIDATES = 20  # of a shape, beside the planner's own


def candidates(
    case: Case, device: Device, triton_version: tuple[int, int], most: int | None = MOST_CANDIDATES
) -> list[RowLaunch]:
    """The planner's choices, then those that read twice, then the best others by `ranking`, at most so many, if any."""
    head = case.vocab_size % (planner.VECTOR_BYTES // case.itemsize) != 0
    planned = planner.plan_loss(case.rows, case.vocab_size, case.itemsize, device, triton_version, head=head)
    held = [plan for plan in _held_rows(case, device, triton_version, head) if plan not in planned]
    twice = [plan for plan in _two_passes(case, device, planned[-1]) if plan not in planned]
    if most == 0:
        return planned
    return planned + twice + ranked(hardware_of(device), held, case.vocab_size, case.itemsize)[:most]


def _two_passes(case: Case, device: Device, planned: RowLaunch) -> list[RowLaunch]:
    """Other shapes of the kernel that reads a row twice; none where few rows are sliced."""
    found: list[RowLaunch] = []
    if device.warp_size != 32 or planned.slices > 1:
        return found
    vector = planner.VECTOR_BYTES // case.itemsize
    for warps, unroll in TWO_PASS_SHAPES:
        lanes = warps * device.warp_size
        tiles = -(-case.vocab_size // (lanes * unroll * vector))
        for threads in TWO_PASS_THREADS:
            if lanes <= threads and tiles > 1:
                registers = planner.REGISTER_FILE // threads
                found.append(
                    planned._replace(lanes=lanes, unroll=unroll, warps=warps, registers=registers, slice_tiles=tiles)
                )
    return found


def _held_rows(case: Case, device: Device, triton_version: tuple[int, int], head: bool) -> list[RowLaunch]:
    """Every shape of a held row that could be worth its registers; none for warps of another size than NVIDIA's."""
    found: list[RowLaunch] = []
    if device.warp_size != 32:
        return found
    clusters = device.capability >= planner.CLUSTER_CAPABILITY and triton_version >= planner.CLUSTER_TRITON
    for ctas in CLUSTERS if clusters else (1,):
        for warps in (4, 8, 16):
            columns = case.vocab_size / (ctas * warps * device.warp_size)
            if not FEWEST_COLUMNS <= columns <= MOST_COLUMNS[case.itemsize]:
                continue
            needed = columns * case.itemsize / 4 + 32  # held columns, and what the arithmetic needs at least
            enough = [count for count in REGISTERS[case.itemsize] if count >= needed]
            for registers in [count for count in enough if warps * count <= 2048][:3]:
                found.append(
                    planner.held_row(
                        case.vocab_size, case.itemsize, warps=warps, ctas=ctas, registers=registers, head=head
                    )
                )
    return found


def planned_work(
    dtypes: list[str],
    vocabularies: list[int],
    rows: list[int],
    device: Device,
    triton_version: tuple[int, int],
    most: int | None = MOST_CANDIDATES,
) -> list[tuple[Case, RowLaunch]]:
    """Everything that the sweep times, in its order; no device is needed to know it."""
    return [
        (case, plan)
        for case in cases(dtypes, vocabularies, rows)
        for plan in candidates(case, device, triton_version, most)
    ]


def cases(dtypes: list[str], vocabularies: list[int], rows: list[int]) -> Iterator[Case]:
    """In the order of their value."""
    ordered = sorted(vocabularies, key=lambda size: ORDER.index(size) if size in ORDER else len(ORDER))
    for dtype in dtypes:
        for count in rows:
            for vocab_size in ordered:
                yield Case(count, vocab_size, dtype)
