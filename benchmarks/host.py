"""Python's own time per call and the number of launches, for the Triton backend, without a GPU.

stubbed_device.py does the measuring: kernels are compiled for sm_90 and launched into nothing.
"""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.environment import ROOT

PROGRAM = "benchmarks.stubbed_device"
BACKWARD_KERNELS = ("gradient_rows_kernel", "scale_rows_kernel")


def measure_host() -> dict[str, Any]:
    """Microseconds per forward + backward and launches by direction; or {"problem": why not}."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-m", PROGRAM], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"problem": lines[-1] if lines else f"{PROGRAM} ended with {done.returncode}"}
    measured = json.loads(done.stdout.splitlines()[-1])
    backward = sum(measured["launches"].get(kernel, 0) for kernel in BACKWARD_KERNELS)
    return {
        "microseconds": measured["microseconds"],
        "launches_forward": sum(measured["launches"].values()) - backward,
        "launches_backward": backward,
    }
