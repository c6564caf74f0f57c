"""The sequences that training sees: rows cut and packed as SFTTrainer of TRL does it (tried with 1.16)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pdl_kernels.data.labels import Integers

TRUNCATION_MODES = ("keep_start", "keep_end")
PACKINGS = ("bfd", "bfd_split", "wrapped")
WRAPPED_ROWS = 1000  # rows that are wrapped together: a batch of `map` of datasets
BATCH_CHARACTERS = 2**21  # of text that are tokenized at a time
EMPTY_ROWS = 100_000  # read at most for a part, however many of them are empty

Numbered = Sequence[tuple[int, Any]]  # rows with their numbers


@dataclass(frozen=True)
class Fit:
    """How sequences are cut and joined to batches; all names as in TRL's SFTConfig.

    Attributes:
        max_length: tokens of a sequence; None: all.
        truncation_mode: "keep_start" or "keep_end": which of a longer sequence are kept, without packing.
        packing: None, or the strategy: "bfd" keeps the first `max_length` tokens of a sequence, "bfd_split" cuts it
            into several, "wrapped" cuts all sequences of 1000 rows, one after the other, wherever `max_length` falls.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    packing: str | None = None

    def __post_init__(self) -> None:
        length = self.max_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"max_length is {length!r}; accepted are an integer >= 1 and None")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode is {self.truncation_mode!r}; accepted are {' and '.join(TRUNCATION_MODES)}"
            )
        if self.packing is not None and self.packing not in PACKINGS:
            raise ValueError(f"packing is {self.packing!r}; accepted are {', '.join(PACKINGS)} and None")
        if self.packing is not None and length is None:
            raise ValueError(f"packing is {self.packing!r}, and max_length is None; accepted is an integer >= 1")

    def sequences(self, labels: Sequence[Integers]) -> list[Integers]:
        """The sequences that training sees, of which position 0 is never a target."""
        size = self.max_length
        if size is None:
            return list(labels)
        if self.packing is None and self.truncation_mode == "keep_end":
            return [row[-size:] for row in labels]
        if self.packing in (None, "bfd"):
            return [row[:size] for row in labels]
        if self.packing == "wrapped":
            labels = [np.concatenate(labels)] if labels else []
        return [row[start : start + size] for row in labels for start in range(0, len(row), size)]

    def describe(self) -> str:
        if self.packing is not None:
            return f", packed ({self.packing}) to {self.max_length} tokens"
        return "" if self.max_length is None else f", cut to {self.max_length} tokens ({self.truncation_mode})"


class Part(NamedTuple):
    """Rows that are tokenized together."""

    read: int  # rows that were read for it
    rows: Numbered  # those of them that are not empty
    last: bool  # of the rows that are counted together


def parts(rows: Iterable[Any], first: int, size: int, is_empty: Callable[[Any], bool], fit: Fit) -> Iterator[Part]:
    """The rows, numbered from `first` on, in parts of at most `size` rows and about BATCH_CHARACTERS of text.

    Rows that are wrapped together are several parts, of which only the last one is the last: texts need not all be in
    memory at once.
    """
    waiting: list[tuple[int, Any]] = []
    read = characters = kept = 0
    for number, row in enumerate(rows, start=first):
        read += 1
        if not is_empty(row):
            waiting.append((number, row))
            characters += _characters(row)
            kept += 1
        full = len(waiting) == size or characters >= BATCH_CHARACTERS or read == EMPTY_ROWS
        last = kept == WRAPPED_ROWS if fit.packing == "wrapped" else full
        if full or last:
            yield Part(read, waiting, last)
            waiting, read, characters = [], 0, 0
            kept = 0 if last else kept
    if read or kept:
        yield Part(read, waiting, True)


def _characters(row: Any) -> int:
    if isinstance(row, str):
        return len(row)
    if isinstance(row, Mapping):
        return sum(_characters(value) for value in row.values())
    return sum(_characters(value) for value in row) if isinstance(row, (list, tuple)) else 1
