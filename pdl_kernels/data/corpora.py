"""Files of texts or of label ids: JSON lines, parquet, plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {".jsonl": "JSON lines", ".json": "JSON lines", ".parquet": "parquet", ".txt": "text"}
ACCEPTED = ".jsonl or .json (one JSON object a line), .parquet, and .txt (one text a line)"
DEFAULT_COLUMN = "text"

SAMPLED_BLOCKS = 16
BLOCK_BYTES = 2**16
BATCH_IDS = 2**22  # label ids read from parquet at a time: 32 MiB as int64
LARGEST_BATCH = 2**16  # rows


@dataclass(frozen=True)
class Corpus:
    """What `open_corpus` found; nothing but the first rows has been read."""

    rows: Any  # texts: an iterable of strings; labels: what `TokenCounts.from_dataset` takes
    holds: str  # "texts" or "labels"
    column: str
    batch_size: int  # rows to read at a time
    name: str  # of the column, for messages
    source: str  # names the files and their content, so that a checkpoint knows its corpus


def open_corpus(names: Sequence[str | Path], column: str | None = None) -> Corpus:
    """Look into the files: what they hold, and whether they fit together.

    Args:
        names: files of one kind, counted in this order.
        column: the JSON key or parquet column; default "text". Text files have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, files of several kinds, a file given twice, a missing column, bad JSON, a column
            that is neither strings nor lists of integers, or files without a single text or label.
    """
    files = [Path(name) for name in names]
    kind = _kind_of(files)
    if kind == "text" and column is not None:
        raise ValueError(f"--column is {column!r}, and text files have no columns; accepted is no --column")
    column = DEFAULT_COLUMN if column is None else column
    readers = {"text": TextFiles, "JSON lines": JsonFiles, "parquet": ParquetFiles}
    reader = readers[kind](files, column)
    held: dict[str, Path] = {}
    for file in files:
        content = reader.content(file)
        if content is not None:
            held.setdefault(content, file)
    if not held:
        raise ValueError(f"{_listed(files)}: there is no text and no label in there; accepted is at least one")
    if len(held) > 1:
        found = " and ".join(f"{content} in {file}" for content, file in held.items())
        raise ValueError(f"column {column!r} holds {found}; accepted is one of them in all files")
    reader.holds = next(iter(held))
    size = sum(file.stat().st_size for file in files)
    what = f"{len(files)} {kind} file{'s' if len(files) > 1 else ''} ({_listed(files)}; {size:,} bytes"
    source = f"{what}, fingerprint {fingerprint(files)})"
    name = "text" if kind == "text" else f"column {column!r}"
    return Corpus(reader, reader.holds, column, reader.batch_size(), name, source)


def fingerprint(files: Sequence[Path]) -> str:
    """Of the sizes and of blocks spread over each file: reading all of a large corpus takes as long as counting it."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            # Whole where it is small; otherwise the first block, the last, and others evenly between.
            last = max(size - BLOCK_BYTES, 0)
            for start in sorted({last * block // (SAMPLED_BLOCKS - 1) for block in range(SAMPLED_BLOCKS)}):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


class _Files:
    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files = files
        self.column = column
        self.holds = "texts"

    def content(self, file: Path) -> str | None:
        """ "texts" or "labels", by the first row that tells; None where none does."""
        raise NotImplementedError

    def batch_size(self) -> int:
        return 1000


class TextFiles(_Files):
    """One text a line; lines of nothing but spaces are no text."""

    def content(self, file: Path) -> str | None:
        return next(("texts" for _ in self._texts(file)), None)

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            yield from self._texts(file)

    def _texts(self, file: Path) -> Iterator[str]:
        for _, line in numbered_lines(file):
            yield line


class JsonFiles(_Files):
    """One JSON object a line: its `column`, as a string, or as {column: ids} as `TokenCounts.from_dataset` takes it."""

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
        for file in self.files:
            for number, value in self._values(file):
                texts = isinstance(value, str)
                if texts != (self.holds == "texts"):
                    found, accepted = ("a string", "a list of ids") if texts else ("a list", "a string")
                    raise ValueError(
                        f"{file}, line {number}: column {self.column!r} holds {found}; accepted is {accepted}, as in "
                        "the rows before"
                    )
                yield value if texts else {self.column: value}

    def _values(self, file: Path) -> Iterator[tuple[int, Any]]:
        for number, line in numbered_lines(file):
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = str(error).split(": line 1")[0]  # the parser counts lines within this one
                raise ValueError(f"{place} is no JSON ({reason}); accepted is one JSON object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place} is a JSON {type(row).__name__}; accepted is one JSON object a line")
            if self.column not in row:
                raise ValueError(_missing_column(place, self.column, list(row)))
            yield number, _text_or_ids(row[self.column], place, self.column)


class ParquetFiles(_Files):
    """A column of strings, iterated, or of lists of ids, read as arrow tables without making Python lists of them."""

    def content(self, file: Path) -> str | None:
        import pyarrow as pa

        reader = _parquet(file)
        schema = reader.schema_arrow
        if self.column not in schema.names:
            raise ValueError(_missing_column(str(file), self.column, schema.names))
        kind = schema.field(self.column).type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            if not pa.types.is_integer(kind.value_type):
                raise ValueError(
                    f"{file}: column {self.column!r} holds {kind}; accepted are strings or lists of integers"
                )
            content = "labels"
        elif _is_text(kind):
            content = "texts"
        else:
            raise ValueError(f"{file}: column {self.column!r} holds {kind}; accepted are strings or lists of integers")
        return content if reader.metadata.num_rows else None

    def batch_size(self) -> int:
        """Few passes over the vocabulary where rows are short, bounded memory where they are long."""
        if self.holds == "texts":
            return super().batch_size()
        rows = ids = 0
        for file in self.files:
            metadata = _parquet(file).metadata
            leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
            leaf = next(leaf for leaf, path in enumerate(leaves) if path.startswith(f"{self.column}."))
            for group in range(metadata.num_row_groups):
                rows += metadata.row_group(group).num_rows
                ids += metadata.row_group(group).column(leaf).num_values
        return int(min(max(BATCH_IDS * rows // max(ids, 1), 1), LARGEST_BATCH))

    def __len__(self) -> int:
        return sum(_parquet(file).metadata.num_rows for file in self.files)

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            row = 0
            for table in self._tables(file, 0, self.batch_size()):
                for text in table[self.column].to_pylist():
                    if text is None:
                        raise ValueError(f"{file}, row {row}: column {self.column!r} is null; accepted is a string")
                    yield text
                    row += 1

    def arrow_tables(self, column: str, skipped: int, batch_size: int) -> Iterator[Any]:
        """The rows after the first `skipped`; row groups before them are not read."""
        for file in self.files:
            rows = _parquet(file).metadata.num_rows
            if skipped < rows:
                yield from self._tables(file, skipped, batch_size)
            skipped = max(skipped - rows, 0)

    def _tables(self, file: Path, skipped: int, batch_size: int) -> Iterator[Any]:
        import pyarrow as pa

        reader = _parquet(file)
        first = 0
        while first < reader.num_row_groups and skipped >= reader.metadata.row_group(first).num_rows:
            skipped -= reader.metadata.row_group(first).num_rows
            first += 1
        groups = list(range(first, reader.num_row_groups))
        for batch in reader.iter_batches(batch_size, row_groups=groups, columns=[self.column]):
            if skipped < len(batch):
                yield pa.Table.from_batches([batch.slice(skipped)])
            skipped = max(skipped - len(batch), 0)


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold more than spaces, without their ends, numbered from 1."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                # A byte order mark, which some editors write, is no text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number} is no UTF-8 ({error.reason}); accepted is UTF-8") from None
            if text.strip():
                yield number, text.rstrip("\r\n")


def _text_or_ids(value: Any, place: str, column: str) -> Any:
    """A string as it is; ids as an array, which is counted faster than a list."""
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
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        wrong = next((entry for entry in value if isinstance(entry, bool) or not isinstance(entry, int)), value[0])
        raise ValueError(f"{problem} a list with {json.dumps(wrong)[:40]}; {accepted}")
    return ids


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is damaged or no parquet file ({str(error).splitlines()[0]})") from None


def _kind_of(files: Sequence[Path]) -> str:
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder; accepted are files, such as {file}/*.jsonl")
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        if file.suffix.lower() not in KINDS:
            raise ValueError(f"{file} has the suffix {file.suffix!r}; accepted are {ACCEPTED}")
    first = files[0]
    for file in files:
        if KINDS[file.suffix.lower()] != KINDS[first.suffix.lower()]:
            kinds = f"{KINDS[first.suffix.lower()]} ({first}) and {KINDS[file.suffix.lower()]} ({file})"
            raise ValueError(f"the files are of several kinds, {kinds}; accepted is one kind at a time")
    seen = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"{file} is given twice; accepted is each file once")
        seen.add(file.resolve())
    return KINDS[first.suffix.lower()]


def _listed(files: Sequence[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])


def _missing_column(place: str, column: str, present: Sequence[str]) -> str:
    names = ", ".join(map(repr, present)) or "none"
    return f"{place} has no column {column!r}; accepted by --column are those it has: {names}"
