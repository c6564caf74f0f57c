"""Labels of prompts with completions, as SFTTrainer of TRL makes them (tried with TRL 1.16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pdl_kernels.data.batches import Place, RowName
from pdl_kernels.data.chats import IGNORED, ChatTemplate
from pdl_kernels.data.labels import Integers
from pdl_kernels.data.sequences import Numbered
from pdl_kernels.data.tokenizers import encoded, encoder_of, end_of_text


class Completions:
    """Labels of completions, each after its prompt: two texts that are tokenized as one, or messages.

    The completion begins where the ids of the prompt and of both together part, which is not always after the prompt.

    Args:
        tokenizer: as in `TokenCounts.from_texts`; for messages of `transformers`.
        completion_only: the prompt is no target.
        append_eos: append the tokenizer's EOS, as text, to completions of text that do not end with it.
        chat: for messages: makes the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        completion_only: bool,
        append_eos: bool,
        assistant_only: bool,
        chat: Callable[[], ChatTemplate],
    ) -> None:
        self.tokenizer = tokenizer
        self.encode = encoder_of(tokenizer, add_special_tokens=True)
        self.completion_only = completion_only
        self.assistant_only = assistant_only
        self.append_eos = append_eos
        self.make_chat = chat
        self.chat: ChatTemplate | None = None

    def labels(self, rows: Numbered, place: Place) -> list[Integers]:
        texts: list[tuple[int, Any, str, str]] = []
        chats: list[tuple[int, Any, Any, Any]] = []
        for number, row in rows:
            prompt, completion = _pair(row, RowName(place, number))
            kind = texts if isinstance(completion, str) else chats
            kind.append((number, row, prompt, completion))
        found = dict(self._of_texts(texts, place)) | dict(self._of_chats(chats, place))
        return [found[number] for number, _ in rows]

    def _of_texts(self, rows: Sequence[Any], place: Place) -> Iterator[tuple[int, Integers]]:
        if rows and self.assistant_only:
            raise ValueError(f"{place(rows[0][0])}: assistant_only_loss is for messages, and the completion is text")
        if not rows:
            return
        eos = end_of_text(self.tokenizer) if self.append_eos else ""
        completions = [text if text.endswith(eos) else text + eos for *_, text in rows]
        both = [prompt + text for (_, _, prompt, _), text in zip(rows, completions, strict=True)]
        whole = encoded(self.encode, both, [RowName(place, number) for number, *_ in rows])
        prompts = self.encode([prompt for _, _, prompt, _ in rows]) if self.completion_only else whole
        for (number, *_), ids, before in zip(rows, whole, prompts, strict=True):
            yield number, self._labels(ids, before)

    def _of_chats(self, rows: Sequence[Any], place: Place) -> Iterator[tuple[int, Integers]]:
        if not rows:
            return
        if self.chat is None:
            self.chat = self.make_chat()
        prompts, whole = [], []
        for number, row, prompt, completion in rows:
            where = RowName(place, number)
            messages, options = self.chat.read(row, prompt, "the messages of the prompt", where)
            answer, _ = self.chat.read({}, completion, "the messages of the completion", where)
            prompts.append((number, (messages, options)))
            whole.append((number, (messages + answer, options)))
        labelled = self.chat.labels(whole, place)
        before = self.chat.encode(prompts, place, mask=False, prompt=True) if self.completion_only else labelled
        for (number, *_), (ids, labels), (prompt_ids, _) in zip(rows, labelled, before, strict=True):
            yield number, np.where(self._labels(ids, prompt_ids) == IGNORED, IGNORED, labels)

    def _labels(self, ids: Any, prompt: Any) -> Integers:
        labels = np.array(ids, np.int64)
        if self.completion_only:
            labels[: _common_prefix(labels, np.asarray(prompt, np.int64))] = IGNORED
        return labels


def _common_prefix(ids: Integers, others: Integers) -> int:
    length = min(len(ids), len(others))
    differ = ids[:length] != others[:length]
    return int(differ.argmax()) if differ.any() else length


def is_empty_pair(row: Any) -> bool:
    """Whether a row has no prompt or nothing after it."""
    if not isinstance(row, Mapping):
        return False
    completion = row.get("completion")
    return row.get("prompt") is None or completion is None or completion in ("", [])


def _pair(row: Any, where: RowName) -> tuple[Any, Any]:
    if not isinstance(row, Mapping) or not {"prompt", "completion"} <= row.keys():
        has = ", ".join(map(repr, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where} has {has or 'nothing'}; accepted is a mapping with prompt and completion")
    prompt, completion = row["prompt"], row["completion"]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, (str, Sequence)):
            found = "null" if value is None else f"of type {type(value).__name__}"
            raise ValueError(
                f"{where}: the {name} is {found}; accepted is text or a list of messages; skip_empty leaves out rows "
                "without"
            )
    if not completion:
        raise ValueError(f"{where}: the completion is empty; accepted is a text; skip_empty leaves such rows out")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(f"{where}: of prompt and completion one is text and one a list; accepted is twice the same")
    return prompt, completion
