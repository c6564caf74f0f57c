"""Which loops of a kernel walk over logits, and what one element costs there.

A walk is recognised by what it must do, not by where it is: an innermost loop that loads, in one trip of a thread,
whole tiles of the launched variant, and stores as much as the walk writes. Anything else is an error, never a zero.
"""

from typing import Any, NamedTuple

from benchmarks.roofline.compile import Launch
from benchmarks.roofline.machine import (
    SPECIAL,
    Access,
    Instruction,
    MachineCodeError,
    accesses,
    count,
    innermost_loops,
)

VECTOR_BYTES = 16
WEIGHT_BYTES = 4  # float32
HELD_ROW_KERNEL = "single_pass_rows_kernel"

# What every kernel's walks are for, in program order; one that is not here has to say so first.
KERNEL_WALKS: dict[str, tuple[str, ...]] = {
    "denominators_kernel": (),
    "loss_rows_kernel": ("forward only",),  # and others: see `expected_walks`
    HELD_ROW_KERNEL: ("single pass",),
    "slice_rows_kernel": ("forward only",),
    "merge_rows_kernel": (),
    "merge_shards_kernel": (),
    "gradient_rows_kernel": ("gradient",),
    "scale_rows_kernel": ("scale",),
    "reduce_rows_kernel": (),
}


class ExpectedWalk(NamedTuple):
    """What a thread does in one tile of a walk."""

    role: str
    elements: int
    row_bytes: int  # read of logits or of a gradient
    weight_bytes: int  # read of the weights
    stored_bytes: int

    @property
    def loaded_bytes(self) -> int:
        return self.row_bytes + self.weight_bytes


class Walk(NamedTuple):
    """A walk as compiled: one trip of a thread."""

    role: str
    tiles: int  # that one trip handles
    elements: int
    instructions: int
    special: int  # instructions of the special function unit
    load_bytes: int  # of the narrowest load
    store_bytes: int | None  # of the narrowest store
    narrow: bool  # rows are read or written by less than 16 bytes

    @property
    def instructions_per_element(self) -> float:
        return self.instructions / self.elements


def find_walks(launch: Launch, instructions: list[Instruction]) -> list[Walk]:
    """The walks of a launch's kernel, as KERNEL_WALKS says they must be.

    Raises:
        MachineCodeError: the kernel is unknown, or its loops are not those walks.
    """
    if launch.kernel not in KERNEL_WALKS:
        raise MachineCodeError(f"{launch.kernel} has no entry in walks.KERNEL_WALKS: say there what it reads")
    if launch.kernel == HELD_ROW_KERNEL:
        return [_held_row(launch.arguments["VARIANT"], instructions)]
    expected = expected_walks(launch)
    return match_walks(expected, innermost_loops(instructions)) if expected else []


def expected_walks(launch: Launch) -> list[ExpectedWalk]:
    roles = KERNEL_WALKS[launch.kernel]
    variant, weights = launch.arguments.get("VARIANT"), launch.arguments.get("weights")
    if launch.kernel == "loss_rows_kernel" and launch.arguments["gradient"] is not None:
        roles = ("first of two", "gradient")
    elif launch.kernel == "loss_rows_kernel" and variant.smoothing:
        roles = ("first of two", "smoothing")
    found = []
    for role in roles:
        vectors = 1 if role == "scale" else variant.unroll  # of a thread in a tile
        elements = vectors * variant.vector
        reads_weights = variant.smoothing and weights is not None and role in ("gradient", "smoothing")
        stored_bytes = vectors * VECTOR_BYTES if role in ("gradient", "scale") else 0
        weight_bytes = elements * WEIGHT_BYTES if reads_weights else 0
        found.append(ExpectedWalk(role, elements, vectors * VECTOR_BYTES, weight_bytes, stored_bytes))
    return found


def _held_row(variant: Any, instructions: list[Instruction]) -> Walk:
    """A row held on chip: no loop, every instruction runs once a row, but for the branch of rows that do not count."""
    found = accesses(instructions)
    wide_loads = found[Access("load", VECTOR_BYTES)] >= variant.chunks
    wide_stores = found[Access("store", VECTOR_BYTES)] >= variant.chunks
    narrowest = min(one.bytes for one in found)
    return Walk(
        role="single pass",
        tiles=1,
        elements=variant.chunks * variant.vector,
        instructions=len(instructions),
        special=count(instructions, SPECIAL),
        load_bytes=VECTOR_BYTES if wide_loads else narrowest,
        store_bytes=VECTOR_BYTES if wide_stores else narrowest,
        narrow=not (wide_loads and wide_stores),
    )


def match_walks(expected: list[ExpectedWalk], loops: list[list[Instruction]]) -> list[Walk]:
    candidates = [loop for loop in loops if _bytes(loop, "load") >= VECTOR_BYTES]
    if len(candidates) != len(expected):
        roles = ", ".join(walk.role for walk in expected)
        raise MachineCodeError(f"{len(candidates)} loops load a vector or more, where {len(expected)} should ({roles})")
    return [_matched(walk, loop) for walk, loop in zip(expected, candidates, strict=True)]


def _matched(walk: ExpectedWalk, loop: list[Instruction]) -> Walk:
    loaded, stored = _bytes(loop, "load"), _bytes(loop, "store")
    tiles, rest = divmod(loaded, walk.loaded_bytes)
    if tiles == 0 or rest or stored != tiles * walk.stored_bytes:
        raise MachineCodeError(
            f"the loop taken for the walk {walk.role!r} loads {loaded} and stores {stored} bytes a trip, where a tile "
            f"is {walk.loaded_bytes} and {walk.stored_bytes}"
        )
    found = accesses(loop)
    wide_loads = found[Access("load", VECTOR_BYTES)] * VECTOR_BYTES
    wide_stores = found[Access("store", VECTOR_BYTES)] * VECTOR_BYTES
    return Walk(
        role=walk.role,
        tiles=tiles,
        elements=tiles * walk.elements,
        instructions=len(loop),
        special=count(loop, SPECIAL),
        load_bytes=min(one.bytes for one in found if one.kind == "load"),
        store_bytes=min((one.bytes for one in found if one.kind == "store"), default=None),
        narrow=wide_loads < tiles * walk.row_bytes or wide_stores < stored,
    )


def _bytes(loop: list[Instruction], kind: str) -> int:
    return sum(one.bytes * times for one, times in accesses(loop).items() if one.kind == kind)
