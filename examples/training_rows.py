"""Rows to fine-tune on: of files, of the Hugging Face hub, or docstrings of the running Python; and their labels."""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from docstring_corpus import HELD_OUT_FRACTION, Document, collect_documents, split_by_module
from docstring_options import UserError

from pdl_kernels.data.batches import Place, RowName
from pdl_kernels.data.chats import IGNORED, ChatTemplate
from pdl_kernels.data.completions import Completions
from pdl_kernels.data.corpora import open_corpus
from pdl_kernels.data.readings import CHATS, COMPLETIONS, TEMPLATE_COLUMNS, TEXTS
from pdl_kernels.data.sequences import Numbered
from pdl_kernels.errors import first_line

ROLES = {"human": "user", "gpt": "assistant"}  # as many data sets call them


@dataclass(frozen=True)
class TrainingData:
    """Rows, each with its number in the source; no held-out row is a training row, too."""

    kind: str  # COMPLETIONS: rows have prompt and completion; CHATS: they have messages
    training: Numbered
    held_out: Numbered
    place: Place  # where a row stands, for messages
    source: str


def read_data(options: argparse.Namespace) -> TrainingData:
    """The rows of --data, or of docstrings, split into two parts."""
    if not options.data:
        return docstring_pairs(options.seed)
    try:
        corpus = open_corpus(options.data, options.column, kind=options.kind, prompt=options.prompt)
        if corpus.kind not in (TEXTS, COMPLETIONS, CHATS):
            raise UserError(f"--data holds {corpus.kind}; accepted are chats, completions and texts")
        rows = list(enumerate(itertools.islice(corpus.rows, options.rows)))
    except ModuleNotFoundError as error:
        raise UserError(f"--data: to read this, pip install {error.name}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--data: {first_line(error)}") from None
    order = list(rows)
    random.Random(options.seed).shuffle(order)
    held_out = order[: max(1, round(HELD_OUT_FRACTION * len(order)))]
    training = order[len(held_out) :]
    known = {repr(row) for _, row in training}
    held_out = [(number, row) for number, row in held_out if repr(row) not in known]
    if not training or not held_out:
        raise UserError(f"--data has {len(rows)} rows; accepted are at least two that differ")
    kind = CHATS if corpus.kind == CHATS else COMPLETIONS
    columns = (*(("messages",) if kind == CHATS else ("prompt", "completion")), *TEMPLATE_COLUMNS)

    def pruned(part: Numbered) -> Numbered:
        if corpus.kind == TEXTS:  # a text is a completion of nothing
            return [(number, {"prompt": "", "completion": text}) for number, text in part]
        return [(number, {name: row[name] for name in columns if name in row}) for number, row in part]

    return TrainingData(kind, pruned(training), pruned(held_out), corpus.rows.place, corpus.source)


def docstring_pairs(seed: int) -> TrainingData:
    """First paragraphs of docstrings of the standard library, and what follows them; split by module file."""
    corpus = split_by_module(collect_documents(), HELD_OUT_FRACTION, seed)

    def pairs(documents: Sequence[Document]) -> Numbered:
        parted = [document.text.partition("\n\n") for document in documents]
        return [(i, {"prompt": first + gap, "completion": rest}) for i, (first, gap, rest) in enumerate(parted) if rest]

    source = f"docstrings of Python {platform.python_version()}, each after its first paragraph"
    return TrainingData(COMPLETIONS, pairs(corpus.training), pairs(corpus.held_out), "docstring {}".format, source)


def labelled_rows(data: TrainingData, rows: Numbered, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """input_ids and labels of each row, cut to `max_length`: -100 for the prompt, or for what others than the assistant
    say. Rows without a target are left out."""
    make_chat = functools.partial(ChatTemplate, tokenizer, None, data.kind == CHATS, ROLES)
    try:
        if data.kind == CHATS:
            chat = make_chat()
            read = [(i, chat.read(row, row["messages"], "messages", RowName(data.place, i))) for i, row in rows]
            found = chat.labels(read, data.place)
        else:
            whole, masked = (
                Completions(tokenizer, completion_only, True, False, make_chat).labels(rows, data.place)
                for completion_only in (False, True)
            )
            found = list(zip(whole, masked, strict=True))
    except (ValueError, TypeError) as error:
        raise UserError(f"--data: {first_line(error)}") from None
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in found]
    return [
        {"input_ids": ids.tolist(), "labels": labels.tolist()}
        for ids, labels in cut
        if (labels[1:] != IGNORED).any()  # nothing predicts the first token
    ]
