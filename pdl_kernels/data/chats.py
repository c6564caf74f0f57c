"""Labels of chats, as SFTTrainer of TRL makes them (tried with TRL 1.16)."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pdl_kernels.data.batches import Place, RowName
from pdl_kernels.data.labels import Integers
from pdl_kernels.data.sequences import Numbered
from pdl_kernels.data.tokenizers import warn_if_slow
from pdl_kernels.errors import first_line

IGNORED = -100
SILENT_ROLES = {"system", "developer", "user", "tool"}  # chats of these alone have no turn of an assistant


class ChatTemplate:
    """A tokenizer's chat template, or another one in its place.

    Args:
        tokenizer: of `transformers`.
        template: Jinja text; None for the tokenizer's.
        assistant_only: mark what the assistant says. A template without generation markers cannot; as the trainer does,
            it is replaced by TRL's own where TRL knows it, and refused otherwise.
        roles: names of roles, and what the template calls them, such as {"human": "user", "gpt": "assistant"}.

    Raises:
        TypeError: a tokenizer of another library.
        ValueError: a tokenizer that cannot mark what the assistant says; no template; one without generation markers
            that TRL does not know, or TRL is not installed.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, assistant_only: bool, roles: Mapping[str, str] | None
    ) -> None:
        if not hasattr(tokenizer, "apply_chat_template"):
            raise TypeError(
                f"tokenizer is a {type(tokenizer).__name__}, which has no chat template; accepted is a transformers "
                "tokenizer"
            )
        if template is None and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; accepted is one that has, or chat_template")
        if assistant_only and not getattr(tokenizer, "is_fast", True):
            raise ValueError(
                f"{type(tokenizer).__name__} is a tokenizer in Python, which cannot tell which tokens the assistant "
                "says; accepted are one of the `tokenizers` library, and whole chats (assistant_only_loss=False)"
            )
        warn_if_slow(tokenizer)
        if template is not None:
            tokenizer = copy.copy(tokenizer)  # the caller's stays as it is
            tokenizer.chat_template = template
        self.tokenizer = tokenizer
        self.roles = dict(roles or {})
        self.assistant_only = assistant_only
        marked = not assistant_only or has_generation_markers(tokenizer.chat_template)
        self.template = None if marked else training_template(tokenizer)

    def encode(self, chats: Numbered, place: Place, *, mask: bool, prompt: bool = False) -> list[Any]:
        """For each (messages, options of the template): its ids and, with `mask`, which of them the assistant says.

        Args:
            prompt: end with the beginning of the assistant's answer.
        """
        options = {"tokenize": True, "return_dict": True, "chat_template": self.template}
        options |= {"add_generation_prompt": prompt, "return_assistant_tokens_mask": mask}
        apply = self.tokenizer.apply_chat_template
        if all(not extra for _, (_, extra) in chats):
            try:
                found = apply([messages for _, (messages, _) in chats], **options)
                masks = found["assistant_masks"] if mask else [None] * len(chats)
                return list(zip(found["input_ids"], masks, strict=True))
            except Exception:  # whichever chat it was; the next lines find it
                pass
        encoded = []
        for number, (messages, extra) in chats:
            try:
                found = apply(messages, **{**options, **extra})
            except Exception as error:  # whatever a template raises
                raise ValueError(
                    f"{place(number)}: the chat template refuses it ({first_line(error)}); its roles are "
                    f"{_roles(messages)}"
                ) from None
            encoded.append((found["input_ids"], found["assistant_masks"] if mask else None))
        return encoded

    def read(self, row: Any, value: Any, what: str, where: RowName) -> tuple[Any, dict[str, Any]]:
        """The messages, with their roles as the template calls them, and the row's own options of the template."""
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            found = "empty" if isinstance(value, Sequence) and not value else f"a {type(value).__name__}"
            raise ValueError(f"{where}: {what} are {found}; accepted is a list of messages with role and content")
        return [self._message(message, what, where) for message in value], _template_options(row, where)

    def _message(self, message: Any, what: str, where: RowName) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: {what} hold a {type(message).__name__}; accepted are objects with a role")
        names: dict[Any, str] = {"from": "role", "value": "content"}
        read: dict[str, Any] = {names.get(key, str(key)): entry for key, entry in message.items()}
        role = read.get("role")
        if not isinstance(role, str):
            keys = ", ".join(map(str, message)) or "none"
            raise ValueError(f"{where}: a message has no role; it has the keys {keys}; accepted are role and content")
        read["role"] = self.roles.get(role, role)
        return read

    def labels(self, chats: Numbered, place: Place) -> list[tuple[Integers, Integers]]:
        """The ids of each chat, and its labels: the ids, with -100 for what is no target."""
        rows = []
        encoded = self.encode(chats, place, mask=self.assistant_only)
        for (number, (messages, _)), (ids, mask) in zip(chats, encoded, strict=True):
            if mask is not None and 1 not in mask:
                raise ValueError(
                    f"{place(number)}: no token of this chat is the assistant's by the chat template, and the trainer "
                    f"would refuse it; its roles are {_roles(messages)}; accepted are chats with an assistant turn, "
                    "roles says which role is which, and skip_empty leaves chats without one out"
                )
            ids = np.asarray(ids, np.int64)
            rows.append((ids, ids if mask is None else np.where(np.asarray(mask, bool), ids, IGNORED)))
        return rows


def has_generation_markers(template: Any) -> bool:
    """Whether a template, or the default one of several, says what the assistant generates."""
    text = template.get("default", "") if isinstance(template, dict) else template
    return re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None


def training_template(tokenizer: Any) -> str:
    """What TRL trains with instead of a template without generation markers. ValueError: nothing, or no TRL."""
    problem = "the chat template has no {% generation %} markers, which say what the assistant generates"
    remedy = "accepted are a template with them (chat_template), and whole chats (assistant_only_loss=False)"
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ModuleNotFoundError:
        raise ValueError(
            f"{problem}; TRL, which replaces the templates of known models, is not installed: pip install "
            f"'pdl-kernels[trl]'; {remedy}"
        ) from None
    try:
        found = get_training_chat_template(tokenizer)
    except ValueError:
        raise ValueError(
            f"{problem}, and it is none of those of known models, which TRL replaces: the trainer would refuse it, "
            f"too; {remedy}"
        ) from None
    assert isinstance(found, str)  # None for a template with markers
    return found


def says_something(messages: Any, roles: Mapping[str, str] | None) -> bool:
    """Whether an assistant has a turn in these messages; also where that cannot be told, for an error to be raised."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return True
    names = [message.get("role", message.get("from")) for message in messages if isinstance(message, Mapping)]
    known = {(roles or {}).get(name, name) for name in names}
    return "assistant" in known or not known <= SILENT_ROLES


def _template_options(row: Any, where: RowName) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        return {}  # the messages themselves
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{where}: tools are no JSON ({error})") from None
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: chat_template_kwargs are of type {type(options).__name__}; accepted is an object")
    return {**({} if tools is None else {"tools": tools}), **options}


def _roles(messages: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(repr(message["role"]) for message in messages))
