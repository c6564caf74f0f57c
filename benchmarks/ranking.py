"""Which launches of the single-pass kernel are worth timing first: a model, not a measurement.

Known without compiling: the shape of a launch and its limit on registers. A multiprocessor takes as long per row as the
slower of two things:

    memory   it waits for a row's bytes about LATENCY from the first load to the last store, and holds as many rows at
             once as registers allow; its share of the device's bandwidth bounds it from below (Little's law)
    issue    FIXED instructions of every thread and PER_COLUMN of every column, at the rate at which it issues them

The constants are from machine code and a reader's estimate of latency; nothing was timed.
"""

from benchmarks.roofline.hardware import Hardware
from benchmarks.roofline.model import programs_held
from pdl_kernels.kernels.planner import RowLaunch

LATENCY = 4e-6  # seconds that a held row takes from its first load to its last store where nothing else is in the way
CLUSTER_LATENCY = 0.5e-6  # more for each doubling of the blocks that have to meet
FIXED_INSTRUCTIONS = 135  # of a thread, whatever its columns
PER_COLUMN = 10.5
SHARED_BYTES = 256  # of a block, for the reduction
LARGEST_REGISTERS = 255


def seconds_per_row(hardware: Hardware, plan: RowLaunch, vocab_size: int, itemsize: int) -> float:
    """The time of the whole device over the number of rows, for many rows; inf where no block fits."""
    blocks = programs_held(hardware, plan.registers or LARGEST_REGISTERS, SHARED_BYTES, plan.warps)
    rows_held = blocks / plan.ctas  # of a multiprocessor; a cluster's blocks lie on several
    if rows_held == 0:
        return float("inf")
    latency = LATENCY + CLUSTER_LATENCY * (plan.ctas.bit_length() - 1)
    bandwidth = 2 * vocab_size * itemsize / hardware.memory_bandwidth
    memory = max(latency / rows_held / hardware.multiprocessors, bandwidth)
    threads = plan.ctas * plan.warps * hardware.target.warp_size
    instructions = FIXED_INSTRUCTIONS * threads + PER_COLUMN * vocab_size
    issue = instructions / (hardware.issue_rate or 128) / hardware.clock / hardware.multiprocessors
    # Neither hides the other wholly: of two launches that the memory bounds, the one with less to issue comes first.
    return max(memory, issue) + 0.1 * min(memory, issue)


def ranked(hardware: Hardware, plans: list[RowLaunch], vocab_size: int, itemsize: int) -> list[RowLaunch]:
    """Best first; equal ones stay in their order."""
    return sorted(plans, key=lambda plan: seconds_per_row(hardware, plan, vocab_size, itemsize))
