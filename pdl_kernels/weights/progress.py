"""How far counting is: rows, tokens, and the time that remains where the size is known."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from pdl_kernels.data.batches import length


class Progress:
    """A progress bar over rows; over bytes where the number of rows is not known and that of bytes is.

    Args:
        source: what is read; its length, or its `size` and `bytes_read()`, tell how far it is.
        unit: what a row is called.
        done: rows that were counted before.
        shown: False: nothing is printed.
    """

    def __init__(self, source: Any, unit: str, done: int, shown: bool) -> None:
        self.source, self.unit = source, unit
        self.rows, self.tokens = done, 0
        rows = length(source)
        self.in_bytes = rows is None and getattr(source, "size", None) is not None
        if self.in_bytes:
            self.bar = tqdm(
                desc="counting", total=source.size, unit="B", unit_scale=True, unit_divisor=1024, disable=not shown
            )
        else:
            self.bar = tqdm(desc="counting", total=rows, initial=done, unit=unit, disable=not shown)

    def advance(self, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens
        if self.bar.disable:
            return
        counted = (
            f"{self.tokens:,} targets"
            if self.unit == "token"
            else f"{self.rows:,} {self.unit}s, {self.tokens:,} targets"
        )
        seconds = self.bar.format_dict["elapsed"]
        rate = f", {self.tokens / seconds:,.0f} targets/s" if seconds else ""
        self.bar.set_postfix_str(counted + rate, refresh=False)
        self.bar.update(self.source.bytes_read() - self.bar.n if self.in_bytes else rows)

    def close(self) -> None:
        self.bar.close()
