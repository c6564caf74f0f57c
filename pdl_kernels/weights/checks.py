"""Checks of numbers, counts and weight tables. Every error names the argument, what came, and what is accepted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether it is an int or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, low: float = 0, high: float = math.inf, *, ends: str = "[]", why: str = ""
) -> None:
    """TypeError or ValueError unless `value` is a finite number from `low` to `high`.

    Args:
        ends: which bounds are accepted themselves, in the notation of intervals: "[]" both, "[)" only `low`.
        why: the end of the message, for more about the bounds.
    """
    above = f"{'>=' if ends[0] == '[' else '>'} {low}"
    if high == math.inf:
        singular, plural = f"a finite number {above}", f"finite numbers {above}"
    else:
        bounds = f"{above} and {'<=' if ends[1] == ']' else '<'} {high}"
        singular, plural = f"a number {bounds}", f"numbers {bounds}"
    if not is_number(value):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted is {singular}{why}")
    inside = low <= value <= high and not (value == low and ends[0] == "(") and not (value == high and ends[1] == ")")
    if not (inside and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; accepted are {plural}{why}")


def check_integer(name: str, value: Any, low: int = 0, *, why: str = "") -> None:
    """TypeError or ValueError unless `value` is an integer >= `low`. `why` is as in `check_number`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted is an integer >= {low}{why}")
    if value < low:
        raise ValueError(f"{name} is {value}; accepted are integers >= {low}{why}")


def first_false(accepted: Tensor) -> int | None:
    """The first position where the (V,) booleans are False, or None."""
    return None if accepted.all() else int((~accepted).nonzero()[0])


def check_entries(name: str, values: Tensor, accepted: Tensor, what: str) -> None:
    """ValueError that names the first of the (V,) values where the (V,) booleans `accepted` are False."""
    position = first_false(accepted)
    if position is not None:
        raise ValueError(f"{name}[{position}] is {values[position].item():g}; accepted are {what}")


def check_counts(counts: Any) -> Tensor:
    """The counts of a tensor or of `TokenCounts`, as (V,) float64 on their device."""
    counts = getattr(counts, "counts", counts)  # of TokenCounts, which this module does not import: it checks for them
    if not isinstance(counts, Tensor) or counts.is_complex():
        kind = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"counts are {kind}; accepted is a real torch.Tensor or TokenCounts")
    if counts.dim() != 1:
        raise ValueError(f"counts have shape {tuple(counts.shape)}; accepted is (V,), one count per vocabulary entry")
    frequencies = counts.detach().double()
    check_entries("counts", frequencies, (frequencies >= 0) & frequencies.isfinite(), "finite counts >= 0")
    return frequencies


def check_table(table: Any) -> None:
    """A weight table: (V,) floating, finite, >= 0."""
    if not isinstance(table, Tensor) or not table.is_floating_point():
        kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"table is {kind}; accepted is a floating torch.Tensor")
    if table.dim() != 1 or len(table) == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}; accepted is (V,), one weight per vocabulary entry")
    check_entries("table", table, (table >= 0) & table.isfinite(), "finite weights >= 0")


def check_table_and_counts(table: Any, counts: Any) -> tuple[Tensor, Tensor]:
    """The weights and how often each entry was counted: (V,) and (V,), in float64 on the CPU.

    There may be fewer counts than weights, because an output layer is often longer than its tokenizer: the entries
    beyond were never counted.
    """
    check_table(table)
    tokens = check_counts(counts).cpu()
    if len(tokens) > len(table):
        raise ValueError(f"counts have {len(tokens)} entries; accepted are at most {len(table)}, the table's length")
    if tokens.sum() == 0:
        raise ValueError("counts are all 0; accepted are counts of at least one target")
    return table.detach().double().cpu(), torch.nn.functional.pad(tokens, (0, len(table) - len(tokens)))
