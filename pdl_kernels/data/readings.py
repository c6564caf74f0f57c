"""How the columns of a file are to be read: as texts, completions, chats or labels."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pdl_kernels.data.contents import EMPTY, IDS, MESSAGES, NULL, STRINGS, Content, missing_column

TEXTS, COMPLETIONS, CHATS, LABELS, STREAM = "texts", "completions", "chats", "labels", "stream"
HOLDS = {
    TEXTS: (STRINGS,),
    COMPLETIONS: (STRINGS, MESSAGES),
    CHATS: (MESSAGES,),
    LABELS: (IDS, EMPTY),
}
CHAT_COLUMNS = ("messages", "conversations")
# Completions by the names that people give them, the columns of their prompts, and those that may be missing.
PAIRS = (
    ("completion", ("prompt",), ()),
    ("response", ("prompt",), ()),
    ("output", ("instruction",), ("input",)),
    ("response", ("instruction",), ("input", "context")),
    ("answer", ("question",), ()),
    ("response", ("query",), ()),
    ("summary", ("document",), ()),
    ("summary", ("dialogue",), ()),
    ("summary", ("text",), ()),
    ("highlights", ("article",), ()),
)
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row, beside its messages: for its chat template
MASKS = ("completion_mask", "assistant_masks")  # beside input_ids: what training makes labels of


@dataclass(frozen=True)
class Prompt:
    """What comes before a completion: one column as it stands, unless `template` or `lines` say otherwise.

    Attributes:
        columns: that each row has.
        optional: that a row need not have.
        template: text with columns in braces.
        lines: the columns that are not empty, each followed by a line break.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    template: str | None = None
    lines: bool = False

    def of(self, row: Mapping[str, Any]) -> Any:
        """The prompt of a row: text, messages, or None where a column that must be there is null."""
        parts = {column: row.get(column) for column in (*self.columns, *self.optional)}
        if any(parts[column] is None for column in self.columns):
            return None
        if self.template is not None:
            return "".join(_filled(piece, parts) for piece in string.Formatter().parse(self.template))
        return "".join(f"{part}\n" for part in parts.values() if part) if self.lines else parts[self.columns[0]]

    @property
    def as_it_stands(self) -> bool:
        return self.template is None and not self.lines

    def __str__(self) -> str:
        if self.template is not None:
            return repr(self.template)
        optional = f", and {_listed(self.optional)} where a row has it," if self.optional else ""
        return f"{_listed(self.columns)}{optional}{' and a line break' if self.lines else ''}"


def _filled(piece: tuple[str, str | None, str | None, str | None], parts: Mapping[str, Any]) -> str:
    """A piece of a template, as `string.Formatter` parses it; field names are columns, whatever is in them."""
    literal, field, spec, conversion = piece
    if field is None:
        return literal
    value = string.Formatter().convert_field(parts[field], conversion)
    return literal + format(value, spec or "")


@dataclass(frozen=True)
class Reading:
    """What is counted: a kind of data, and where it lies."""

    kind: str
    column: str  # the texts, completions, messages or labels
    prompt: Prompt | None = None  # of completions
    messages: bool = False  # whether completions are messages, which the chat template ends

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that each row must have."""
        return (*(self.prompt.columns if self.prompt else ()), self.column)

    @property
    def optional(self) -> tuple[str, ...]:
        prompt = self.prompt.optional if self.prompt else ()
        return (*prompt, *TEMPLATE_COLUMNS) if self.kind in (CHATS, COMPLETIONS) else ()

    def __str__(self) -> str:
        after = f" after {self.prompt}" if self.prompt else ""
        return f"{self.kind} (`{self.column}`{after})"


def readings(contents: Mapping[str, Content]) -> list[Reading]:
    """All that columns with these names and contents are commonly read as."""
    holds = {column: content.holds for column, content in contents.items()}
    found = [Reading(CHATS, column) for column in CHAT_COLUMNS if holds.get(column) in (MESSAGES, EMPTY, NULL)]
    for column, prompt, optional in PAIRS:
        if holds.get(column) in (STRINGS, MESSAGES, NULL) and all(part in holds for part in prompt):
            found.append(Reading(COMPLETIONS, column, Prompt(prompt, optional, lines=prompt != ("prompt",))))
    if holds.get("text") in (STRINGS, NULL):
        found.append(Reading(TEXTS, "text"))
    # Labels that cannot be read are no reason to take the inputs.
    labels = "labels" if "labels" in holds else "input_ids"
    if holds.get(labels) in (IDS, EMPTY, *([NULL] if labels == "labels" else [])):
        found.append(Reading(LABELS, labels))
    return found or [_plain(column, content) for column, content in holds.items() if _only_one(holds)]


def choose(
    contents: Mapping[str, Content], name: str, kind: str | None, column: str | None, prompt: str | None
) -> Reading:
    """The one reading that the columns of the file `name` and the wishes of the user leave.

    Args:
        kind, column: as in `Reading`; None for what the columns say.
        prompt: a column, or a template with columns in braces.

    Raises:
        ValueError: none, or several; names them.
    """
    if kind == STREAM:
        raise ValueError(f"--kind is {kind}, which is for files of token ids, and {name} has rows")
    if prompt is not None and kind not in (None, COMPLETIONS):
        raise ValueError(f"--prompt is for completions, and --kind is {kind}")
    for wanted in (*([column] if column else ()), *(prompt_of(prompt).columns if prompt else ())):
        if wanted not in contents:
            raise ValueError(missing_column(name, wanted, list(contents)))
    found = readings(contents)
    if column is not None:
        found = [reading for reading in found if reading.column == column]
    if prompt is not None:
        found = _with_prompt(found, column, prompt_of(prompt))
    if kind is not None:
        found = [reading for reading in found if reading.kind == kind] or _of_kind(contents, kind, column)
    elif column is not None and not found:
        found = _said(contents, name, column)
    if len(found) > 1:
        raise ValueError(
            f"{name} can be read as {' and as '.join(map(str, found))}; --kind and --column say which is meant"
        )
    if not found:
        raise ValueError(_nothing_to_count(contents, name, kind, column))
    _check(found[0], contents, name)
    return replace(found[0], messages=contents[found[0].column].holds == MESSAGES)


def prompt_of(text: str) -> Prompt:
    """The prompt of a column's name, or of a template. ValueError: braces that are no column's."""
    if "{" not in text:
        return Prompt((text,))
    try:
        pieces = [piece for piece in string.Formatter().parse(text) if piece[1] is not None]
    except ValueError as error:
        raise ValueError(f"--prompt is {text!r} ({error}); accepted is text with columns in braces") from None
    for _, _, spec, conversion in pieces:
        if "{" in (spec or "") or conversion not in (None, "r", "s", "a"):
            raise ValueError(f"--prompt is {text!r}, with a form that is none; accepted is text with columns in braces")
    return Prompt(tuple(dict.fromkeys(str(field) for _, field, _, _ in pieces)), template=text)


def _with_prompt(found: Sequence[Reading], column: str | None, prompt: Prompt) -> list[Reading]:
    if column is not None:
        return [Reading(COMPLETIONS, column, prompt)]
    completions = [reading for reading in found if reading.kind == COMPLETIONS]
    return [Reading(COMPLETIONS, name, prompt) for name in dict.fromkeys(reading.column for reading in completions)]


def _of_kind(contents: Mapping[str, Content], kind: str, column: str | None) -> list[Reading]:
    """Readings of a kind that was asked for, whatever the columns are called."""
    if kind == COMPLETIONS:
        return []  # what comes before them must be said
    columns = [column] if column is not None else [name for name in contents if contents[name].holds in HOLDS[kind]]
    return [Reading(kind, name) for name in columns]


def _said(contents: Mapping[str, Content], name: str, column: str) -> list[Reading]:
    """What a column that was named holds. ValueError: a string that may come after another one."""
    others = [other for other, content in contents.items() if content.holds == STRINGS and other != column]
    if contents[column].holds == STRINGS and others:
        raise ValueError(
            f"{name} has `{column}` beside {_listed(others)}, and nothing says whether it is a text or comes after a "
            "prompt: --kind texts, or --prompt COLUMN"
        )
    return [_plain(column, contents[column].holds)] if _countable(contents[column].holds) else []


def _plain(column: str, holds: str) -> Reading:
    kind = {MESSAGES: CHATS, IDS: LABELS, EMPTY: LABELS}.get(holds, TEXTS)
    return Reading(kind, column)


def _only_one(holds: Mapping[str, str]) -> bool:
    """Whether there is one column, which is what its content says: no chats as text, no header of several fields."""
    return (
        len(holds) == 1
        and all(_countable(content) for content in holds.values())
        and not any(column in CHAT_COLUMNS or set(column) & set(";|\t") for column in holds)
    )


def _countable(holds: str) -> bool:
    return holds in (STRINGS, IDS, MESSAGES, EMPTY, NULL)


def _check(reading: Reading, contents: Mapping[str, Content], name: str) -> None:
    content = contents[reading.column]
    if content.holds not in (*HOLDS[reading.kind], NULL, EMPTY):
        accepted = " or ".join(HOLDS[reading.kind])
        raise ValueError(
            f"{content.place}: column {reading.column!r} holds {content.holds}; accepted are {accepted}, to be read as "
            f"{reading.kind}"
        )
    if reading.prompt is not None:
        _check_prompt(reading, reading.prompt, contents, name)
    masks = [column for column in MASKS if column in contents]
    if reading.column == "input_ids" and masks:
        raise ValueError(
            f"{name} has `input_ids`, and {_listed(masks)}, of which training makes labels: count what its data loader "
            "gives, by TokenCounts.from_dataloader"
        )


def _check_prompt(reading: Reading, prompt: Prompt, contents: Mapping[str, Content], name: str) -> None:
    """ValueError where a part of a text would be messages, or messages would come before a text."""
    held = {column: contents[column].holds for column in (*prompt.columns, *prompt.optional) if column in contents}
    completion = contents[reading.column].holds
    for column, holds in held.items():
        if (holds == MESSAGES) != (completion == MESSAGES) and NULL not in (holds, completion):
            raise ValueError(
                f"{name}: `{column}` holds {holds}, and `{reading.column}` {completion}; accepted are messages in both "
                "or in none"
            )
        if holds == MESSAGES and not prompt.as_it_stands:
            raise ValueError(
                f"{name}: `{column}` holds messages, which are no part of a text; accepted is --prompt {column}"
            )


def _nothing_to_count(contents: Mapping[str, Content], name: str, kind: str | None, column: str | None) -> str:
    if column is not None and kind == COMPLETIONS:
        return f"--kind is {kind}, and nothing says what comes before `{column}`; --prompt says it"
    if column is not None:
        content = contents[column]
        return (
            f"{content.place}: column {column!r} holds {content.holds}; accepted are strings, lists of integers and "
            "messages"
        )
    columns = ", ".join(f"{column!r} ({content.holds})" for column, content in contents.items())
    asked = f" as {kind}" if kind else ""
    accepted = "--kind and --column say what they are"
    if kind == COMPLETIONS:
        accepted = "--column says where the completions are, and --prompt what comes before them"
    return f"{name} has the columns {columns}, which cannot be read{asked} without more; {accepted}"


def _listed(columns: Sequence[str]) -> str:
    names = [f"`{column}`" for column in columns]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
