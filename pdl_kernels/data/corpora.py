"""Finds out what files, globs, folders and hub names hold, and opens them for counting."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdl_kernels.data import readings, tables
from pdl_kernels.data.batches import length
from pdl_kernels.data.contents import NULL, Content
from pdl_kernels.data.inputs import COMPRESSION, STANDARD_INPUT, Input, StandardInput, fingerprint, suffix_of
from pdl_kernels.data.lines import JsonFiles, TextFiles
from pdl_kernels.data.readings import CHATS, LABELS, TEXTS, Reading
from pdl_kernels.data.streams import TokenFiles

LINES = {".jsonl": "JSON lines", ".json": "JSON lines", ".txt": "text"}
LINES |= {suffix + packed: kind for suffix, kind in LINES.items() for packed in COMPRESSION}
STREAM = "token"
FORMS = LINES | {".csv": "csv", ".csv.gz": "csv", ".parquet": "parquet", ".arrow": "arrow", ".bin": STREAM}
SAVED = "saved data set"
ACCEPTED = (
    ".jsonl or .json (one JSON object a line, or in .json one array of objects), .txt (one text a line), these also "
    "with .gz or .zst after it, .csv, .csv.gz, .parquet, .arrow, .bin (token ids), and folders made by save_to_disk"
)
TABLES: dict[str, Callable[[Sequence[Path]], Any]] = {
    "csv": tables.CsvFiles,
    "parquet": tables.ParquetFiles,
    "arrow": tables.ArrowFiles,
    SAVED: tables.SavedFolders,
}
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+):(?:([\w.-]+):)?([\w.-]+)")  # repository, configuration, split


@dataclass(frozen=True)
class Corpus:
    """What `open_corpus` found; nothing but the first rows has been read."""

    rows: Any  # what the method of `TokenCounts` for this kind takes
    reading: Reading
    batch_size: int  # rows to read at a time
    name: str  # of what is counted, for messages
    source: str  # names the files and their content, so that a checkpoint knows its corpus
    resumable: bool = True

    @property
    def kind(self) -> str:
        return self.reading.kind

    @property
    def length(self) -> int | None:
        """How many rows there are, where that is known before they are read."""
        return length(self.rows)


class Rows:
    """Rows of files, as `TokenCounts` takes them: texts, or mappings with prompt and completion, or with messages."""

    def __init__(self, files: Any, reading: Reading) -> None:
        self.files = files
        self.reading = reading
        self.place = files.place
        self.size: int | None = None
        if hasattr(files, "bytes_read"):
            self.size, self.bytes_read = files.size, files.bytes_read
        self.length = files.rows_known() if hasattr(files, "rows_known") else length(files)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of rows is not known before they are read")
        return self.length

    def __iter__(self) -> Iterator[Any]:
        reading = self.reading
        for row in self.files.records(reading.columns, reading.optional):
            if reading.kind == TEXTS:
                yield row[reading.column]
            elif reading.kind == CHATS:
                yield {**row, "messages": row[reading.column]}
            else:
                assert reading.prompt is not None
                yield {**row, "prompt": reading.prompt.of(row), "completion": row[reading.column]}


def open_corpus(
    names: Sequence[str | Path],
    column: str | None = None,
    *,
    kind: str | None = None,
    prompt: str | None = None,
    form: str | None = None,
    dtype: str | None = None,
    separator: int | None = None,
) -> Corpus:
    """Look into the files: what they hold, and whether they fit together.

    Args:
        names: files, globs, and folders that `datasets` saved, of one form and counted in this order; or one name of a
            data set on the Hugging Face hub; or "-", standard input. Only a hub name needs the network.
        column: the JSON key or the column of the table that is counted; default what the columns' names say. Text
            files have none.
        kind: "texts", "completions", "chats", "labels" or "stream"; default what the columns' names say.
        prompt: of completions: the column before them, or a template with columns in braces.
        form: the suffix by which to read files of lines whose names do not end in it, such as ".jsonl.gz".
        dtype, separator: of token files, as in `TokenFiles`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, files of several forms, a file given twice, a missing column, bad JSON, columns
            that can be read in several ways or in none, or files without a single row.
    """
    if len(names) == 1 and (hub := HUB_NAME.fullmatch(str(names[0]))) and not Path(names[0]).exists():
        _refuse_of_streams(dtype, separator, "these are rows of the hub")
        rows: Any = tables.HubDataset(*hub.groups())
        return _corpus(rows, rows.source, kind, column, prompt)
    if form is not None and form not in LINES:
        raise ValueError(f"--format is {form!r}; accepted are {', '.join(LINES)}")
    if [str(name) for name in names] == [STANDARD_INPUT]:
        if form is None:
            raise ValueError(f"standard input has no suffix, and --format is missing; accepted are {', '.join(LINES)}")
        _refuse_of_streams(dtype, separator, "this is standard input")
        rows = _line_files([StandardInput(form)])
        return _corpus(rows, f"standard input ({form})", kind, column, prompt, resumable=False)
    files = _files(names)
    found = LINES[form] if form is not None else _form_of(files)
    if found == STREAM:
        return _stream(files, kind, column, prompt, dtype, separator)
    _refuse_of_streams(dtype, separator, f"these are {found} files")
    rows = _line_files([Input(file, form) for file in files]) if found in LINES.values() else TABLES[found](files)
    parts = [part for file in files for part in (tables.saved_files(file) if found == SAVED else [file])]
    return _corpus(rows, _source(files, parts, found), kind, column, prompt)


def _line_files(inputs: Sequence[Input]) -> TextFiles:
    kinds = {LINES[part.form] for part in inputs}
    return TextFiles(inputs) if kinds == {"text"} else JsonFiles(inputs)


def _corpus(
    rows: Any, source: str, kind: str | None, column: str | None, prompt: str | None, resumable: bool = True
) -> Corpus:
    contents = {file: found for file in rows.files if (found := rows.contents(file)) is not None}
    if not contents:
        raise ValueError(f"{_listed(rows.files)}: there is no text and no label in there; accepted is at least one")
    only_texts = type(rows) is TextFiles
    if only_texts and (column is not None or prompt is not None):
        option = "--column" if column is not None else "--prompt"
        raise ValueError(f"{option} is {column or prompt!r}, and text files have no columns; accepted is no {option}")
    first, *others = contents
    reading = readings.choose(contents[first], str(first), kind, column, prompt)
    for file in others:
        _check_alike(reading, contents[first], contents[file], first, file)
    name = "text" if only_texts else f"column {reading.column!r}"
    if reading.kind != LABELS:
        return Corpus(Rows(rows, reading), reading, rows.batch_size, name, source, resumable)
    batch_size = rows.label_batch_size(reading.column) if hasattr(rows, "label_batch_size") else rows.batch_size
    return Corpus(rows, reading, batch_size, name, source, resumable)


def _check_alike(
    reading: Reading, here: Mapping[str, Content], there: Mapping[str, Content], first: Any, other: Any
) -> None:
    for column in reading.columns:
        if column not in there:
            raise ValueError(readings.missing_column(str(other), column, list(there)))
        found = (here[column].holds, there[column].holds)
        if NULL not in found and readings.EMPTY not in found and found[0] != found[1]:
            raise ValueError(
                f"column {column!r} holds {found[0]} in {first} and {found[1]} in {other}; accepted is one of them in "
                "all files"
            )


def _stream(
    files: Sequence[Path], kind: str | None, column: str | None, prompt: str | None, dtype: str | None, end: int | None
) -> Corpus:
    if kind not in (None, readings.STREAM):
        raise ValueError(f"--kind is {kind}, and {files[0]} is a file of token ids; accepted is stream")
    for option, given in (("--column", column), ("--prompt", prompt)):
        if given is not None:
            raise ValueError(f"{option} is {given!r}, and files of token ids have no columns; accepted is no {option}")
    rows = TokenFiles(files, dtype, end)
    return Corpus(rows, Reading(readings.STREAM, ""), 1, "stream", rows.source)


def _refuse_of_streams(dtype: str | None, separator: int | None, found: str) -> None:
    for option, given in (("--dtype", dtype), ("--separator", separator)):
        if given is not None:
            raise ValueError(f"{option} is for .bin files of token ids, and {found}")


def _source(files: Sequence[Path], parts: Sequence[Path], form: str) -> str:
    noun = (form if form == SAVED else f"{form} file") + ("s" if len(files) > 1 else "")
    size = sum(part.stat().st_size for part in parts)
    return f"{len(files)} {noun} ({_listed(files)}; {size:,} bytes, fingerprint {fingerprint(parts)})"


def _files(names: Sequence[str | Path]) -> list[Path]:
    """The files and folders of these names, globs expanded; each exists and is there once."""
    files = []
    for name in names:
        if str(name) == STANDARD_INPUT:
            raise ValueError("standard input (-) comes with other files; accepted is it alone")
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


def _form_of(files: Sequence[Path]) -> str:
    forms: dict[str, Path] = {}
    for file in files:
        if file.is_dir():
            tables.saved_files(file)
            forms.setdefault(SAVED, file)
        else:
            suffix = suffix_of(file)
            if suffix not in FORMS:
                raise ValueError(f"{file} has the suffix {suffix!r}; accepted are {ACCEPTED}")
            forms.setdefault(FORMS[suffix], file)
    if len(forms) > 1:
        found = " and ".join(f"{form} ({file})" for form, file in forms.items())
        raise ValueError(f"the files are of several kinds, {found}; accepted is one kind at a time")
    return next(iter(forms))


def _listed(files: Sequence[Any]) -> str:
    names = [Path(str(file)).name for file in files]
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])
