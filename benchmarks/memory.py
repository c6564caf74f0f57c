"""Peak extra memory of an operation: what it needs beyond its inputs.

On a GPU the allocator knows. On a CPU a fresh process runs one contender and reads the peak of its resident set, which
Linux can reset; elsewhere it is not measured.

    python -m benchmarks.memory CONTENDER ROWS V DTYPE H IGNORED THREADS      what the suite starts
"""

import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.fresh_process import printed_json
from benchmarks.inputs import Case, make_inputs
from benchmarks.operations import OPERATIONS, Operation, Run, make_run
from benchmarks.peers import CONTENDERS

RESIDENT_PEAK_RESET = Path("/proc/self/clear_refs")
# Every allocation of 64 KB or more gets pages of its own and gives them back, so that a first run leaves nothing
# behind for the measured one (glibc).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_on_gpu(run: Run, operation: Operation) -> int:
    """Bytes. The logits are restored before the measurement, so that in place means none of its own."""
    device = run.inputs.device
    call = run.prepare(operation)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def peaks_on_cpu(contender: str, case: Case, threads: int) -> tuple[dict[str, int], str | None]:
    """Bytes by operation, from a fresh process; and why there are none, or None."""
    if not RESIDENT_PEAK_RESET.exists():
        return {}, "only Linux resets the peak of the resident set"
    peaks, problem = printed_json("benchmarks.memory", contender, *map(str, case), str(threads), **ALLOCATOR)
    return peaks or {}, problem


def _peaks_of_this_process(contender: str, case: Case) -> dict[str, int]:
    run = make_run(CONTENDERS[contender], make_inputs(case, torch.device("cpu")))
    peaks = {}
    for operation in OPERATIONS.values():
        run.prepare(operation)()  # compiles, starts threads
        call = run.prepare(operation)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        RESIDENT_PEAK_RESET.write_text("5")
        result = call()
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        peaks[operation.name] = max(peak - before, 0)
        del result
    return peaks


def main() -> None:
    contender, rows, vocab_size, dtype, hidden_size, ignored, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = Case(int(rows), int(vocab_size), dtype, int(hidden_size), float(ignored))
    print(json.dumps(_peaks_of_this_process(contender, case)))


if __name__ == "__main__":
    main()
