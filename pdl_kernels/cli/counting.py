"""What `pdl-kernels count` does once its options are checked."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdl_kernels.cli.arguments import tokenizer_fingerprint
from pdl_kernels.data.chats import IGNORED
from pdl_kernels.data.corpora import Corpus
from pdl_kernels.data.readings import CHATS, COMPLETIONS, LABELS, STREAM, TEXTS
from pdl_kernels.data.sequences import Fit
from pdl_kernels.data.tokenizers import vocab_size_of
from pdl_kernels.weights.counts import TokenCounts

# The kinds of data that each of the settings is for.
OF_KINDS = {
    "skip_empty": (TEXTS, COMPLETIONS, CHATS),
    "chat_template": (COMPLETIONS, CHATS),
    "roles": (COMPLETIONS, CHATS),
    "causal": (TEXTS, LABELS),
    "assistant_only_loss": (COMPLETIONS, CHATS),
    "completion_only_loss": (COMPLETIONS,),
    "append_eos": (TEXTS, COMPLETIONS),
    "special_tokens": (TEXTS,),
    "max_length": (TEXTS, COMPLETIONS, CHATS),
    "truncation_mode": (TEXTS, COMPLETIONS, CHATS),
    "packing": (TEXTS, COMPLETIONS, CHATS),
    "ignore_index": (LABELS,),
}
OF_MESSAGES = ("chat_template", "roles", "assistant_only_loss")  # and not of completions of text
TRL_CUTS = 1024  # tokens: max_length of its SFTConfig where nobody says another


@dataclass(frozen=True)
class Settings:
    """The options that only some kinds of data take; None where one is not on the command line."""

    skip_empty: bool | None
    chat_template: Path | None
    roles: list[str] | None
    causal: bool | None
    assistant_only_loss: bool | None
    completion_only_loss: bool | None
    append_eos: bool | None
    special_tokens: bool | None
    max_length: int | None
    truncation_mode: str | None
    packing: str | None
    ignore_index: int | None


def option(field: str) -> str:
    """How a setting is called on the command line."""
    names = {"roles": "--role", "causal": "--causal/--encoder-decoder"}
    return names.get(field, f"--{field.replace('_', '-')}")


class Work:
    """Counting one corpus, by the method of `TokenCounts` for its kind."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        name: str | None,
        vocab_size: int | None,
        given: Settings,
        documents: bool,
        checkpoint: Path | None,
    ) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.name = name
        self.vocab_size = vocab_size
        self.given = given
        if corpus.kind == COMPLETIONS and not corpus.reading.messages:
            for field in OF_MESSAGES:
                if getattr(given, field) is not None:
                    raise ValueError(f"{option(field)} is for messages, and {corpus.name} holds text")
        eos = given.append_eos
        if eos is not None and corpus.reading.messages:
            raise ValueError("--append-eos is for text, and the completions are messages, which the chat template ends")
        self.append_eos = (corpus.kind == COMPLETIONS and not corpus.reading.messages) if eos is None else eos
        if self.append_eos and getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(
                f"--append-eos: {name} names no end-of-text token; accepted are a folder, hub name or .gguf that does, "
                "and --no-append-eos"
            )
        self.common: dict[str, Any] = {
            "documents": documents,
            "checkpoint": checkpoint,
            "progress": sys.stderr.isatty(),
        }

    def count(self) -> TokenCounts:
        print(self.describe())
        if self.corpus.kind in (LABELS, STREAM):
            counts = self._labels() if self.corpus.kind == LABELS else self._stream()
            if self.tokenizer is not None:
                counts.remember_special_tokens(self.tokenizer)
            return counts
        return self._tokenized()

    def describe(self) -> str:
        """What is about to be counted."""
        corpus, given = self.corpus, self.given
        column, kind = f"`{corpus.reading.column}`", corpus.kind
        if kind == STREAM:
            return f"counting {corpus.rows.describe()}, {len(corpus.rows):,} in all; the first of a file is no target"
        if kind == LABELS:
            first = "no target" if given.causal else "a target, too"
            return f"counting labels of {column}{self._size_of('rows')}; position 0 of each is {first}"
        if kind == TEXTS:
            first = ", its first included" if given.causal is False else " but its first"
            return (
                f"counting texts of {column}{self._size_of('texts')}; all tokens of a text{first}{self._eos()}"
                f"{self._fit()}"
            )
        if kind == CHATS:
            what = "whole chats" if given.assistant_only_loss is False else "assistant messages"
            return f"counting {what} of {column}{self._size_of('chats')}{self._fit()}"
        what = "prompts and completions" if given.completion_only_loss is False else "completions"
        return (
            f"counting {what} of {column}, each after {corpus.reading.prompt}{self._size_of('rows')}{self._eos()}"
            f"{self._fit()}"
        )

    def _size_of(self, noun: str) -> str:
        rows, size = self.corpus.length, getattr(self.corpus.rows, "size", None)
        if rows is not None:
            return f", {rows:,} {noun}"
        return "" if size is None else f", {size:,} bytes"

    def _eos(self) -> str:
        if self.corpus.reading.messages:
            return "; the chat template ends them"
        return "; EOS is appended" if self.append_eos else "; no EOS is appended"

    def _fit(self) -> str:
        fit = Fit(self.given.max_length, self.given.truncation_mode or "keep_start", self.given.packing)
        if fit.max_length is not None:
            return f"; {fit.describe().removeprefix(', ')}"
        if self.corpus.kind == TEXTS:
            return "; nothing is cut"
        whole = "whole chats, " if self.corpus.kind == CHATS else ""
        return f"; nothing is cut (TRL's own default: {whole}cut to {TRL_CUTS:,})"

    def _labels(self) -> TokenCounts:
        ignore_index = self.given.ignore_index
        return TokenCounts.from_dataset(
            self.corpus.rows,
            self._size(),
            self.corpus.reading.column,
            self.given.causal is True,
            tokenizer=self.name,
            ignore_index=IGNORED if ignore_index is None else ignore_index,
            source=self.corpus.source,
            batch_size=self.corpus.batch_size,
            **self.common,
        )

    def _stream(self) -> TokenCounts:
        return TokenCounts.from_stream(
            self.corpus.rows, self._size(), tokenizer=self.name, source=self.corpus.source, **self.common
        )

    def _size(self) -> int:
        return vocab_size_of(self.tokenizer) if self.vocab_size is None else self.vocab_size

    def _tokenized(self) -> TokenCounts:
        given, kind = self.given, self.corpus.kind
        arguments: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "max_length": given.max_length,
            "truncation_mode": given.truncation_mode or "keep_start",
            "packing": given.packing,
            "skip_empty": bool(given.skip_empty),
            "source": f"{self.corpus.reading} of {self.corpus.source}, "
            f"tokenizer {tokenizer_fingerprint(self.tokenizer)}",
            "batch_size": self.corpus.batch_size,
            **self.common,
        }
        if kind == TEXTS:
            arguments |= {
                "shift": given.causal is not False,
                "add_special_tokens": given.special_tokens is not False,
                "append_eos": self.append_eos,
            }
            return TokenCounts.from_texts(self.corpus.rows, self.tokenizer, **arguments)
        arguments |= {"chat_template": _template(given.chat_template), "roles": _roles(given.roles)}
        if kind == CHATS:
            arguments["assistant_only_loss"] = given.assistant_only_loss is not False
            return TokenCounts.from_chats(self.corpus.rows, self.tokenizer, **arguments)
        arguments |= {
            "completion_only_loss": given.completion_only_loss is not False,
            "assistant_only_loss": given.assistant_only_loss is True,
            "append_eos": self.append_eos,
        }
        return TokenCounts.from_completions(self.corpus.rows, self.tokenizer, **arguments)


def _template(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template is {file}, which cannot be read ({error})") from None


def _roles(given: list[str] | None) -> dict[str, str]:
    roles = {}
    for text in given or []:
        name, equals, role = text.partition("=")
        if not (name and equals and role):
            raise ValueError(f"--role is {text!r}; accepted is NAME=ROLE, such as gpt=assistant")
        roles[name] = role
    return roles
