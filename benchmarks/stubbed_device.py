"""Runs the Triton backend's Python path without a GPU: kernels are compiled for sm_90 and "launched" into nothing.

A program of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled. Prints one JSON
line: compilations over ten different numbers of rows, with --calls the launches of public calls beside what was
planned, and microseconds of Python per forward + backward.

    TRITON_INTERPRET=0 python -m benchmarks.stubbed_device [--calls]
"""

import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from triton.runtime.driver import driver

from benchmarks import compile_ahead
from benchmarks.roofline.cases import BOTH, OPTIONS, CompiledCall, compile_call
from benchmarks.roofline.compile import CompilingDriver, compiled_launches, public_calls_take_any_tensor
from benchmarks.roofline.hardware import HARDWARE
from pdl_kernels import pdl_cross_entropy
from pdl_kernels.kernels import launch, planner, reductions, row_kernels, single_pass
from pdl_kernels.options import LossOptions


class CountingLauncher:
    """Stands for the launcher that Triton generates; counts instead of launching."""

    counts: ClassVar[Counter[str]] = Counter()
    seen: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__
        self.kernel = {
            "kernel": self.name, "warps": metadata.num_warps, "blocks": metadata.num_ctas, "hash": metadata.hash,
        }  # fmt: skip

    def __call__(self, *arguments: Any) -> None:
        CountingLauncher.counts[self.name] += 1
        CountingLauncher.seen.append({**self.kernel, "grid": arguments[:2]})


class StubbedDriver(CompilingDriver):
    """A device that loads and runs nothing."""

    launcher_cls = CountingLauncher
    utils = SimpleNamespace(
        load_binary=lambda *_: (0, 0, 0, 0, 1024),
        get_device_properties=lambda *_: {"max_shared_mem": 232448},
        unload_module=lambda *_: None,
    )

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return (9, 0)


def compilations() -> dict[str, int]:
    found = {}
    for module in (row_kernels, single_pass, reductions):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                found[name] = sum(len(caches[0]) for caches in kernel.device_caches.values())
    return found


def step(rows: int, vocab_size: int, **options: Any) -> None:
    logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    pdl_cross_entropy(logits, targets, torch.ones(vocab_size), backend="triton", **options).backward()


# Rows, vocabulary, options: rows read twice, held by one block, held by a cluster, sliced; and what cannot be held.
CALLS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (300, 32000, {}),
    (300, 16384, {}),
    (300, 16384, {"z_loss": 1e-4, "return_stats": True}),
    (300, 16384, {"softcap": 30.0}),
    (300, 151936, {}),
    (3, 32000, {}),
)


def public_calls() -> list[dict[str, Any]]:
    """What calls of `pdl_cross_entropy` launch, what the planner names, and what the roofline compiles for them."""
    found = []
    target = compile_ahead.TARGET
    with mock.patch.object(launch, "device_of", return_value=compile_ahead.DEVICE):
        for rows, vocab_size, options in CALLS:
            CountingLauncher.seen.clear()
            logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.zeros(rows, dtype=torch.int64)
            pdl_cross_entropy(logits, targets, torch.ones(vocab_size), backend="triton", **options)
            plan, *_ = planner.plan_loss(
                rows, vocab_size, 2, compile_ahead.DEVICE, launch.TRITON_VERSION,
                z_loss="z_loss" in options, stats="return_stats" in options, transform="softcap" in options,
            )  # fmt: skip
            case = CompiledCall(BOTH, target, vocab_size=vocab_size, rows=rows, clusters=None)
            with (
                compiled_launches(target, cache_known=True) as compiled,
                mock.patch.dict(OPTIONS, {"plain": LossOptions(**options)}),
            ):
                compile_call(case)
            driver.set_active(StubbedDriver(HARDWARE[target].target))
            found.append(
                {
                    "launched": list(CountingLauncher.seen),
                    "planned": plan._asdict(),
                    "roofline": [one.compiled.metadata.hash for one in compiled],
                }
            )
    return found


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


def measured(with_calls: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    step(17, 4096)
    result["compilations_before"] = compilations()
    for rows in (16, 18, 31, 64, 100, 128, 255, 1000, 1024, 3000):
        step(rows, 4096)
    result["compilations_after"] = compilations()

    CountingLauncher.counts.clear()
    step(1000, 4096)
    result["launches"] = dict(CountingLauncher.counts)

    result["public"] = public_calls() if with_calls else []

    logits = torch.zeros(16, 1000, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(16, dtype=torch.int64)
    weights = torch.ones(1000)
    result["microseconds"] = microseconds(lambda: pdl_cross_entropy(logits, targets, weights, backend="triton"), logits)
    result["autograd_microseconds"] = microseconds(lambda: Nothing.apply(logits), logits)
    return result


def main() -> None:
    warnings.filterwarnings("ignore")
    driver.set_active(StubbedDriver(HARDWARE["sm_90"].target))
    with public_calls_take_any_tensor():
        print(json.dumps(measured(with_calls="--calls" in sys.argv)))


if __name__ == "__main__":
    main()
