"""Runs the launcher's whole Python path without a GPU: kernels are compiled for sm_90 and "launched" into nothing.

A program of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled. Prints one JSON
line: compilations over ten different numbers of rows, and microseconds of Python per forward + backward.

    TRITON_INTERPRET=0 python tests/stubbed_device.py
"""

import json
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from triton.runtime.driver import driver

from benchmarks.roofline.compile import CompilingDriver
from benchmarks.roofline.hardware import HARDWARE
from pdl_kernels import backends, pdl_cross_entropy
from pdl_kernels.kernels import cross_entropy as kernels


class Launches:
    """Stands for the launcher that Triton generates; counts instead of launching."""

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *arguments: Any) -> None:
        Launches.counts[self.name] += 1


class StubbedDriver(CompilingDriver):
    """A device that loads and runs nothing."""

    launcher_cls = Launches
    utils = SimpleNamespace(
        load_binary=lambda *_: (0, 0, 0, 0, 1024),
        get_device_properties=lambda *_: {"max_shared_mem": 232448},
        unload_module=lambda *_: None,
    )

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return (9, 0)


def compilations() -> dict[str, int]:
    found = {}
    for name in dir(kernels):
        kernel = getattr(kernels, name)
        if name.endswith("_kernel"):
            found[name] = sum(len(caches[0]) for caches in kernel.device_caches.values())
    return found


def step(rows: int, vocab_size: int, **options: Any) -> None:
    logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    pdl_cross_entropy(logits, targets, torch.ones(vocab_size), backend="triton", **options).backward()


def main() -> None:
    warnings.filterwarnings("ignore")
    driver.set_active(StubbedDriver(HARDWARE["sm_90"].target))
    backends.triton_problem = lambda device, dtype: None  # CPU tensors stand in for the device's
    result: dict[str, Any] = {}

    step(17, 4096)
    before = compilations()
    for rows in (16, 18, 31, 64, 100, 128, 255, 1000, 1024, 3000):
        step(rows, 4096)
    result["compilations_before"] = before
    result["compilations_after"] = compilations()

    Launches.counts.clear()
    step(1000, 4096)
    result["launches"] = dict(Launches.counts)

    logits = torch.zeros(16, 1000, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(16, dtype=torch.int64)
    weights = torch.ones(1000)
    upstream = torch.ones(())
    samples = []
    for _ in range(400):
        start = time.perf_counter()
        loss = pdl_cross_entropy(logits, targets, weights, backend="triton")
        torch.autograd.grad(loss, logits, upstream)
        samples.append((time.perf_counter() - start) * 1e6)
    result["microseconds"] = {"median": statistics.median(samples), "p20": statistics.quantiles(samples, n=5)[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
