"""Which backend runs, and why another cannot."""

import functools
import os
import warnings
from types import ModuleType

import torch

# The oldest versions supported. Triton's is repeated for installers in pyproject.toml, and a test compares the two.
MINIMUM_TORCH = (2, 11)
MINIMUM_TRITON = (3, 6)

BACKENDS = ("auto", "triton", "eager")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def version_tuple(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which is how they run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.lru_cache(maxsize=1)
def triton_import_problem() -> str | None:
    """Why Triton cannot be used on any device, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if version_tuple(triton.__version__) < MINIMUM_TRITON:
        return f"Triton {triton.__version__} is installed, and Triton >= {dotted(MINIMUM_TRITON)} is needed"
    return None


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on tensors of this device and dtype, or None."""
    if device.type == "cpu" and not interpreted():
        return "the tensors are on a CPU, where Triton runs only with TRITON_INTERPRET=1 set before the first call"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on a device of type {device.type!r}, and the kernels run on 'cuda' (CUDA and ROCm)"
    if dtype not in TRITON_DTYPES:
        return f"the logits are {dtype}, and the kernels take float16, bfloat16 and float32"
    return triton_import_problem()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton" or "eager" for `requested`.

    "auto" is Triton for CUDA and ROCm tensors and eager elsewhere; float64 is eager everywhere. Where "auto" would be
    Triton and Triton is missing or too old, eager runs and a warning says so once.
    """
    if requested == "eager":
        return "eager"
    if requested == "triton":
        problem = triton_problem(device, dtype)
        if problem is not None:
            raise RuntimeError(f"backend='triton' cannot run: {problem}; backend='eager' runs anywhere")
        return "triton"
    if device.type != "cuda" or dtype not in TRITON_DTYPES:
        return "eager"
    problem = triton_import_problem()
    if problem is None:
        return "triton"
    _warn_once(f"pdl_kernels runs its slower eager backend on {device.type} tensors: {problem}")
    return "eager"


def explain_auto(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What "auto" runs on tensors of this device and dtype, and why."""
    if device.type not in ("cpu", "cuda"):
        return "eager", f"the kernels run on 'cuda' (CUDA and ROCm), and this is a device of type {device.type!r}"
    if dtype not in TRITON_DTYPES:
        return "eager", f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        only_asked = "runs its interpreter there, slowly, and only for backend='triton'"
        return "eager", f"plain torch is the fast way on a CPU; Triton {only_asked} with TRITON_INTERPRET=1"
    problem = triton_import_problem()
    return ("triton", "the fused kernels run on this device") if problem is None else ("eager", problem)


def backend_module(backend: str) -> ModuleType:
    """The module with forward, backward, scale, denominators, loss_rows and reduce_rows.

    Triton is imported only here, and only when it is chosen.
    """
    if backend == "triton":
        from pdl_kernels.kernels import launch

        return launch
    from pdl_kernels.eager import cross_entropy

    return cross_entropy
