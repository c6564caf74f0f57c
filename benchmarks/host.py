"""Python's own time per call and the number of launches, for the Triton backend, without a GPU.

tests/stubbed_device.py does the measuring: kernels are compiled for sm_90 and launched into nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[1] / "tests" / "stubbed_device.py"
BACKWARD_KERNELS = ("gradient_rows_kernel", "scale_rows_kernel")


def measure_host() -> dict[str, Any]:
    """Microseconds per forward + backward and launches by direction; or {"problem": why not}."""
    if not PROGRAM.exists():
        return {"problem": f"{PROGRAM.name} is not there"}
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"problem": lines[-1] if lines else f"{PROGRAM.name} ended with {done.returncode}"}
    measured = json.loads(done.stdout.splitlines()[-1])
    backward = sum(measured["launches"].get(kernel, 0) for kernel in BACKWARD_KERNELS)
    return {
        "microseconds": measured["microseconds"],
        "launches_forward": sum(measured["launches"].values()) - backward,
        "launches_backward": backward,
    }
