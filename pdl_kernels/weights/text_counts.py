"""Counts of what a tokenizer makes of texts, of prompts with completions, and of chats."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pdl_kernels.data.batches import Batch, Batches, Place, RowName, check_batch_size, row_blocks
from pdl_kernels.data.chats import IGNORED, ChatTemplate, says_something
from pdl_kernels.data.completions import Completions, is_empty_pair
from pdl_kernels.data.labels import describe_label_settings, id_array
from pdl_kernels.data.sequences import Fit, Numbered, parts
from pdl_kernels.data.tokenizers import encoded, encoder_of, end_of_text, end_of_text_id, name_of, vocab_size_of
from pdl_kernels.weights.tally import Tally

Self = TypeVar("Self", bound="TextCounts")


class TextCounts(Tally):
    """The part of `TokenCounts` that needs a tokenizer; see there."""

    @classmethod
    def from_texts(
        cls: type[Self],
        texts: Iterable[str],
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        shift: bool = True,
        add_special_tokens: bool = True,
        append_eos: bool = False,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        packing: str | None = None,
        skip_empty: bool = False,
        documents: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        source: str = "texts",
        batch_size: int = 1000,
        progress: bool = True,
    ) -> Self:
        """Count raw texts, each one sequence: all of its tokens but the first are targets.

        For answers that training gives the model after a prompt, take `from_completions`: there the first token is a
        target, too.

        Args:
            texts: strings.
            tokenizer: a `transformers` tokenizer, a `tokenizers.Tokenizer`, or a function from a string to ids (then
                `vocab_size` is needed).
            vocab_size: V; default the tokenizer's length.
            shift: leave out each text's first token, which a causal model never predicts; False for the targets of
                encoder-decoder models.
            add_special_tokens: let the tokenizer add its own, such as BOS.
            append_eos: count one EOS after each text that does not end with it, where training appends it and the
                tokenizer does not.
            max_length, truncation_mode, packing: what training does with long texts, and whether it packs; as in TRL's
                SFTConfig, whose own default is to cut at 1024 tokens. `packing` is its strategy: "bfd", "bfd_split" or
                "wrapped", of which the last is right for data sets that are not shuffled and mapped by one process.
            skip_empty: leave out entries that are None, and count them in `left_out`; otherwise they are an error.
            checkpoint, source: as in `from_dataset`; resuming skips as many texts as were counted.

        Raises:
            TypeError: an entry that is no string, or a tokenizer of another kind.
            ValueError: `append_eos` with a tokenizer without EOS; packing without `max_length` or without `shift`.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str; accepted is an iterable of strings, such as [text]")
        fit = Fit(max_length, truncation_mode, packing)
        if packing is not None and not shift:
            raise ValueError(f"packing is {packing!r}, which is for causal models, and shift is False")
        encode = encoder_of(tokenizer, add_special_tokens)
        end, eos = ([end_of_text_id(tokenizer)], end_of_text(tokenizer)) if append_eos else ([], "")
        counts = cls._of_tokenizer(tokenizer, vocab_size, documents, ["texts"])
        special = "with" if add_special_tokens else "without"
        appended = ", EOS appended" if append_eos else ""
        counts.counted = (
            f"{source}, {describe_label_settings(shift, None)}, {special} the tokenizer's special tokens{appended}"
            f"{fit.describe()}"
        )

        def labels(rows: Numbered, place: Place) -> list[Any]:
            for number, text in rows:
                if not isinstance(text, str):
                    where = f"{place(number)}: the text" if hasattr(texts, "place") else f"texts[{number}]"
                    found = "null" if text is None else f"of type {type(text).__name__}"
                    hint = "; skip_empty leaves out what is null" if text is None else ""
                    raise TypeError(f"{where} is {found}; accepted is a string{hint}")
            names = [RowName(place, number) for number, _ in rows]
            found_ids = encoded(encode, [text for _, text in rows], names)
            return [
                id_array(ids if text.endswith(eos) else [*ids, *end])
                for ids, (_, text) in zip(found_ids, rows, strict=True)
            ]

        counts._count_rows(
            texts, labels, fit=fit, shift=shift, ignore_index=None, is_empty=_is_none if skip_empty else None,
            unit="text", checkpoint=checkpoint, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return counts

    @classmethod
    def from_completions(
        cls: type[Self],
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        completion_only_loss: bool = True,
        assistant_only_loss: bool = False,
        append_eos: bool = True,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        packing: str | None = None,
        chat_template: str | None = None,
        roles: Mapping[str, str] | None = None,
        skip_empty: bool = False,
        documents: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        source: str = "completions",
        batch_size: int = 1000,
        progress: bool = True,
    ) -> Self:
        """Count completions, each after its prompt: all tokens of a completion are targets, its first one included.

        The labels are those of TRL's SFTTrainer (tried with 1.16): prompt and completion are tokenized as one text, and
        the completion begins where the ids part from those of the prompt alone.

        Args:
            rows: mappings with "prompt" and "completion", both texts or both lists of messages. The latter go through
                the chat template, with the row's "tools" and "chat_template_kwargs" if it has them.
            tokenizer, vocab_size: as in `from_texts`; for messages a `transformers` tokenizer with a chat template.
            completion_only_loss: False: all tokens of prompt and completion but the first are targets.
            assistant_only_loss: of messages, count what the assistant says in them; as in `from_chats`.
            append_eos: append EOS to completions of text that do not end with it, as SFTTrainer does. The chat template
                ends completions of messages.
            max_length, truncation_mode, packing: as in `from_texts`.
            chat_template, roles: as in `from_chats`.
            skip_empty: leave out rows without a prompt or with an empty completion, and count them in `left_out`;
                otherwise they are an error.
            checkpoint, source: as in `from_dataset`.

        Raises:
            ValueError: a row without prompt or completion, which it names; `append_eos` with a tokenizer without EOS;
                errors of templates as in `from_chats`.

        >>> encode = lambda text: [ord(letter) - ord("a") for letter in text]
        >>> rows = [{"prompt": "ab", "completion": "ca"}, {"prompt": "b", "completion": "d"}]
        >>> counts = TokenCounts.from_completions(rows, encode, vocab_size=4, append_eos=False, progress=False)
        >>> counts.counts.tolist()
        [1, 0, 1, 1]
        """
        fit = Fit(max_length, truncation_mode, packing)
        make_chat = functools.partial(ChatTemplate, tokenizer, chat_template, assistant_only_loss, roles)
        completions = Completions(tokenizer, completion_only_loss, append_eos, assistant_only_loss, make_chat)
        held = ["answers"] if completion_only_loss or assistant_only_loss else ["prompts", "answers"]
        counts = cls._of_tokenizer(tokenizer, vocab_size, documents, held)
        counts.counted = (
            f"{source}, {'completions after their prompts' if completion_only_loss else 'prompts and completions'}"
            f"{', of the assistant alone' if assistant_only_loss else ''}{', EOS appended' if append_eos else ''}"
            f"{fit.describe()}{_describe_template(tokenizer, chat_template, roles)}"
        )
        counts._count_rows(
            rows, completions.labels, fit=fit, is_empty=is_empty_pair if skip_empty else None,
            unit="completion", checkpoint=checkpoint, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return counts

    @classmethod
    def from_chats(
        cls: type[Self],
        rows: Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]],
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        assistant_only_loss: bool = True,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        packing: str | None = None,
        chat_template: str | None = None,
        roles: Mapping[str, str] | None = None,
        skip_empty: bool = False,
        documents: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        source: str = "chats",
        batch_size: int = 1000,
        progress: bool = True,
    ) -> Self:
        """Count chats through the tokenizer's chat template: the tokens that the assistant says are targets.

        The labels are those of TRL's SFTTrainer with `assistant_only_loss=True` (tried with 1.16): what the template
        puts between its generation markers. TRL's own default is False, a loss on whole chats.

        Args:
            rows: lists of messages, or mappings with them under "messages" or "conversations", and with "tools" and
                "chat_template_kwargs" if a row has them. A message has "role" and "content", or "from" and "value".
            tokenizer: a `transformers` tokenizer with a chat template.
            vocab_size: V; default the tokenizer's length.
            assistant_only_loss: False: all tokens of a chat but its first are targets, those of users, of the system
                and of the template included.
            max_length, truncation_mode, packing: as in `from_texts`.
            chat_template: Jinja text in place of the tokenizer's.
            roles: how the rows' roles are called in the template, such as {"human": "user", "gpt": "assistant"};
                SFTTrainer itself renames none.
            skip_empty: leave out chats without messages or, for `assistant_only_loss`, without an assistant's turn, and
                count them in `left_out`; otherwise they are an error.
            checkpoint, source: as in `from_dataset`.

        A template without generation markers cannot say what the assistant generates. SFTTrainer then trains with a
        template of its own where it knows one for the model, and refuses others; so does this, which needs TRL for it.

        Raises:
            TypeError: a tokenizer that has no chat templates at all.
            ValueError: a tokenizer without a template, or with one that cannot be used; a row without messages, without
                an assistant's turn, or that the template refuses, which it names.
        """
        fit = Fit(max_length, truncation_mode, packing)
        chat = ChatTemplate(tokenizer, chat_template, assistant_only_loss, roles)
        held = ["answers"] if assistant_only_loss else ["prompts", "answers"]
        counts = cls._of_tokenizer(tokenizer, vocab_size, documents, held)
        counts.counted = (
            f"{source}, {'assistant messages' if assistant_only_loss else 'whole chats'}{fit.describe()}"
            f"{_describe_template(tokenizer, chat.template or chat_template, roles)}"
        )

        def labels(numbered: Numbered, place: Place) -> list[Any]:
            chats = [
                (number, chat.read(row, _messages(row), "messages", RowName(place, number))) for number, row in numbered
            ]
            return [targets for _, targets in chat.labels(chats, place)]

        def is_empty(row: Any) -> bool:
            messages = _messages(row)
            if messages is None or messages == []:
                return True
            return assistant_only_loss and not says_something(messages, roles)

        counts._count_rows(
            rows, labels, fit=fit, is_empty=is_empty if skip_empty else None,
            unit="chat", checkpoint=checkpoint, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return counts

    @classmethod
    def _of_tokenizer(
        cls: type[Self], tokenizer: Any, vocab_size: int | None, documents: bool, held: list[str]
    ) -> Self:
        size = vocab_size_of(tokenizer) if vocab_size is None else vocab_size
        counts = cls(size, documents=documents, tokenizer=name_of(tokenizer))
        counts.parts = held
        counts.remember_special_tokens(tokenizer)
        return counts

    def _count_rows(
        self,
        rows: Iterable[Any],
        make_labels: Callable[[Numbered, Place], list[Any]],
        *,
        fit: Fit,
        shift: bool = True,
        ignore_index: int | None = IGNORED,
        is_empty: Callable[[Any], bool] | None,
        unit: str,
        checkpoint: str | os.PathLike[str] | None,
        batch_size: int,
        progress: bool,
    ) -> None:
        """Count what `make_labels` makes of the rows that are not empty; None: none is taken for empty."""
        check_batch_size(batch_size)
        self._resume(checkpoint)
        place: Place = getattr(rows, "place", None) or (lambda row: f"{unit} {row}")

        def batches() -> Batches:
            first = self.rows_read
            following = itertools.islice(rows, first, None)
            read = 0
            labels: list[Any] = []
            names: list[object] = []
            for part in parts(following, first, batch_size, is_empty or _is_nothing, fit):
                labels += make_labels(part.rows, place) if part.rows else []
                names += [RowName(place, number, "the tokens of ") for number, _ in part.rows]
                read += part.read
                if not part.last:
                    continue
                sequences, kept = fit.sequences(labels), len(labels)
                if len(sequences) != kept:
                    names = [
                        f"packed sequence {number} of {unit}s {first} to {first + read - 1}"
                        for number in range(len(sequences))
                    ]
                yield Batch(read, row_blocks(sequences, shift, names), left_out=read - kept)
                first += read
                read, labels, names = 0, [], []

        self._add_batches(batches(), ignore_index, checkpoint, rows, unit, progress)


def _is_none(row: Any) -> bool:
    return row is None


def _is_nothing(row: Any) -> bool:
    return False


def _messages(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    return row["messages"] if "messages" in row else row.get("conversations")


def _describe_template(tokenizer: Any, template: str | None, roles: Mapping[str, str] | None) -> str:
    """So that a checkpoint of another template is refused."""
    text = template or getattr(tokenizer, "chat_template", None)
    digest = "" if text is None else f", chat template {hashlib.sha256(str(text).encode()).hexdigest()[:8]}"
    renamed = "".join(f", {name} as {role}" for name, role in sorted((roles or {}).items()))
    return digest + renamed
