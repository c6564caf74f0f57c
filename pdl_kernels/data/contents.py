"""What the columns of a file hold, found from values or from arrow types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

STRINGS = "strings"
IDS = "lists of ids"
MESSAGES = "messages"
NULL = "null"
EMPTY = "empty lists"  # of ids or of messages: the next rows tell


class Content(NamedTuple):
    holds: str  # one of the above, or anything else, in words
    place: str  # where that was seen


def held_by(value: Any) -> str:
    """What a value that was read from JSON is."""
    if value is None:
        return NULL
    if isinstance(value, str):
        return STRINGS
    if not isinstance(value, list):
        return type(value).__name__
    if not value:
        return EMPTY
    if isinstance(value[0], dict):
        return _held_by_objects(list(value[0]))
    other = [entry for entry in value if not _is_integer(entry)]
    return f"a list with {repr(other[0])[:40]}" if other else IDS


def held_by_type(kind: Any) -> str:
    """What a column of this arrow type holds."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return STRINGS
    if pa.types.is_null(kind):
        return NULL
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if pa.types.is_integer(kind.value_type):
            return IDS
        if pa.types.is_null(kind.value_type):
            return EMPTY
        if getattr(kind.value_type, "extension_name", None) == "arrow.json":  # objects of several forms, by `datasets`
            return MESSAGES
        if pa.types.is_struct(kind.value_type):
            return _held_by_objects([field.name for field in kind.value_type])
    return str(kind)


def _held_by_objects(keys: Sequence[str]) -> str:
    return MESSAGES if "role" in keys or "from" in keys else f"lists of objects with the keys {', '.join(keys)}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def missing_column(place: str, column: str, present: Sequence[str]) -> str:
    names = ", ".join(map(repr, present)) or "none"
    return f"{place} has no column {column!r}; accepted by --column are those it has: {names}"
