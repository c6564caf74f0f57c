"""Which launches of the single-pass kernel are worth timing first: a model, not a measurement.

What is known without compiling is the shape of a launch and its limit on registers. From these follow the blocks that a
multiprocessor holds at once, each with its columns, and what each of them needs there:

    memory    its columns read and written, at the multiprocessor's share of the device's bandwidth
    issue     FIXED_INSTRUCTIONS of every thread and INSTRUCTIONS_PER_COLUMN
    latency   time in which it waits and nothing is busy on its behalf: LATENCY, and more in a cluster, whose blocks
              wait for each other

Memory and issue serve one block after the other, while latencies overlap: a closed queueing network, whose throughput
mean value analysis gives (Reiser and Lavenberg, 1980). It has Little's law in it: few bytes in flight leave the memory
idle during the latency. So more columns held at once are never slower where a thread does the same work, and they are
worth less the closer the memory is to its limit.

The instructions were counted in machine code of Triton 3.9 for sm_90, bfloat16: 390 to 480 of a thread where nothing
spills, the branch of rows that do not count included. The assembler takes all registers up to the limit, or all but
one; whether it spills, only compiling shows, and the model ranks a launch that spills as if it did not. The latency is
an assumption, 3 to 4.5 microseconds.
"""

import math

from benchmarks.roofline.hardware import HARDWARE, Hardware
from benchmarks.roofline.model import resident_programs
from pdl_kernels.kernels.planner import Device, RowLaunch

LATENCY = 3e-6  # seconds, of a row in one block
CLUSTER_LATENCY = 0.375e-6  # more for each doubling of the blocks that wait for each other: 4.5e-6 in all for 16
FIXED_INSTRUCTIONS = 440
INSTRUCTIONS_PER_COLUMN = 10.5
SHARED_BYTES = 64  # of a block, for the reduction
MOST_REGISTERS = 255  # of a thread, where a launch sets no limit
DEFAULT_TARGET = "sm_90"


def hardware_of(device: Device) -> Hardware:
    """The data sheet of the device's architecture; that of sm_90 where there is none, or none with the rates needed."""
    major, minor = device.capability
    hardware = HARDWARE.get(f"sm_{major}{minor}", HARDWARE[DEFAULT_TARGET])
    return hardware._replace(multiprocessors=device.multiprocessors)


def seconds_per_row(hardware: Hardware, plan: RowLaunch, vocab_size: int, itemsize: int) -> float:
    """Predicted time of loss + gradient of many rows over their number; inf where no block fits.

    `plan` holds its rows on chip; `hardware` is one of those that have rates.
    """
    assert hardware.issue_rate is not None, f"{hardware.name} has no rates"
    resident = resident_programs(hardware, plan.registers or MOST_REGISTERS, SHARED_BYTES, plan.warps)
    if resident == 0:
        return math.inf
    threads = plan.warps * hardware.target.warp_size
    columns = vocab_size / plan.ctas  # of a block
    memory = 2 * columns * itemsize * hardware.multiprocessors / hardware.memory_bandwidth
    instructions = FIXED_INSTRUCTIONS * threads + INSTRUCTIONS_PER_COLUMN * columns
    issue = instructions / hardware.issue_rate / hardware.clock
    latency = LATENCY + CLUSTER_LATENCY * math.log2(plan.ctas)
    blocks_per_second = throughput(resident, [memory, issue], latency)  # of a multiprocessor
    return plan.ctas / blocks_per_second / hardware.multiprocessors


def throughput(customers: int, demands: list[float], think: float) -> float:
    """Customers served per second in a closed network, by mean value analysis.

    Args:
        demands: seconds of service that each customer needs at each station, one customer at a time.
        think: seconds between two visits, of all customers at once.
    """
    queues = [0.0] * len(demands)  # mean number of customers at each station, itself left out
    rate = 0.0
    for number in range(1, customers + 1):
        waits = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        rate = number / (think + sum(waits))
        queues = [rate * wait for wait in waits]
    return rate


def ranked(hardware: Hardware, plans: list[RowLaunch], vocab_size: int, itemsize: int) -> list[RowLaunch]:
    """Best first; equal ones stay in their order."""
    return sorted(plans, key=lambda plan: seconds_per_row(hardware, plan, vocab_size, itemsize))
