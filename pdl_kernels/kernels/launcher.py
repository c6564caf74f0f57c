"""Launching a kernel again and again without what Triton does before each launch."""

from typing import Any

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

_major, _minor, *_ = triton.__version__.split(".")
TRITON_VERSION = (int(_major), int(_minor))
# Versions of Triton whose CompiledKernel.run takes what Launcher gives it.
DIRECT = (3, 6) <= TRITON_VERSION <= (3, 9) and not knobs.runtime.interpret


class Launcher:
    """A kernel with its grid, its numbers and its compile options; what is left to give are its tensors.

    Triton binds, specialises and looks up some thirty arguments at every launch, which takes longer than everything
    else that happens on the host. So the first launch is an ordinary one, and the compiled kernel that it returns is
    launched from then on, as Triton's tutorial on the fused softmax does with the one of `warmup`. This is right only
    for tensors that Triton would specialise alike, which is for the caller to see to: on one device, of the same dtypes
    in the same places, None in the same places, and starting on 16 bytes or not as those of the first launch did.

    Whatever returns no compiled kernel, as Triton's interpreter does, is launched in the ordinary way every time.
    Triton's settings (`triton.knobs`) count as they are at the first launch, its launch hooks at every one.
    """

    __slots__ = ("compile_options", "compiled", "direct", "grid", "kernel", "numbers")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],  # the kernel's last arguments, in order
        compile_options: dict[str, Any],
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.compile_options = compile_options
        self.compiled: Any = None
        self.direct: tuple[Any, Any, Any] | None = None

    def __call__(self, *tensors: Any, stream: int | None = None) -> None:
        """`stream` is what `direct_stream` returned for the current device."""
        if stream is not None and self.direct is not None:
            run, function, packed_metadata = self.direct
            run(*self.grid, stream, function, packed_metadata, None, None, None, *tensors, *self.numbers)
        elif self.compiled is not None:
            self.compiled[self.grid](*tensors, *self.numbers)
        else:
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.compile_options)
            if isinstance(compiled, CompiledKernel):
                self.compiled = compiled
                self.direct = (compiled.run, compiled.function, compiled.packed_metadata)


def direct_stream() -> int | None:
    """The current stream of the current device, for launches without what Triton prepares for hooks.

    That takes two thirds of the time of `compiled[grid](...)`. None where a hook, a profiler's for instance, wants to
    hear of launches, where this version of Triton may launch in another way, and in the interpreter.
    """
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if not DIRECT or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return None
    active = driver.active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream
