"""Programs in flight, the unit that binds, the predicted fraction of the memory limit. A model, not a measurement.

    memory   bytes over the data sheet's bandwidth. The logits are read once more if the rows in flight do not fit into
             the second-level cache
    issue    instructions over the rate at which a multiprocessor issues them
    MUFU     special function instructions over their rate

Each unit is taken to run without ever waiting, and the slowest to hide the others: latency, the cache's own bandwidth,
clocks under load and the start and end of a launch are left out, so the prediction is a ceiling. Code outside the walks
counts as if every program ran all of it once, which is more than it runs.
"""

from typing import NamedTuple

from benchmarks.roofline.hardware import Hardware
from benchmarks.roofline.machine import SPECIAL, Machine, count
from benchmarks.roofline.walks import Walk

CACHE_SHARE = 0.8  # of the second-level cache, what rows in flight may take: an assumption


class Work(NamedTuple):
    """What one program of a launch does."""

    programs: int
    threads: int  # of a program
    elements: int  # of a program
    tile: int  # elements that a program's threads handle together
    element_bytes: int
    writes: bool  # as many bytes as are read


class Prediction(NamedTuple):
    row_instructions_per_element: float  # the code outside the walks included
    cycles_per_element: dict[str, float]  # of a multiprocessor, per unit
    rereads: float  # of each logit from memory; 0 where the cache holds the rows in flight
    binds: str
    fraction: float  # of the memory limit: every logit read once, every gradient written once


def resident_programs(hardware: Hardware, registers: int, shared_bytes: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once, from the registers of a thread and the rest of a program."""
    registers = -(-max(registers, 1) // hardware.register_unit) * hardware.register_unit
    warps_held = 4 * min(hardware.registers // (registers * hardware.target.warp_size), hardware.warps)
    shared_bytes += hardware.shared_reserve
    by_shared = hardware.shared_bytes // shared_bytes if shared_bytes else hardware.programs
    return min(warps_held // warps, by_shared, hardware.programs)


def predict(hardware: Hardware, machine: Machine, walks: list[Walk], work: Work, resident: int) -> Prediction | None:
    """None where the architecture has no rates, or there is no walk."""
    if hardware.issue_rate is None or hardware.special_rate is None or not walks or resident == 0:
        return None
    instructions = _per_element(walks, work, len(machine.instructions), [walk.instructions for walk in walks])
    special = _per_element(walks, work, count(machine.instructions, SPECIAL), [walk.special for walk in walks])
    in_flight = min(work.programs, resident * hardware.multiprocessors) * work.elements * work.element_bytes
    rereads = 0.0 if in_flight <= CACHE_SHARE * hardware.cache_bytes else len(walks) - 1.0
    floor_bytes = work.element_bytes * (1 + work.writes)
    busy = min(hardware.multiprocessors, work.programs)  # a launch of few programs leaves the others idle
    cycles_per_byte = hardware.clock * busy / hardware.memory_bandwidth
    cycles = {
        "memory": (floor_bytes + rereads * work.element_bytes) * cycles_per_byte,
        "issue": instructions / hardware.issue_rate,
        "MUFU": special / hardware.special_rate,
    }
    binds = max(cycles, key=lambda unit: cycles[unit])
    return Prediction(instructions, cycles, rereads, binds, floor_bytes * cycles_per_byte / cycles[binds])


def _per_element(walks: list[Walk], work: Work, total: int, in_loops: list[int]) -> float:
    """Instructions of one kind per element of a row: the loops as often as they run, the rest of `total` once."""
    trips = [work.elements // work.tile // walk.tiles for walk in walks]
    executed = total - sum(in_loops) + sum(n * times for n, times in zip(in_loops, trips, strict=True))
    return executed * work.threads / work.elements
