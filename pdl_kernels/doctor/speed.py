"""How fast loss and gradient are on this machine, beside a copy of memory and beside torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.doctor.cases import DTYPES

LOGITS_BYTES = {"cuda": 512 << 20, "cpu": 32 << 20}  # many times any cache, where the memory allows it
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
SHARE_OF_MEMORY = 1 / 12  # of the free memory: torch's composition needs several such tensors, also in float32
ROUNDS = {"cuda": 15, "cpu": 3}
FLUSH_BYTES = 256 << 20  # written before every sample on a GPU, so that nothing is found in the second-level cache
HEAD_START_CYCLES = 1_000_000  # the GPU waits so long, until the host has enqueued the whole sample


def measure_copy(device: torch.device) -> float:
    """How fast a copy on `device` is, in bytes per second, those read and those written."""
    kind = _kind(device)
    source = torch.randn(min(COPY_BYTES[kind], _affordable(device)) // 4, device=device)
    target = torch.empty_like(source)
    (seconds,) = _interleaved([lambda: target.copy_(source)], device)
    return 2 * source.numel() * 4 / seconds


def speeds(device: torch.device, backend: str, shapes: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """One record for every (vocabulary, dtype): the median time of forward + backward, ours and torch's, in seconds."""
    for vocab_size, dtype in shapes:
        itemsize = DTYPES[dtype].itemsize
        rows = max(1, min(LOGITS_BYTES[_kind(device)], _affordable(device)) // (vocab_size * itemsize))
        logits = torch.empty(rows, vocab_size, dtype=DTYPES[dtype], device=device).normal_().requires_grad_()
        targets = torch.randint(vocab_size, (rows,), device=device)
        weights = torch.rand(vocab_size, device=device)
        own_weights = weights.to(logits.dtype)  # F.cross_entropy takes weights of the logits' dtype only

        def ours(logits: Tensor = logits, targets: Tensor = targets, weights: Tensor = weights) -> Any:
            return torch.autograd.grad(pdl_cross_entropy(logits, targets, weights, backend=backend), logits)

        def torchs(logits: Tensor = logits, targets: Tensor = targets, weights: Tensor = own_weights) -> Any:
            return torch.autograd.grad(F.cross_entropy(logits, targets, weight=weights), logits)

        seconds, torchs_seconds = _interleaved([ours, torchs], device)
        yield {
            "vocab_size": vocab_size,
            "dtype": dtype,
            "rows": rows,
            "seconds": seconds,
            "torch_seconds": torchs_seconds,
            "floor_bytes": 2 * rows * vocab_size * itemsize,  # every logit read once, every gradient written once
        }


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


def _affordable(device: torch.device) -> int:
    """The bytes that one tensor may take."""
    if device.type != "cuda":
        return LOGITS_BYTES["cpu"]
    return int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_MEMORY)


def _interleaved(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """The median time of each call, in seconds. The calls take turns, so that a slow moment does not hit one alone."""
    sample = _gpu_sampler(device) if device.type == "cuda" else _cpu_sample
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        sample(call)  # warms up, compiles
        sample(call)
    for _ in range(ROUNDS[_kind(device)]):
        for call, found in zip(calls, samples, strict=True):
            found.append(sample(call))
    return [statistics.median(found) for found in samples]


def _cpu_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _gpu_sampler(device: torch.device) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(min(FLUSH_BYTES, _affordable(device)), dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(call: Callable[[], object]) -> float:
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    return sample
