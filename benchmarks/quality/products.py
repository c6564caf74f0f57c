"""Products of bfloat16 numbers on CPUs without instructions for them.

There torch multiplies at an eighth of float32's speed. Products in float32, rounded at the end, are what the
instructions compute: they accumulate in float32, too, and may differ in the order of the sum alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HARDWARE = "the hardware"
_aten = torch.ops.aten
PRODUCTS = {
    getattr(_aten, name).default
    for name in (
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}


class ProductsInFloat32(TorchDispatchMode):
    """Computes products of bfloat16 tensors in float32 and rounds what comes out."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        widened = {name: cast(value, torch.bfloat16, torch.float32) for name, value in kwargs.items()}
        found = function(*(cast(value, torch.bfloat16, torch.float32) for value in args), **widened)
        if isinstance(found, Tensor):
            return found.to(torch.bfloat16)
        output, *rest = found  # of attention; the sums of its softmax stay in float32
        return (output.to(torch.bfloat16), *rest)


def cast(value: Any, of: torch.dtype, to: torch.dtype) -> Any:
    return value.to(to) if isinstance(value, Tensor) and value.dtype == of else value


def multiplied_by(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies: GPUs, and CPUs with AMX or AVX-512 BF16, have instructions for bfloat16."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return HARDWARE
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return HARDWARE if fast else "float32, rounded"


def products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """What the program runs in."""
    return nullcontext() if multiplied_by(device, dtype) == HARDWARE else ProductsInFloat32()
