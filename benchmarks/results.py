"""Recorded results: one JSON document per run, written whole or not at all.

A document holds the environment, the bandwidth measured in the same run and one record per operation, case and
contender. A record's status is "timed", "wrong" (not timed), "out of memory" or "failed", with the problem beside it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inputs import Case
from benchmarks.timing import Summary, summarize
from pdl_kernels.weights.files import replace_file

SCHEMA = "pdl-kernels benchmark"
VERSION = 1
REQUIRED = ("environment", "options", "bandwidth", "records", "left_out", "complete")
RECORD_REQUIRED = ("operation", "rows", "vocab_size", "dtype", "contender", "status", "seconds", "floor_bytes")


class ResultsError(Exception):
    """A results file that cannot be used; the message names the file and says why."""


class Key(NamedTuple):
    operation: str
    case: Case
    contender: str


def new_document(environment: dict[str, Any], options: dict[str, Any], left_out: dict[str, str]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": False,
        "environment": environment,
        "options": options,
        "bandwidth": {},  # bytes per second
        "host": None,
        "left_out": left_out,  # contenders, whole peers and shapes, with their reasons
        "records": [],
    }


def case_of(record: dict[str, Any]) -> Case:
    case = Case(record["rows"], record["vocab_size"], record["dtype"])
    return case._replace(hidden_size=record.get("hidden_size", 0), ignored=record.get("ignored", case.ignored))


def timed(document: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The records that have samples."""
    return {
        Key(record["operation"], case_of(record), record["contender"]): record
        for record in document["records"]
        if record["status"] == "timed" and record["seconds"]
    }


def summary(record: dict[str, Any]) -> Summary:
    return summarize(record["seconds"])


def group_noise(document: dict[str, Any]) -> dict[tuple[str, Case], float]:
    """How far the medians of two instances of one contender lie apart, relative, by operation and case."""
    noise = {}
    for key, record in timed(document).items():
        if record.get("again"):
            first, second = summary(record).median, summarize(record["again"]).median
            noise[key.operation, key.case] = abs(first - second) / min(first, second)
    return noise


def free_path(folder: Path, environment: dict[str, Any]) -> Path:
    """<date>-<commit>.json in `folder`, with a number where a file of that name exists: nothing is overwritten."""
    stem = f"{environment['date'][:10]}-{environment['commit']}"
    candidates = [folder / f"{stem}.json", *(folder / f"{stem}-{number}.json" for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def save(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(document, indent=1) + "\n").encode())


def load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error})") from error
    if not is_ours(document):
        raise ResultsError(f"{path} is not a results file of this suite (its schema would be {SCHEMA!r})")
    if document.get("version") != VERSION:
        raise ResultsError(
            f"{path} has version {document.get('version')!r} of the results' format, and this suite reads {VERSION}; "
            "use the suite of the commit that wrote it"
        )
    missing = [name for name in REQUIRED if name not in document]
    missing += [name for record in document.get("records", []) for name in RECORD_REQUIRED if name not in record]
    if missing:
        raise ResultsError(f"{path} is damaged: {', '.join(sorted(set(missing)))} missing")
    return document


def is_ours(document: object) -> bool:
    return isinstance(document, dict) and document.get("schema") == SCHEMA


def recorded(folders: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """All documents of this suite below the folders, oldest first; other JSON files are passed over."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*.json"):
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if is_ours(content):
                found[path.resolve()] = (path, load(path))
    return sorted(found.values(), key=lambda entry: entry[1]["environment"]["date"])


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Save a measurement of another program than the suite, and say where."""
    save(path, record)
    print(f"written: {path}")
