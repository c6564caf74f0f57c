"""Interleaved timing: A B C A B C ..., every sample kept. Preparation (restoring logits) stays outside the clock."""

import ctypes
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from benchmarks.operations import Operation, Run

MIN_ROUNDS = 3
MIN_FLUSH_BYTES = 128 << 20
FLUSHED_CACHES = 2  # so many times the second-level cache is written before every sample
HEAD_START_CYCLES = 1_000_000  # of the GPU's clock: the host enqueues the whole operation while the GPU still waits
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError


class Summary(NamedTuple):
    median: float  # seconds
    p20: float
    p80: float


def summarize(seconds: list[float]) -> Summary:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Summary(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


class Lane(NamedTuple):
    """One instance of a contender in the interleaving, and where its samples go."""

    run: Run
    seconds: list[float]


def make_stopwatch(device: torch.device, *, fresh_pages: bool = True) -> Callable[[Callable[[], object]], float]:
    """A function that runs its argument once and returns the seconds it took.

    Args:
        fresh_pages: on a CPU with glibc, give the pages that malloc keeps back to the system before every sample, so
            that large new memory costs the same whatever the process did before. Otherwise contenders may be handed
            pages that others left, as under allocators that keep them.
    """
    if device.type == "cuda":
        return _GPUStopwatch(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if fresh_pages and sys.platform == "linux" else None

    def seconds(call: Callable[[], object]) -> float:
        if trim is not None:
            trim(0)
        return _cpu_seconds(call)

    return seconds


def time_interleaved(
    lanes: list[Lane],
    operation: Operation,
    rounds: int,
    seconds: float,
    stopwatch: Callable[[Callable[[], object]], float],
    advance: Callable[[int], None],
) -> list[tuple[Lane, Exception]]:
    """Fill every lane with one sample per round; return the lanes that raised and were given up.

    Rounds end early once `seconds` are over, though not before MIN_ROUNDS.
    """
    deadline = time.perf_counter() + seconds
    lanes = list(lanes)
    given_up: list[tuple[Lane, Exception]] = []
    for round_number in range(-1, rounds):  # round -1 warms up
        if round_number >= MIN_ROUNDS and time.perf_counter() > deadline:
            advance((rounds - round_number) * len(lanes))
            break
        for lane in list(lanes):
            try:
                sample = stopwatch(lane.run.prepare(operation))
            except Exception as error:  # out of memory, mostly
                lanes = [other for other in lanes if other is not lane]
                given_up.append((lane, error.with_traceback(None)))  # frames would keep their tensors alive
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                continue
            if round_number >= 0:
                lane.seconds.append(sample)
            advance(1)
    return given_up


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within, TimeoutError is raised once they are over.

    It ends Python, the compiler between its passes and the assembler, and no call that waits for a kernel. Nothing is
    limited outside the main thread or where there are no such signals.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:.3g} seconds")

    handler = signal.signal(signal.SIGALRM, expire)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freed outside the clock, whoever made it
    return seconds


class _GPUStopwatch:
    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(MIN_FLUSH_BYTES, FLUSHED_CACHES * cache_bytes)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        del result
        return self._start.elapsed_time(self._end) / 1e3
