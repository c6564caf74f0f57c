"""Python's own time per call and the number of launches, for the Triton backend, without a GPU.

stubbed_device.py does the measuring: kernels are compiled for sm_90 and launched into nothing.
"""

from typing import Any

from benchmarks.fresh_process import printed_json

BACKWARD_KERNELS = ("gradient_rows_kernel", "scale_rows_kernel")


def measure_host() -> dict[str, Any]:
    """Microseconds per forward + backward and launches by direction; or {"problem": why not}."""
    measured, problem = printed_json("benchmarks.stubbed_device", TRITON_INTERPRET="0")
    if problem is not None:
        return {"problem": problem}
    backward = sum(measured["launches"].get(kernel, 0) for kernel in BACKWARD_KERNELS)
    return {
        "microseconds": measured["microseconds"],
        "launches_forward": sum(measured["launches"].values()) - backward,
        "launches_backward": backward,
    }
