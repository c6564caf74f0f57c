"""Runs the launcher's whole Python path without a GPU: kernels are compiled for sm_90 and "launched" into nothing.

A program of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled. Prints one JSON
line: compilations over ten different numbers of rows, what repeated launches pass beside Triton's own, and microseconds
of Python per forward + backward.

    TRITON_INTERPRET=0 python tests/stubbed_device.py
"""

import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from triton import knobs
from triton.runtime.driver import driver

from benchmarks.roofline.compile import CompilingDriver
from benchmarks.roofline.hardware import HARDWARE
from pdl_kernels import backends, pdl_cross_entropy
from pdl_kernels.kernels import cross_entropy as kernels
from pdl_kernels.ops import cross_entropy as operation
from pdl_kernels.ops import repeated_calls

METADATA, ENTER_HOOK, LAST_HOOK = 6, 7, 8  # after the grid, the stream, the function and its packed metadata


class Launches:
    """Stands for the launcher that Triton generates; counts instead of launching."""

    counts: ClassVar[Counter[str]] = Counter()
    last: ClassVar[dict[str, tuple[Any, ...]]] = {}  # what the last launch of a kernel was given

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *arguments: Any) -> None:
        Launches.counts[self.name] += 1
        Launches.last[self.name] = arguments


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


def check_no_target(*_: Any) -> None:
    """What `check_targets` does with targets on a device: their values are not looked at."""
    operation.validates_on_device()


def repeated_launches() -> dict[str, Any]:
    """What the launches of a call are given the first time, by Triton, and the second time, by our Launcher."""
    repeated_calls.forget()
    seen = []
    for hook in (None, None, print):  # a hook that must hear of launches
        if hook:
            knobs.runtime.launch_enter_hook.add(hook)
        step(1000, 4096)
        seen.append(dict(Launches.last))
    knobs.runtime.launch_enter_hook.remove(print)
    first, second, hooked = seen
    return {
        "same": [
            name for name in first if described(first[name]) == described(second[name]) == described(hooked[name])
        ],
        "direct": [name for name in first if first[name][ENTER_HOOK] is not None and second[name][ENTER_HOOK] is None],
        "hooked": [name for name in first if hooked[name][ENTER_HOOK] is not None],
    }


def described(arguments: tuple[Any, ...]) -> list[Any]:
    """All that a launch is given but its hooks and what they are told; tensors by kind."""
    return [
        (tuple(value.shape), str(value.dtype), value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value
        for value in arguments[:METADATA] + arguments[LAST_HOOK + 1 :]
    ]


class Nothing(torch.autograd.Function):
    """What autograd costs by itself."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return ctx.saved_tensors[0]


def microseconds(forward: Callable[[], torch.Tensor], logits: torch.Tensor) -> dict[str, float]:
    upstream = torch.ones(())
    samples = []
    for _ in range(2000):
        start = time.perf_counter()
        torch.autograd.grad(forward(), logits, upstream)
        samples.append((time.perf_counter() - start) * 1e6)
    return {"median": statistics.median(samples), "p20": statistics.quantiles(samples, n=5)[0]}


def main() -> None:
    warnings.filterwarnings("ignore")
    driver.set_active(StubbedDriver(HARDWARE["sm_90"].target))
    backends.triton_problem = lambda device, dtype: None  # CPU tensors stand in for the device's
    operation.check_targets = check_no_target
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
    result["repeated"] = repeated_launches()

    logits = torch.zeros(16, 1000, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(16, dtype=torch.int64)
    weights = torch.ones(1000)
    result["microseconds"] = microseconds(lambda: pdl_cross_entropy(logits, targets, weights, backend="triton"), logits)
    result["autograd_microseconds"] = microseconds(lambda: Nothing.apply(logits), logits)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
