"""Data sets of the Hugging Face hub, for machines with a network: XSum, SAMSum and DailyDialog.

A folder of parquet or JSON files with the same columns does as well: name it in the environment, PDL_QUALITY_XSUM
for xsum and likewise for the others. Only the training split is read; the benchmark makes its own parts of that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality.errors import UserError
from benchmarks.quality.tasks import installed
from benchmarks.quality.tasks.dialogue import CONTEXT_TURNS, conversation_pairs
from benchmarks.quality.tasks.pairs import Pair, Task

Row = Mapping[str, Any]

REPOSITORIES = {
    "xsum": "EdinburghNLP/xsum",
    "samsum": "knkarthick/samsum",
    "dailydialog": "OpenRL/daily_dialog",  # the original is a script, which datasets no longer runs
}
COLUMNS = {
    "xsum": ("id", "document", "summary"),
    "samsum": ("id", "dialogue", "summary"),
    "dailydialog": ("dialog",),
}
PARQUET_REVISION = "refs/convert/parquet"  # where the hub keeps its own conversion of a data set
MAXIMUM_DOCUMENT_WORDS = 120  # of an XSum article, whose first sentences say most


def versions() -> dict[str, str]:
    """The library that loads the data."""
    return installed.versions(["datasets"])


def folder_variable(name: str) -> str:
    """The environment variable that may hold a folder with a task's data."""
    return f"PDL_QUALITY_{name.upper()}"


def load(name: str, location: str | None = None) -> list[Pair]:
    """The pairs of one data set, from `location`, from the folder in the environment, or else from the hub."""
    location = location or os.environ.get(folder_variable(name)) or REPOSITORIES[name]
    if location != REPOSITORIES[name] and not Path(location).is_dir():
        raise UserError(f"{folder_variable(name)}: {location} is not a folder")
    wanted = f"a folder of parquet or JSON files with the columns {', '.join(COLUMNS[name])}"
    try:
        rows = list(load_rows(location))
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{location} could not be read ({reason}). It needs a network, or {wanted} named in {folder_variable(name)}"
        ) from error
    missing = [column for column in COLUMNS[name] if not rows or column not in rows[0]]
    if missing:
        came = ", ".join(rows[0]) if rows else "no rows"
        raise UserError(f"{location} lacks {', '.join(missing)}: it has {came}, and {name} wants {wanted}")
    return list(dict.fromkeys(pair for number, row in enumerate(rows) for pair in PAIRS[name](number, row)))


def load_rows(name_or_folder: str) -> Iterable[Row]:
    """The training split of a data set on the hub, or of a local folder, which is read without a copy in the cache."""
    installed.require({"datasets": "datasets"}, "pip install")
    from datasets import load_dataset

    if Path(name_or_folder).is_dir():
        return load_dataset(name_or_folder, split="train", streaming=True)
    try:
        return load_dataset(name_or_folder, split="train")
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        return load_dataset(name_or_folder, revision=PARQUET_REVISION, split="train")


def xsum_pairs(number: int, row: Row) -> Iterable[Pair]:
    """The beginning of a BBC article, and its one-sentence summary."""
    document, summary = _words(row["document"])[:MAXIMUM_DOCUMENT_WORDS], _words(row["summary"])
    if document and summary:
        yield Pair((" ".join(document),), " ".join(summary), str(row["id"]))


def samsum_pairs(number: int, row: Row) -> Iterable[Pair]:
    """A chat, a line for each message, and what it was about."""
    lines = [" ".join(words) for line in (row["dialogue"] or "").splitlines() if (words := line.split())]
    summary = _words(row["summary"])
    if lines and summary:
        yield Pair(("\n".join(lines),), " ".join(summary), str(row["id"]))


def dailydialog_pairs(number: int, row: Row) -> Iterable[Pair]:
    """The replies of one dialogue, of 3 to 30 words; the data set has no ids, so the row's number is the group."""
    turns = [text for turn in row["dialog"] if (text := detokenised(turn))]
    return conversation_pairs(f"dialogue {number}", turns)


def detokenised(text: str) -> str:
    """DailyDialog's words, which stand apart from their punctuation ("I don ' t know ."), as people write them."""
    text = text.replace("\u2019", "'")
    text = re.sub(r"(?<=\w)\s*'\s*(?=(?:[sdmt]|re|ve|ll)\b)", "'", text)
    return " ".join(re.sub(r"\s+(?=[.,?!;:])", "", text).split())


def _words(text: str | None) -> list[str]:
    return (text or "").split()


PAIRS: dict[str, Callable[[int, Row], Iterable[Pair]]] = {
    "xsum": xsum_pairs,
    "samsum": samsum_pairs,
    "dailydialog": dailydialog_pairs,
}
TASKS = (
    Task(
        name="xsum",
        title="Summarisation of news (XSum)",
        instruction="Summarise this article in one sentence.",
        source=f"the first {MAXIMUM_DOCUMENT_WORDS} words of BBC articles, {REPOSITORIES['xsum']} on the hub",
        load=partial(load, "xsum"),
        prompt_tokens=224,
        new_tokens=48,
        faithful=True,
    ),
    Task(
        name="samsum",
        title="Summarisation of chats (SAMSum)",
        instruction="Summarise this conversation.",
        source=f"chats written by linguists, {REPOSITORIES['samsum']} on the hub (CC BY-NC-ND 4.0)",
        load=partial(load, "samsum"),
        prompt_tokens=224,
        new_tokens=48,
        faithful=True,
    ),
    Task(
        name="dailydialog",
        title="Dialogue (DailyDialog)",
        instruction="Reply to the other person.",
        source=(
            f"up to {CONTEXT_TURNS} turns of everyday dialogues, {REPOSITORIES['dailydialog']} on the hub "
            "(CC BY-NC-SA 4.0)"
        ),
        load=partial(load, "dailydialog"),
        prompt_tokens=96,
        new_tokens=48,
    ),
)
