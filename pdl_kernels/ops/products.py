"""Matrix products that accumulate in a wider dtype than their operands have."""

import torch
from torch import Tensor

BLOCK = 2048  # rows or columns converted at a time where the library has no such product


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total = left @ right if `first`, else total += left @ right.

    Args:
        total: (m, n), of the operands' dtype or wider; rounded to it once per call.
        left: (m, k). right: (k, n).
    """
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        if first:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif left.shape[0] >= left.shape[1]:
        wide = right.to(total.dtype)
        for start in range(0, left.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            add_product(total[rows], left[rows].to(total.dtype), wide, first=first)
    else:
        for start in range(0, left.shape[1], BLOCK):
            inner = slice(start, start + BLOCK)
            add_product(total, left[:, inner].to(total.dtype), right[inner].to(total.dtype), first=first and start == 0)
