"""Which way a call takes, and why another cannot: an operator that a tracer records, Triton kernels, or plain torch."""

import functools
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The oldest versions supported. Triton's is repeated for installers in pyproject.toml, and a test compares the two.
MINIMUM_TORCH = (2, 11)
MINIMUM_TRITON = (3, 6)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # make_fx(..., pre_dispatch=True) has a stack of modes of its own


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


def shards_module(backend: str) -> ModuleType:
    """The module with shard_rows and merge_shards, for a vocabulary that is split over ranks."""
    if backend == "triton":
        from pdl_kernels.kernels import shard_launch

        return shard_launch
    from pdl_kernels.eager import shards

    return shards


# ---------------------------------------------------------------------------------------------------------------------
# Modes and transforms that surround a call


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call is recorded, or its tensors hold no data, so that it must be one operator that torch knows.

    That is so under torch.compile, torch.export and torch.jit.trace, under every mode that intercepts operators
    (FakeTensorMode, make_fx, FlopCounterMode, selective checkpointing, ...), under torch.func.functionalize, on meta
    tensors, and on tensors of a class that intercepts them, such as fake tensors outside of their mode.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_meta or (
            type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        ):
            return True
    return False


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device; None where it is off, and for meta tensors."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def refuse_transforms(what: str, tensor: Tensor) -> None:
    """RuntimeError under functorch transforms and forward-mode differentiation, which would miss the kernels."""
    batched = torch._C._functorch.is_legacy_batchedtensor(tensor)  # is_grads_batched=True
    if batched or (torch._C._are_functorch_transforms_active() and _other_transforms_than_functionalize()):
        raise RuntimeError(
            f"{what} does not support functorch transforms (torch.func.grad, vmap, jvp, is_grads_batched, ...); "
            "use torch.autograd.grad, or torch.nn.functional.cross_entropy inside transforms"
        )
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(
            f"{what} does not support forward-mode differentiation; use torch.nn.functional.cross_entropy for it"
        )


def _other_transforms_than_functionalize() -> bool:
    """Functionalisation passes an operator on as it is."""
    transforms = torch._C._functorch.get_interpreter_stack() or []
    return any(transform.key() != torch._C._functorch.TransformType.Functionalize for transform in transforms)
