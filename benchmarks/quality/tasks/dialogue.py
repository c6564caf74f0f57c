"""Dialogue: human-human chat from the pip package chitchat-dataset; up to two turns, and the turn that followed them.

People typed these conversations to each other and nobody has curated them: spelling, moods and manners are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.quality.tasks import installed
from benchmarks.quality.tasks.pairs import Pair, Task

PACKAGE = "chitchat-dataset"
VERSION = "0.9.0"
CONTEXT_TURNS = 2
MINIMUM_WORDS = 3  # of a reply
MAXIMUM_WORDS = 30


def versions() -> dict[str, str]:
    """The package and its installed version."""
    return installed.versions([PACKAGE])


def load() -> list[Pair]:
    """Every reply of 3 to 30 words after up to two turns, in the order of the data set."""
    installed.require({f"{PACKAGE}=={VERSION}": "chitchat_dataset"}, "pip install --no-deps")
    import chitchat_dataset

    pairs = (
        pair for name, chat in chitchat_dataset.Dataset().items() for pair in conversation_pairs(name, turns_of(chat))
    )
    return list(dict.fromkeys(pairs))  # each pair once


def turns_of(conversation: Mapping[str, Any]) -> list[str]:
    """A conversation's turns on one line each; a turn is one speaker's messages in a row."""
    turns = (
        " ".join(" ".join(message["text"].split()) for message in turn if message.get("text"))
        for turn in conversation["messages"]
    )
    return [turn.strip() for turn in turns if turn.strip()]


def conversation_pairs(name: str, turns: list[str]) -> Iterable[Pair]:
    """Each turn but the first as the reply to those before it, when its length is right."""
    for position in range(1, len(turns)):
        if MINIMUM_WORDS <= len(turns[position].split()) <= MAXIMUM_WORDS:
            yield Pair(tuple(turns[max(0, position - CONTEXT_TURNS) : position]), turns[position], name)


TASK = Task(
    name="dialogue",
    title="Dialogue",
    instruction="Reply to the other person.",
    source=f"human-human conversations of the pip package {PACKAGE} {VERSION} (MIT)",
    load=load,
    prompt_tokens=96,
    new_tokens=48,
)
