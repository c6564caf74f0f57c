"""What the memory of this device reaches, in this run: the yardstick of every other number."""

import statistics
from collections.abc import Callable

import torch

BUFFER_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}  # many times any cache
REPEATS = 11


def measure_bandwidth(device: torch.device, stopwatch: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Bytes per second of a copy (read + written) and of reading alone, medians."""
    size = BUFFER_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)

    def rate(call: Callable[[], object], moved: int) -> float:
        stopwatch(call)  # warms up
        return moved / statistics.median(stopwatch(call) for _ in range(REPEATS))

    # Which reduction reads fastest depends on the device.
    readers = (source.sum, source.amax, source.view(torch.bfloat16).amax)
    return {
        "copy": rate(lambda: target.copy_(source), 2 * size),
        "read": max(rate(reader, size) for reader in readers),
    }
