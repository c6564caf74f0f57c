"""Products of bfloat16 numbers on CPUs without instructions for them.

torch's own matrix products are slow there. Products in float32, rounded at the end, are what the instructions compute:
they, too, add in float32, perhaps in another order. Attention is left to torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HARDWARE = "the hardware"
_aten = torch.ops.aten
PRODUCTS = {getattr(_aten, name).default for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")}


class ProductsInFloat32(TorchDispatchMode):
    """Computes products of bfloat16 tensors in float32 and rounds what comes out."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        widened = (value.float() if isinstance(value, Tensor) else value for value in args)
        return function(*widened, **kwargs).to(torch.bfloat16)


def multiplied_by(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies: GPUs, and CPUs with AMX or AVX-512 BF16, have instructions for bfloat16."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return HARDWARE
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return HARDWARE if fast else "float32, rounded"


def products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """What the program runs in."""
    return nullcontext() if multiplied_by(device, dtype) == HARDWARE else ProductsInFloat32()
