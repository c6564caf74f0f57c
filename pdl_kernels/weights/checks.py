"""Checks of counts and weight tables. Every error names the argument, what came, and what is accepted."""

import math
from typing import Any

from torch import Tensor

from pdl_kernels.weights.counts import TokenCounts


def check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted is a finite number >= {low}")
    if not (low <= value <= high and math.isfinite(value)):
        limit = "" if high == math.inf else f" and <= {high}"
        raise ValueError(f"{name} is {value}; accepted are finite numbers >= {low}{limit}")


def check_counts(counts: Any) -> Tensor:
    """(V,) float64."""
    if isinstance(counts, TokenCounts):
        counts = counts.counts
    if not isinstance(counts, Tensor) or counts.is_complex():
        kind = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"counts are {kind}; accepted is a real torch.Tensor or TokenCounts")
    if counts.dim() != 1:
        raise ValueError(f"counts have shape {tuple(counts.shape)}; accepted is (V,), one count per vocabulary entry")
    frequencies = counts.detach().double()
    accepted = (frequencies >= 0) & frequencies.isfinite()
    if not accepted.all():
        position = int((~accepted).nonzero()[0])
        raise ValueError(f"counts[{position}] is {counts[position].item()}; accepted are finite counts >= 0")
    return frequencies


def check_finite(weights: Tensor, counts: Tensor, recipe: str) -> None:
    if not weights.isfinite().all():
        position = int((~weights.isfinite()).nonzero()[0])
        raise ValueError(
            f"the weight of entry {position} (count {counts[position].item():g}, {recipe}) is not finite in float32; "
            "accepted are values that keep it finite, such as eps=1, or a number for unseen"
        )


def check_table(table: Any) -> None:
    """A weight table: (V,) floating, finite, >= 0."""
    if not isinstance(table, Tensor) or not table.is_floating_point():
        kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"table is {kind}; accepted is a floating torch.Tensor")
    if table.dim() != 1 or len(table) == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}; accepted is (V,), one weight per vocabulary entry")
    accepted = (table >= 0) & table.isfinite()
    if not accepted.all():
        position = int((~accepted).nonzero()[0])
        raise ValueError(f"table[{position}] is {table[position].item()}; accepted are finite weights >= 0")
