"""The package's own launches, without a GPU: whatever it would launch is compiled, and nothing is launched.

So no list of variants, arguments or compile options exists here that could drift from the package's.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.roofline.hardware import HARDWARE
from pdl_kernels import backends
from pdl_kernels.kernels import launch
from pdl_kernels.kernels.planner import Device
from pdl_kernels.ops import cross_entropy as operation


class CompilingDriver:
    """Stands for a device of `target`: enough of one for Triton to compile for it."""

    def __init__(self, target: GPUTarget, device: int = 0) -> None:
        self.target = target
        self.device = device  # Triton keeps what it compiled per device, so that every target needs its own

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    """One launch that did not happen."""

    kernel: str
    programs: int
    arguments: dict[str, Any]  # by name, compile-time constants included
    compiled: Any

    @property
    def warps(self) -> int:
        return self.compiled.metadata.num_warps


def described_device(target: str, *, cache_known: bool) -> Device:
    """What the planner sees of a device of `target`.

    Args:
        cache_known: of an unknown second-level cache the planner expects nothing: it holds every row that fits on chip.
    """
    hardware = HARDWARE[target]
    nvidia = hardware.target.backend == "cuda"
    return Device(
        hardware.multiprocessors, hardware.target.warp_size, nvidia,
        divmod(hardware.target.arch, 10) if nvidia else (0, 0), hardware.cache_bytes if cache_known else 0,
    )  # fmt: skip


@contextmanager
def public_calls_take_any_tensor() -> Iterator[None]:
    """Within, tensors of any device stand for a GPU's: Triton may run, and the targets' values are not looked at."""

    def nothing(*_: Any) -> None:  # a Mock would take microseconds of the calls that are timed
        return None

    with mock.patch.object(backends, "triton_problem", nothing), mock.patch.object(operation, "check_targets", nothing):
        yield


@contextmanager
def compiled_launches(
    target: str, wanted: Callable[[str], bool] = lambda name: True, *, cache_known: bool = False
) -> Iterator[list[Launch]]:
    """Within, `launch` sees a device of `target`; the launches of `wanted` kernels are compiled and collected."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_alone(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> None:
        name = kernel.fn.__name__
        if wanted(name):
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **keywords)
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            named |= {key: value for key, value in keywords.items() if key in kernel.arg_names}
            launches.append(Launch(name, math.prod(grid), named, compiled))

    driver.set_active(CompilingDriver(HARDWARE[target].target, list(HARDWARE).index(target)))
    with (
        mock.patch.object(JITFunction, "run", compile_alone),
        mock.patch.object(launch, "device_of", return_value=described_device(target, cache_known=cache_known)),
    ):
        yield launches
