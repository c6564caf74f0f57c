"""Reads files of lines, compressed or not: plain text, JSON lines, and JSON arrays.

Not by `datasets`, whose readers of these (tried with 5.2) would miscount or name no line in an error. Its JSON reader
loads the rest of a file into memory when it meets a damaged line, turns texts that look like dates into timestamps,
writes a column of strings and lists as JSON text, takes a missing key for null, and is slower than this one. Its text
reader splits texts at a lone carriage return.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pdl_kernels.data.batches import batched

COMPRESSED = (".gz", ".zst")


class TextFiles:
    """One text a line; lines of nothing but spaces are no text."""

    batch_size = 1000  # rows to read at a time

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files = files
        self.column = column
        self.holds = "texts"  # or "labels"

    def content(self, file: Path) -> str | None:
        """What the file holds, "texts" or "labels", by the first row that tells; None where none does."""
        return next(("texts" for _ in numbered_lines(file)), None)

    def __iter__(self) -> Iterator[Any]:
        for file in self.files:
            for _, line in numbered_lines(file):
                yield line


class JsonFiles(TextFiles):
    """One column of JSON objects, strings or lists of ids: one object a line, or all of them in an array."""

    def content(self, file: Path) -> str | None:
        empty = None
        for _, value in self._values(file):
            if isinstance(value, str):
                return "texts"
            if len(value):
                return "labels"
            empty = "labels"  # an empty list, and perhaps a row with ids follows
        return empty

    def __iter__(self) -> Iterator[Any]:
        """The texts, or an array of ids for each row."""
        for file in self.files:
            for place, value in self._values(file):
                texts = isinstance(value, str)
                if texts != (self.holds == "texts"):
                    found, accepted = ("a string", "a list of ids") if texts else ("a list", "a string")
                    raise ValueError(
                        f"{place}: column {self.column!r} holds {found}; accepted is {accepted}, as in the rows before"
                    )
                yield value

    def arrow_tables(self, column: str, skipped: int, batch_size: int) -> Iterator[Any]:
        """The labels of the rows after the first `skipped`."""
        import pyarrow as pa

        for rows in batched(itertools.islice(self, skipped, None), batch_size):
            ends = np.cumsum([0, *map(len, rows)])
            yield pa.table({column: pa.LargeListArray.from_arrays(ends, np.concatenate(rows))})

    def place(self, row: int) -> str:
        """Where a row stands, for a message: only then is it worth reading the files again."""
        places = (place for file in self.files for place, _ in json_objects(file))
        return next(itertools.islice(places, row, None))

    def _values(self, file: Path) -> Iterator[tuple[str, Any]]:
        for place, row in json_objects(file):
            if not isinstance(row, dict):
                raise ValueError(f"{place} is a JSON {type(row).__name__}; accepted is {_accepted(file)}")
            if self.column not in row:
                raise ValueError(missing_column(place, self.column, list(row)))
            yield place, _text_or_ids(row[self.column], place, self.column)


def json_objects(file: Path) -> Iterator[tuple[str, Any]]:
    """Each JSON value in the file, and where it stands.

    A file named .json that starts with [ is one array, and read into memory whole; others hold one value a line.
    """
    if format_suffix(file) == ".json" and next(numbered_lines(file), (0, ""))[1].lstrip().startswith("["):
        text = "\n".join(line for _, line in numbered_lines(file, blank=True))
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); accepted is {_accepted(file)}") from None
        for number, row in enumerate(rows):
            yield f"{file}, row {number}", row
        return
    for number, line in numbered_lines(file):
        place = f"{file}, line {number}"
        try:
            yield place, json.loads(line)
        except ValueError as error:
            reason = str(error).split(": line 1")[0]  # the parser counts lines within this one
            raise ValueError(f"{place} is no JSON ({reason}); accepted is {_accepted(file)}") from None


def format_suffix(file: Path) -> str:
    """The suffix that tells the format, such as .jsonl of rows.jsonl.gz."""
    return (Path(file.stem) if file.suffix.lower() in COMPRESSED else file).suffix.lower()


def _accepted(file: Path) -> str:
    return "one JSON object a line" + (", or one array of objects" if format_suffix(file) == ".json" else "")


def numbered_lines(file: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """The lines of a file, without their ends, numbered from 1; without `blank`, those that hold more than spaces."""
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                # A byte order mark, which some editors write, is no text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if blank or text.strip():
                    yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, line {number} is no UTF-8 ({error.reason}); accepted is UTF-8") from None
    except OSError as error:
        if error.errno is not None:  # the disk, and not what is on it
            raise
        raise ValueError(f"{file} is damaged after line {number} ({error}); accepted is a {file.suffix} file") from None


def _open(file: Path) -> BinaryIO:
    if file.suffix.lower() not in COMPRESSED:
        return open(file, "rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(file))  # decompresses by the suffix


def _text_or_ids(value: Any, place: str, column: str) -> Any:
    """A string as it is; ids as an int64 array."""
    if isinstance(value, str):
        return value
    problem = f"{place}: column {column!r} holds"
    accepted = "accepted are a string, or a list of integers"
    if not isinstance(value, list):
        raise ValueError(f"{problem} {'null' if value is None else type(value).__name__}; {accepted}")
    if not value:
        return np.empty(0, np.int64)
    try:
        ids = np.asarray(value)
    except ValueError:
        ids = np.asarray(value, dtype=object)  # lists of several lengths
    if ids.ndim != 1 or ids.dtype.kind != "i":
        wrong = next((entry for entry in value if not _is_id(entry)), value[0])
        raise ValueError(f"{problem} a list with {json.dumps(wrong)[:40]}; {accepted}")
    return ids.astype(np.int64, copy=False)


def _is_id(entry: Any) -> bool:
    return isinstance(entry, int) and not isinstance(entry, bool) and -(2**63) <= entry < 2**63


def missing_column(place: str, column: str, present: Sequence[str]) -> str:
    names = ", ".join(map(repr, present)) or "none"
    return f"{place} has no column {column!r}; accepted by --column are those it has: {names}"
