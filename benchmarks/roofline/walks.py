"""Which loops of a kernel walk over logits, and what one element costs there.

A walk is recognised by what it must do, not by where it is: an innermost loop that loads, in one trip of a thread,
whole tiles of the launched variant, and stores as much as the walk writes. Anything else is an error, never a zero.
"""

from collections.abc import Callable
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


def _walk(role: str, variant: Any, *, weights: bool = False, writes: bool = False, blocks: int = 0) -> ExpectedWalk:
    blocks = blocks or variant.unroll
    elements = blocks * variant.vector
    row_bytes = blocks * VECTOR_BYTES
    return ExpectedWalk(role, elements, row_bytes, elements * WEIGHT_BYTES * weights, row_bytes * writes)


def _loss_rows(variant: Any, arguments: dict[str, Any]) -> list[ExpectedWalk]:
    weights = variant.smoothing and arguments["weights"] is not None
    if arguments["gradient"] is not None:
        return [_walk("first of two", variant), _walk("gradient", variant, weights=weights, writes=True)]
    if variant.smoothing:
        return [_walk("first of two", variant), _walk("smoothing", variant, weights=weights)]
    return [_walk("forward only", variant)]


def _gradient_rows(variant: Any, arguments: dict[str, Any]) -> list[ExpectedWalk]:
    weights = variant.smoothing and arguments["weights"] is not None
    return [_walk("gradient", variant, weights=weights, writes=True)]


def _slice_rows(variant: Any, arguments: dict[str, Any]) -> list[ExpectedWalk]:
    return [_walk("forward only", variant)]


def _scale_rows(variant: Any, arguments: dict[str, Any]) -> list[ExpectedWalk]:
    return [_walk("scale", variant, writes=True, blocks=1)]


def _no_walk(variant: Any, arguments: dict[str, Any]) -> list[ExpectedWalk]:
    return []


# The walks of every kernel in program order.
KERNEL_WALKS: dict[str, Callable[[Any, dict[str, Any]], list[ExpectedWalk]]] = {
    "denominators_kernel": _no_walk,
    "loss_rows_kernel": _loss_rows,
    "single_pass_rows_kernel": _no_walk,  # see _held_row
    "slice_rows_kernel": _slice_rows,
    "merge_rows_kernel": _no_walk,
    "gradient_rows_kernel": _gradient_rows,
    "scale_rows_kernel": _scale_rows,
    "reduce_rows_kernel": _no_walk,
}


def _held_row(variant: Any, instructions: list[Instruction]) -> Walk:
    """A row held on chip: no loop, every instruction runs once a row, but for the branch of rows that do not count."""
    found = accesses(instructions)
    wide_loads, wide_stores = found[Access("load", VECTOR_BYTES)], found[Access("store", VECTOR_BYTES)]
    return Walk(
        role="single pass",
        tiles=1,
        elements=variant.chunks * variant.vector,
        instructions=len(instructions),
        special=count(instructions, SPECIAL),
        load_bytes=VECTOR_BYTES if wide_loads >= variant.chunks else min(one.bytes for one in found),
        store_bytes=VECTOR_BYTES if wide_stores >= variant.chunks else min(one.bytes for one in found),
        narrow=wide_loads < variant.chunks or wide_stores < variant.chunks,
    )


def find_walks(launch: Launch, instructions: list[Instruction]) -> list[Walk]:
    """The walks of a launch's kernel, as KERNEL_WALKS says they must be.

    Raises:
        MachineCodeError: the kernel is unknown, or its loops are not those walks.
    """
    if launch.kernel == "single_pass_rows_kernel":
        return [_held_row(launch.arguments["VARIANT"], instructions)]
    if launch.kernel not in KERNEL_WALKS:
        raise MachineCodeError(f"{launch.kernel} has no entry in walks.KERNEL_WALKS: say there what it reads")
    expected = KERNEL_WALKS[launch.kernel](launch.arguments.get("VARIANT"), launch.arguments)
    return match_walks(expected, innermost_loops(instructions)) if expected else []


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
    loads = [one.bytes for one in found if one.kind == "load"]
    stores = [one.bytes for one in found if one.kind == "store"]
    wide_loads = found[Access("load", VECTOR_BYTES)] * VECTOR_BYTES
    wide_stores = found[Access("store", VECTOR_BYTES)] * VECTOR_BYTES
    return Walk(
        role=walk.role,
        tiles=tiles,
        elements=tiles * walk.elements,
        instructions=len(loop),
        special=count(loop, SPECIAL),
        load_bytes=min(loads),
        store_bytes=min(stores, default=None),
        narrow=wide_loads < tiles * walk.row_bytes or wide_stores < stored,
    )


def _bytes(loop: list[Instruction], kind: str) -> int:
    return sum(one.bytes * times for one, times in accesses(loop).items() if one.kind == kind)
