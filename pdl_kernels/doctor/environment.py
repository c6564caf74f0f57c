"""What is installed, which devices there are, and which backend would run on them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any, NamedTuple

import torch

import pdl_kernels
from pdl_kernels import backends

PACKAGES = ("pdl-kernels", "torch", "triton", "numpy", "safetensors", "transformers", "datasets")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NOT_INSTALLED = "not installed"
OTHER = "any other value"
# Each variable, and what its values do. None stands for "not set", and for other values where there is no OTHER.
SETTINGS: dict[str, dict[str | None, str]] = {
    "PDL_KERNELS_VALIDATE": {
        "1": "targets that are no class raise IndexError on every device, at the cost of waiting for it",
        None: "targets that are no class raise IndexError on a CPU, and make their rows nan on other devices",
    },
    "PDL_KERNELS_CLUSTERS": {
        "1": "long rows are held by clusters of thread blocks wherever Triton compiles them",
        "0": "no row is held by more than one thread block",
        None: "clusters of thread blocks hold long rows where a recorded run has shown them right: compute capability "
        "9.0 with Triton >= 3.9",
        OTHER: "an error: accepted are 0, 1, or not set",
    },
    "TRITON_INTERPRET": {
        "1": "Triton kernels run in its interpreter, slowly; backend='triton' takes CPU tensors",
        None: "Triton kernels are compiled, and take no CPU tensors",
    },
}


class Device(NamedTuple):
    """A device torch finds, and what "auto" chooses on it."""

    device: str
    name: str
    capability: str | None  # of CUDA such as 9.0, of ROCm the architecture
    memory: int | None  # bytes
    backends: dict[str, tuple[str, str]]  # dtype -> "triton" or "eager", and why


class Setting(NamedTuple):
    """An environment variable that the package reads."""

    variable: str
    value: str | None
    meaning: str


def versions() -> dict[str, str]:
    """Python and the packages that matter, by name."""
    found = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = NOT_INSTALLED
    found["pdl-kernels"] = pdl_kernels.__version__  # of the code that runs, installed or not
    found["torch"] = f"{torch.__version__} ({torch_build()})"
    return found


def torch_build() -> str:
    """What torch was built for, and whether it finds such a device here."""
    if torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    elif torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    else:
        return "a CPU build"
    return f"a build for {build}" if torch.cuda.is_available() else f"a build for {build}, which finds no device"


def devices() -> list[Device]:
    """The CPU, and every device of the accelerator."""
    found = [_with_backends(torch.device("cpu"), _cpu_name(), None, _cpu_memory())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rocm = torch.version.hip is not None
            capability = getattr(properties, "gcnArchName", None) if rocm else f"{properties.major}.{properties.minor}"
            found.append(
                _with_backends(torch.device("cuda", index), properties.name, capability, properties.total_memory)
            )
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None  # one is available
        for index in range(torch.accelerator.device_count()):
            found.append(_with_backends(torch.device(kind.type, index), kind.type, None, None))
    return found


def settings() -> list[Setting]:
    """Environment variables, and what their values mean."""
    values = {variable: os.environ.get(variable) for variable in SETTINGS}
    return [Setting(variable, value, _meaning(SETTINGS[variable], value)) for variable, value in values.items()]


def _meaning(meanings: dict[str | None, str], value: str | None) -> str:
    return meanings.get(value or None) or meanings.get(OTHER) or meanings[None]


def report() -> dict[str, Any]:
    """Versions, devices and settings, as JSON can hold them."""
    return {
        "versions": versions(),
        "devices": [
            {
                **device._asdict(),
                "backends": {dtype: {"auto": auto, "why": why} for dtype, (auto, why) in device.backends.items()},
            }
            for device in devices()
        ],
        "settings": [setting._asdict() for setting in settings()],
    }


def _with_backends(device: torch.device, name: str, capability: str | None, memory: int | None) -> Device:
    chosen = {str(dtype).removeprefix("torch."): backends.explain_auto(device, dtype) for dtype in DTYPES}
    return Device(str(device), name, capability, memory, chosen)


def _cpu_name() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"


def _cpu_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None
