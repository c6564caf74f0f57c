"""Where numbers come from: an absolute time means something only beside this."""

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.contender import Contender

ROOT = Path(__file__).resolve().parents[1]


def describe(device: torch.device, contenders: list[Contender]) -> dict[str, Any]:
    packages = {"pdl-kernels", "torch", "triton"}
    packages.update(package for contender in contenders for package in contender.packages)
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": commit(),
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in sorted(packages)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "second_level_cache_bytes": properties.L2_cache_size,
            "runtime": torch.version.cuda or torch.version.hip,
            "driver": _first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def device_folder(device: torch.device) -> str:
    """The folder of results for this device: "cpu", or the GPU's name in lower case."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """What PDL_KERNELS_COMMIT says; else the checkout's short hash, with -dirty if it has changes, or "unknown".

    The variable is for a copy of the files on another machine, where git's folder is missing or of another time.
    """
    told = os.environ.get("PDL_KERNELS_COMMIT")
    if told:
        return told
    found = _first_line_of("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if found is None:
        return "unknown"
    changed = _first_line_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{found}-dirty" if changed else found


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
