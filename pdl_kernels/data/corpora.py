"""Finds out what files, globs, folders and hub names hold, and opens them for counting."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdl_kernels.data import tables
from pdl_kernels.data.lines import COMPRESSED, JsonFiles, TextFiles

KINDS = {".jsonl": "JSON lines", ".json": "JSON lines", ".txt": "text"}
KINDS |= {suffix + packed: kind for suffix, kind in KINDS.items() for packed in COMPRESSED}
KINDS |= {".csv": "csv", ".csv.gz": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SAVED = "saved data set"
ACCEPTED = (
    ".jsonl or .json (one JSON object a line, or in .json one array of objects), .txt (one text a line), these also "
    "with .gz or .zst after it, .csv, .csv.gz, .parquet, .arrow, and folders made by save_to_disk"
)
READERS: dict[str, Callable[[Sequence[Any], str], Any]] = {
    "JSON lines": JsonFiles,
    "text": TextFiles,
    "csv": tables.CsvFiles,
    "parquet": tables.ParquetFiles,
    "arrow": tables.ArrowFiles,
    SAVED: tables.SavedFolders,
}
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+):(?:([\w.-]+):)?([\w.-]+)")  # repository, configuration, split
DEFAULT_COLUMN = "text"

SAMPLES = 16
SAMPLE_BYTES = 2**16


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
        names: files, globs, and folders that `datasets` saved, of one kind and counted in this order; or one name of a
            data set on the Hugging Face hub. Only a hub name needs the network.
        column: the JSON key or the column of the table; default "text". Text files have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, files of several kinds, a file given twice, a missing column, bad JSON, a column
            that is neither strings nor lists of integers, or files without a single text or label.
    """
    column_or_default = DEFAULT_COLUMN if column is None else column
    if len(names) == 1 and (hub := HUB_NAME.fullmatch(str(names[0]))) and not Path(names[0]).exists():
        repository, configuration, split = hub.groups()
        rows: Any = tables.HubDataset(repository, configuration, split, column_or_default)
        return _corpus(rows, f"column {rows.column!r}", rows.source)
    files = _files(names)
    kind = _kind_of(files)
    if kind == "text" and column is not None:
        raise ValueError(f"--column is {column!r}, and text files have no columns; accepted is no --column")
    rows = READERS[kind](files, column_or_default)
    parts = [part for file in files for part in (tables.saved_files(file) if kind == SAVED else [file])]
    noun = (SAVED if kind == SAVED else f"{kind} file") + ("s" if len(files) > 1 else "")
    size = sum(part.stat().st_size for part in parts)
    source = f"{len(files)} {noun} ({_listed(files)}; {size:,} bytes, fingerprint {fingerprint(parts)})"
    return _corpus(rows, "text" if kind == "text" else f"column {rows.column!r}", source)


def _corpus(rows: Any, name: str, source: str) -> Corpus:
    held: dict[str, Any] = {}
    for file in rows.files:
        content = rows.content(file)
        if content is not None:
            held.setdefault(content, file)
    if not held:
        raise ValueError(f"{_listed(rows.files)}: there is no text and no label in there; accepted is at least one")
    if len(held) > 1:
        found = " and ".join(f"{content} in {file}" for content, file in held.items())
        raise ValueError(f"{name} holds {found}; accepted is one of them in all files")
    rows.holds = next(iter(held))
    return Corpus(rows, rows.holds, rows.column, rows.batch_size, name, source)


def fingerprint(files: Sequence[Path]) -> str:
    """Of the sizes and of samples spread over each file: reading all of a large corpus takes as long as counting it."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            # Whole where it is small; otherwise the first sample, the last, and others evenly between.
            last = max(size - SAMPLE_BYTES, 0)
            for start in sorted({last * sample // (SAMPLES - 1) for sample in range(SAMPLES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _files(names: Sequence[str | Path]) -> list[Path]:
    """The files and folders of these names, globs expanded; each exists and is there once."""
    files = []
    for name in names:
        found = [str(name)] if Path(name).exists() else sorted(glob.glob(str(name), recursive=True))
        if not found:
            raise FileNotFoundError(f"there is no file {name}")
        files += [Path(file) for file in found]
    seen = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"{file} is given twice; accepted is each file once")
        seen.add(file.resolve())
    return files


def _kind_of(files: Sequence[Path]) -> str:
    kinds: dict[str, Path] = {}
    for file in files:
        if file.is_dir():
            tables.saved_files(file)
            kinds.setdefault(SAVED, file)
        else:
            suffix = "".join(file.suffixes[-2:] if file.suffix.lower() in COMPRESSED else [file.suffix])
            if suffix.lower() not in KINDS:
                raise ValueError(f"{file} has the suffix {suffix!r}; accepted are {ACCEPTED}")
            kinds.setdefault(KINDS[suffix.lower()], file)
    if len(kinds) > 1:
        found = " and ".join(f"{kind} ({file})" for kind, file in kinds.items())
        raise ValueError(f"the files are of several kinds, {found}; accepted is one kind at a time")
    return next(iter(kinds))


def _listed(files: Sequence[Any]) -> str:
    names = [Path(file).name for file in files]
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])
