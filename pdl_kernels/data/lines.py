"""Reads files of lines, compressed or not: plain text, JSON lines, and JSON arrays.

Not by `datasets`, whose readers of these (tried with 5.2) would miscount or name no line in an error. Its JSON reader
loads the rest of a file into memory when it meets a damaged line, turns texts that look like dates into timestamps,
writes a column of strings and lists as JSON text, takes a missing key for null, and is slower than this one. Its text
reader splits texts at a lone carriage return.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from pdl_kernels.data.batches import batched
from pdl_kernels.data.contents import EMPTY, NULL, STRINGS, Content, held_by, missing_column
from pdl_kernels.data.inputs import Input, Replayed, StandardInput, total_size

TEXT_COLUMN = "text"  # what the only column of a text file is called
LOOKED_AT = 100  # rows whose columns tell what a file holds
COUNTED_BYTES = 2**30  # of files whose lines are counted before they are read
CHUNK = 2**20  # bytes of an array read at a time
LONGEST_WORD = 16  # of JSON: characters at the end of a text in which an error may come from the end
_SPACES = re.compile(r"[ \t\r\n]*")


class TextFiles:
    """One text a line; lines of nothing but spaces are no text."""

    batch_size = 1000  # rows to read at a time

    def __init__(self, files: Sequence[Input]) -> None:
        self.files = files
        self.finished = 0  # bytes of the files that were read to their end

    def contents(self, file: Input) -> Mapping[str, Content] | None:
        """The columns of a file and what they hold; None where it has no rows."""
        for number, _ in numbered_lines(file):
            return {TEXT_COLUMN: Content(STRINGS, f"{file}, line {number}")}
        return None

    def records(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """The rows, each with these of its columns; a row need not have the `optional` ones."""
        for file in self._reading():
            for _, line in numbered_lines(file):
                yield {TEXT_COLUMN: line}

    def place(self, row: int) -> str:
        """Where a row stands, for a message: only then is it worth reading the files again."""
        if any(isinstance(file, StandardInput) for file in self.files):
            return f"standard input, row {row}"
        return next(itertools.islice(self._places(), row, None))

    def rows_known(self) -> int | None:
        """How many rows there are, where the files are small enough to count their lines before anything else."""
        plain = not any(file.packed or file.base == ".json" for file in self.files)
        if not plain or self.size is None or self.size > COUNTED_BYTES:
            return None
        rows = 0
        for file in self.files:
            with file.opened() as stream:
                rows += sum(1 for line in stream if line.strip())
        return rows

    @property
    def size(self) -> int | None:
        """Bytes of all files, as they lie on the disk."""
        return total_size(self.files)

    def bytes_read(self) -> int:
        """Of `size`, in the present reading."""
        return self.finished + sum(file.bytes_read() for file in self.files)

    def _places(self) -> Iterator[str]:
        return (f"{file}, line {number}" for file in self.files for number, _ in numbered_lines(file))

    def _reading(self) -> Iterator[Input]:
        self.finished = 0
        for file in self.files:
            if isinstance(file, StandardInput):
                file.start()
            yield file
            self.finished += file.size or 0


class JsonFiles(TextFiles):
    """JSON objects: one a line, or all of them in an array."""

    def contents(self, file: Input) -> Mapping[str, Content] | None:
        found: dict[str, Content] = {}
        rows = 0
        for place, row in itertools.islice(json_objects(file), LOOKED_AT):
            rows += 1
            for column, value in row.items():
                if column not in found or found[column].holds in (NULL, EMPTY):
                    found[column] = Content(held_by(value), place)
        return found if rows else None

    def records(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        for file in self._reading():
            for place, row in json_objects(file):
                yield _chosen(row, columns, optional, place)

    def arrow_tables(self, column: str, skipped: int, batch_size: int) -> Iterator[Any]:
        """The labels of the rows after the first `skipped`."""
        import pyarrow as pa

        for rows in batched(itertools.islice(self._labels(column), skipped, None), batch_size):
            ends = np.cumsum([0, *map(len, rows)])
            yield pa.table({column: pa.LargeListArray.from_arrays(ends, np.concatenate(rows))})

    def _labels(self, column: str) -> Iterator[Any]:
        for file in self._reading():
            for place, row in json_objects(file):
                yield _ids(_chosen(row, [column], (), place)[column], place, column)

    def _places(self) -> Iterator[str]:
        return (place for file in self.files for place, _ in json_objects(file))


def _chosen(row: dict[str, Any], columns: Sequence[str], optional: Sequence[str], place: str) -> dict[str, Any]:
    for column in columns:
        if column not in row:
            raise ValueError(missing_column(place, column, list(row)))
    return {column: row[column] for column in (*columns, *optional) if column in row}


def _ids(value: Any, place: str, column: str) -> Any:
    """A list of ids as an int64 array."""
    problem = f"{place}: column {column!r} holds"
    if not isinstance(value, list):
        found = "null" if value is None else "a string" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{problem} {found}; accepted is a list of ids")
    if not value:
        return np.empty(0, np.int64)
    try:
        ids = np.asarray(value)
    except ValueError:
        ids = np.asarray(value, dtype=object)  # lists of several lengths
    if ids.ndim != 1 or ids.dtype.kind != "i":
        wrong = next((entry for entry in value if not _is_id(entry)), value[0])
        raise ValueError(f"{problem} a list with {json.dumps(wrong)[:40]}; accepted is a list of ids")
    return ids.astype(np.int64, copy=False)


def _is_id(entry: Any) -> bool:
    return isinstance(entry, int) and not isinstance(entry, bool) and -(2**63) <= entry < 2**63


# ---------------------------------------------------------------------------------------------------------------------
# From bytes to lines and objects


def numbered_lines(file: Input) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold more than spaces, without their ends, numbered from 1."""
    with file.opened() as stream:
        yield from _lines(file, stream)


def _lines(file: Input, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            # A byte order mark, which some editors write, is no text.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, line {number} is no UTF-8 ({error.reason}); accepted is UTF-8") from None
    except OSError as error:
        raise _damage(file, f"line {number}", error) from None


def json_objects(file: Input) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects in a file, and where each stands.

    A .json file that starts with [ is one array, of which a part at a time is in memory; others hold one object a line.
    """
    accepted = "one JSON object a line" + (", or one array of objects" if file.base == ".json" else "")
    with file.opened() as stream:
        if file.base == ".json":
            start = _start(file, stream)
            array = start.endswith(b"[")
            start = b"[" if array else start
            stream = io.BufferedReader(Replayed(stream, bytearray(start), keep=False))
        else:
            array = False
        for place, row in _array(file, stream, accepted) if array else _json_lines(file, stream, accepted):
            if not isinstance(row, dict):
                raise ValueError(f"{place} is a JSON {type(row).__name__}; accepted is {accepted}")
            yield place, row


def _start(file: Input, stream: BinaryIO) -> bytes:
    """The bytes up to the first that is no space and no byte order mark."""
    start = b""
    try:
        while byte := stream.read(1):
            start += byte
            if byte not in b" \t\r\n" and not codecs.BOM_UTF8.startswith(start):
                break
    except OSError as error:
        raise _damage(file, "line 0", error) from None
    return start


def _json_lines(file: Input, stream: BinaryIO, accepted: str) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(file, stream):
        place = f"{file}, line {number}"
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(_no_json(place, error, accepted)) from None


def _array(file: Input, stream: BinaryIO, accepted: str) -> Iterator[tuple[str, Any]]:
    """The elements of an array, decoded one at a time."""
    text = _Text(file, stream)
    decoder = json.JSONDecoder()
    row = 0
    text.skip("[")
    try:
        while text.next() != "]":
            value = text.decode(decoder)
            if text.next() not in (",", "]"):
                raise ValueError("Expecting ',' or ']' after it")
            if text.next() == ",":
                text.skip(",")
                if text.next() == "]":
                    raise ValueError("a comma, and nothing after it")
            yield f"{file}, row {row}", value
            row += 1
        text.skip("]")
        if text.next():
            raise ValueError("it goes on after the end of its array")
    except DamageError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(_no_json(f"{file}, row {row}", error, accepted)) from None


class _Text:
    """Text of a stream, of which what was read is forgotten."""

    def __init__(self, file: Input, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.waiting, self.broken = b"", ""  # bytes of a character that is cut; why a byte is no UTF-8
        self.text, self.position, self.ended, self.read = "", 0, False, 0

    def next(self) -> str:
        """The next character that is no space, which is not passed; "" at the end."""
        while True:
            self.position = _SPACES.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self._more()

    def skip(self, character: str) -> None:
        assert self.next() == character
        self.position += 1

    def decode(self, decoder: json.JSONDecoder) -> Any:
        """The JSON value that comes next."""
        self.next()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # Cut in a string, which may have begun long before, or in a word, number or escape.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - LONGEST_WORD
                if self.ended or not cut:
                    raise
            else:
                if end < len(self.text) or self.ended:  # otherwise perhaps half a number
                    self.position = end
                    return value
            self._more()

    def _more(self) -> None:
        if self.broken:
            raise ValueError(f"no UTF-8: {self.broken}")
        # As much again as there is: a value that spans many chunks is decoded few times.
        waiting = len(self.text) - self.position
        try:
            data = self.stream.read(max(CHUNK, waiting))
        except OSError as error:
            raise _damage(self.file, f"byte {self.read}", error) from None
        self.read += len(data)
        self.text, self.position, self.ended = self.text[self.position :] + self._decoded(data), 0, not data
        if self.ended and self.broken:  # a character that the end of the file cuts
            raise ValueError(f"no UTF-8: {self.broken}")

    def _decoded(self, data: bytes) -> str:
        """What is UTF-8 in it, up to the first byte that is not; a character that is cut waits for the next data."""
        self.waiting += data
        try:
            text, used = codecs.utf_8_decode(self.waiting, "strict", not data)
        except UnicodeDecodeError as error:
            text, used, self.broken = self.waiting[: error.start].decode(), len(self.waiting), error.reason
        self.waiting = self.waiting[used:]
        return text


class DamageError(ValueError):
    """A file that cannot be read to its end."""


def _no_json(place: str, error: Exception, accepted: str) -> str:
    reason = str(error).split(": line ")[0]  # the parser counts lines from where it started
    return f"{place} is no JSON ({reason}); accepted is {accepted}"


def _damage(file: Input, after: str, error: OSError) -> Exception:
    if error.errno is not None:  # the disk, and not what is on it
        return error
    return DamageError(f"{file} is damaged after {after} ({error}); accepted is a {file.packed or file.form} file")
