"""How often each vocabulary entry is a training target."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from pdl_kernels import distributed
from pdl_kernels.data.batches import Batches, batched, check_batch_size, label_batches, labels_of, length, row_blocks
from pdl_kernels.data.labels import (
    Block,
    check_label_settings,
    count_documents,
    count_ids,
    describe_label_settings,
    gather_blocks,
    label_blocks,
)
from pdl_kernels.data.tokenizers import encoder_of, end_of_text_id, name_of, vocab_size_of
from pdl_kernels.weights import files
from pdl_kernels.weights.checks import check_integer

CHECKPOINT_IDS = 20_000_000  # targets between two checkpoints
FACTS = ("sequences", "rows_read", "tokenizer", "counted")  # attributes that a file holds beside the counts


class TokenCounts:
    """Counts of training targets, for a vocabulary of any size.

        counts[t] = number of target positions, not ignored, that hold t

    Count what the loss will see: labels with prompt and padding masked by `ignore_index`, EOS included where the model
    learns it. Counts are a sum, so any partition of the data counted apart and merged gives the same.

    Args:
        vocab_size: V >= 1, the width of the model's output layer (`logits.shape[-1]`), or the tokenizer's length.
        documents: also count, for each token, the sequences it is a target in (for `IDFWeighting`); several times
            slower.
        tokenizer: a name to remember; counts of tokenizers with different names do not merge.

    Attributes:
        counts: (V,) int64, targets.
        document_counts: (V,) int64, sequences that hold the token, or None.
        sequences: number of sequences counted, those without a target included.
        tokenizer: the name, or None.
        counted: what was counted, in words, or None.

    >>> counts = TokenCounts(5).update([[4, 1, 1], [4, -100, 2, 3]], shift=True)
    >>> counts.counts.tolist(), counts.total, counts.sequences
    ([0, 2, 1, 1, 0], 4, 2)
    """

    def __init__(self, vocab_size: int, *, documents: bool = False, tokenizer: str | None = None) -> None:
        check_integer("vocab_size", vocab_size, 1)
        self.counts = _zeros(vocab_size)
        self.document_counts = _zeros(vocab_size) if documents else None
        self.sequences = 0
        self.rows_read = 0  # of a data set or of texts: where an interrupted count goes on
        self.tokenizer = tokenizer
        self.counted: str | None = None

    @property
    def vocab_size(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        """Number of targets counted."""
        return int(self.counts.numpy().sum())

    def __repr__(self) -> str:
        seen = np.count_nonzero(self.counts.numpy())
        return f"TokenCounts({self.total:,} targets, {seen:,} of {self.vocab_size:,} types seen)"

    def __eq__(self, other: object) -> bool:
        """The same counts; what was counted, in words, may differ."""
        if not isinstance(other, TokenCounts):
            return NotImplemented
        if self.document_counts is None or other.document_counts is None:
            same_documents = self.document_counts is other.document_counts
        else:
            same_documents = torch.equal(self.document_counts, other.document_counts)
        return same_documents and torch.equal(self.counts, other.counts) and self.sequences == other.sequences

    __hash__ = None  # type: ignore[assignment]

    # Counting

    def update(self, labels: Any, *, shift: bool, ignore_index: int = -100) -> TokenCounts:
        """Add the targets in `labels`; returns self. After an error nothing was added.

        Args:
            labels: (..., L) integer ids: a torch tensor on any device (also a nested one), a numpy array, or lists of
                any depth with rows of any length. The last dimension runs over time.
            shift: True where position i of the labels is predicted from position i - 1 inside the model, as Hugging
                Face causal models do: position 0 of each sequence is then never a target. False where labels are
                targets already, as in encoder-decoder models.
            ignore_index: the value of positions without a loss.

        Raises:
            IndexError: an id outside [0, V) that is not `ignore_index`; names it and its position.
            TypeError: labels that are not integers.
        """
        check_label_settings(shift, ignore_index)
        whole = self.document_counts is not None
        return self._add(gather_blocks(label_blocks(labels, shift, whole=whole)), ignore_index)

    def _add(self, blocks: Iterator[Block], ignore_index: int | None, rows: int = 0) -> TokenCounts:
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        document_counts = np.zeros(self.vocab_size, dtype=np.int64)
        sequences = 0
        for block in blocks:
            kept = np.ones(len(block.ids), dtype=bool) if ignore_index is None else block.ids != ignore_index
            counts += count_ids(block, kept, self.vocab_size)
            if self.document_counts is not None:
                document_counts += count_documents(block, kept, self.vocab_size)
            sequences += len(block.lengths)
        sums: dict[str, Any] = {"sequences": self.sequences + sequences, "rows_read": self.rows_read + rows}
        sums["counts"] = torch.from_numpy(self.counts.numpy() + counts)
        if self.document_counts is not None:
            sums["document_counts"] = torch.from_numpy(self.document_counts.numpy() + document_counts)
        vars(self).update(sums)  # in one step: Ctrl-C finds all of a batch counted or none, or resuming would be wrong
        return self

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        vocab_size: int,
        column: str = "labels",
        shift: bool = True,
        *,
        ignore_index: int = -100,
        documents: bool = False,
        tokenizer: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        source: str | None = None,
        batch_size: int = 1000,
        progress: bool = True,
    ) -> TokenCounts:
        """Count one column of a Hugging Face data set, or of any iterable of rows.

        Args:
            dataset: a `datasets.Dataset` or `IterableDataset`, read as arrow batches; an object with a method
                `arrow_tables(column, skipped, batch_size)` that yields `pyarrow.Table`s; or an iterable of mappings.
            column: the column of label ids, a list per row.
            shift, ignore_index: as in `update`.
            documents, tokenizer: as in the class.
            checkpoint: a file for interrupted counts. It is written now and then, at the end, and when an error or
                Ctrl-C ends the counting; where it exists, counting goes on at the row where it stopped. A checkpoint
                of another data set or other settings is refused (`ValueError`). A Hugging Face data set is known by
                its fingerprint, other iterables by nothing but `source`: there the caller answers for passing the same
                rows.
            source: what the rows are, in words, for `counted`; a checkpoint of another source is refused.
            batch_size: rows read at a time.
            progress: show a progress bar.

        Returns counts whose `counted` says what they are of.
        """
        check_label_settings(shift, ignore_index)
        if source is None:
            fingerprint = getattr(dataset, "_fingerprint", None)
            source = "an iterable" if fingerprint is None else f"data set {fingerprint}"
        counts = cls(vocab_size, documents=documents, tokenizer=tokenizer)
        counts.counted = f"column {column!r} of {source}, {describe_label_settings(shift, ignore_index)}"
        check_batch_size(batch_size)
        counts._resume(checkpoint)
        batches = label_batches(dataset, column, shift, counts.rows_read, batch_size)
        counts._add_batches(batches, ignore_index, checkpoint, length(dataset), "row", progress)
        return counts

    @classmethod
    def from_dataloader(
        cls,
        loader: Iterable[Any],
        vocab_size: int,
        column: str | int | Callable[[Any], Any] = "labels",
        shift: bool = True,
        *,
        ignore_index: int = -100,
        documents: bool = False,
        tokenizer: str | None = None,
        progress: bool = True,
    ) -> TokenCounts:
        """Count exactly what training will see: one epoch of its batches, masking and packing included.

        Args:
            loader: yields batches, such as `trainer.get_train_dataloader()`. On several ranks each counts its share;
                `all_reduce` adds them.
            column: the labels' key in a batch, their position in a tuple, or a function from batch to labels.
                Batches with `shift_labels` are counted with `column="shift_labels", shift=False`.
            shift, ignore_index: as in `update`.
        """
        check_label_settings(shift, ignore_index)
        counts = cls(vocab_size, documents=documents, tokenizer=tokenizer)
        place = getattr(column, "__name__", type(column).__name__) if callable(column) else repr(column)
        counts.counted = f"{place} of a data loader, {describe_label_settings(shift, ignore_index)}"
        batches = tqdm(loader, desc="counting", unit="batch", total=length(loader), disable=not progress)
        for number, batch in enumerate(batches):
            blocks = label_blocks(labels_of(batch, column), shift, f"batch {number}, labels")
            counts._add(gather_blocks(blocks), ignore_index)
        return counts

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        shift: bool = True,
        add_special_tokens: bool = True,
        append_eos: bool = False,
        documents: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        source: str = "texts",
        batch_size: int = 1000,
        progress: bool = True,
    ) -> TokenCounts:
        """Count raw texts, each one sequence.

        Args:
            texts: strings. For fine-tuning on answers count the answers, not the prompts.
            tokenizer: a `transformers` tokenizer, a `tokenizers.Tokenizer`, or a function from a string to ids (then
                `vocab_size` is needed).
            vocab_size: V; default the tokenizer's length.
            shift: leave out each text's first token, which a causal model never predicts.
            add_special_tokens: let the tokenizer add its own, such as BOS.
            append_eos: count one EOS after each text, where training appends it and the tokenizer does not.
            checkpoint, source: as in `from_dataset`; resuming skips as many texts as were counted.

        Raises:
            TypeError: an entry that is no string, or a tokenizer of another kind.
            ValueError: `append_eos` with a tokenizer without EOS.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str; accepted is an iterable of strings, such as [text]")
        encode = encoder_of(tokenizer, add_special_tokens)
        end = [end_of_text_id(tokenizer)] if append_eos else []
        size = vocab_size_of(tokenizer) if vocab_size is None else vocab_size
        counts = cls(size, documents=documents, tokenizer=name_of(tokenizer))
        special = "with" if add_special_tokens else "without"
        eos = ", EOS appended" if append_eos else ""
        counts.counted = (
            f"{source}, {describe_label_settings(shift, None)}, {special} the tokenizer's special tokens{eos}"
        )
        check_batch_size(batch_size)
        counts._resume(checkpoint)

        def batches() -> Batches:
            first = counts.rows_read
            for batch in batched(itertools.islice(texts, first, None), batch_size):
                for row, text in enumerate(batch, start=first):
                    if not isinstance(text, str):
                        raise TypeError(f"texts[{row}] is a {type(text).__name__}; accepted are strings")
                ids = [[*sequence, *end] for sequence in encode(batch)]
                yield len(batch), row_blocks(ids, shift, "the tokens of text", first)
                first += len(batch)

        counts._add_batches(batches(), None, checkpoint, length(texts), "text", progress)
        return counts

    def _resume(self, checkpoint: str | os.PathLike[str] | None) -> None:
        if checkpoint is None or not Path(checkpoint).exists():
            return
        saved = TokenCounts.load(checkpoint)
        self._check_mergeable(saved, f"the checkpoint {os.fspath(checkpoint)}")
        if saved.counted != self.counted:
            raise ValueError(
                f"the checkpoint {os.fspath(checkpoint)} holds counts of {saved.counted}, and these are of "
                f"{self.counted}; delete it to start again, or name another file"
            )
        self.merge(saved)

    def _add_batches(
        self,
        batches: Batches,
        ignore_index: int | None,
        checkpoint: str | os.PathLike[str] | None,
        total: int | None,
        unit: str,
        progress: bool,
    ) -> None:
        since_checkpoint = 0
        bar = tqdm(desc="counting", unit=unit, total=total, initial=self.rows_read, disable=not progress)
        try:
            for rows, blocks in batches:
                before = self.total
                self._add(blocks, ignore_index, rows)
                bar.update(rows)
                since_checkpoint += self.total - before
                if checkpoint is not None and since_checkpoint >= CHECKPOINT_IDS:
                    self.save(checkpoint)
                    since_checkpoint = 0
        finally:  # also after Ctrl-C: what was counted is kept
            bar.close()
            if checkpoint is not None and self.rows_read:  # an error before the first row leaves no file in the way
                self.save(checkpoint)

    # Adding up

    def _check_mergeable(self, other: TokenCounts, name: str) -> None:
        if not isinstance(other, TokenCounts):
            raise TypeError(f"{name} is a {type(other).__name__}; accepted is TokenCounts")
        if other.vocab_size != self.vocab_size:
            raise ValueError(f"{name} has vocab_size {other.vocab_size}; accepted is {self.vocab_size}, as here")
        if self.tokenizer is not None and other.tokenizer is not None and self.tokenizer != other.tokenizer:
            raise ValueError(f"{name} counts tokens of {other.tokenizer!r}; accepted is {self.tokenizer!r}, as here")
        if (self.document_counts is None) != (other.document_counts is None):
            raise ValueError(
                f"{name} has documents={other.document_counts is not None}; accepted is "
                f"{self.document_counts is not None}, as here"
            )

    def merge(self, other: TokenCounts) -> TokenCounts:
        """Add `other` in place; returns self. ValueError: another vocab_size, tokenizer or only one with documents."""
        self._check_mergeable(other, "other")
        self.counts.numpy()[:] += other.counts.numpy()
        if self.document_counts is not None and other.document_counts is not None:
            self.document_counts.numpy()[:] += other.document_counts.numpy()
        self.sequences += other.sequences
        self.rows_read += other.rows_read
        self.tokenizer = self.tokenizer or other.tokenizer
        parts = [part for part in dict.fromkeys((self.counted, other.counted)) if part is not None]
        self.counted = "; ".join(parts) or None
        return self

    def copy(self) -> TokenCounts:
        fresh = TokenCounts(self.vocab_size, documents=self.document_counts is not None, tokenizer=self.tokenizer)
        return fresh.merge(self)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return self.copy().merge(other) if isinstance(other, TokenCounts) else NotImplemented

    def __radd__(self, other: object) -> TokenCounts:
        return self.copy() if isinstance(other, int) and other == 0 else NotImplemented  # sum() starts at 0

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> TokenCounts:
        """Add the counts of every rank of `group` (default: all), in place on every rank; returns self.

        Call it once, on each rank, when each has counted its share: a second call adds the sums.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: ranks with different vocabularies, or only some with documents; on every rank.
        """
        distributed.require("all_reduce")
        extremes = distributed.extremes([self.vocab_size, int(self.document_counts is not None)], group)
        if any(smallest != largest for smallest, largest in extremes):
            sizes, documents = extremes
            raise ValueError(
                f"ranks have vocab_size from {sizes[0]} to {sizes[1]} and documents {bool(documents[0])} or "
                f"{bool(documents[1])}; accepted is the same on every rank"
            )
        parts = [self.counts, torch.tensor([self.sequences, self.rows_read])]
        if self.document_counts is not None:
            parts.append(self.document_counts)
        sums = distributed.sums(parts, group)
        self.counts = sums[0]
        self.sequences, self.rows_read = sums[1].tolist()
        if self.document_counts is not None:
            self.document_counts = sums[2]
        return self

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with what was counted; whole or not at all. Counting can go on after `load`."""
        tensors = {"counts": self.counts}
        if self.document_counts is not None:
            tensors["document_counts"] = self.document_counts
        facts = {"vocab_size": self.vocab_size, "tokens": self.total}
        files.save(path, files.COUNTS, tensors, facts | {name: getattr(self, name) for name in FACTS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenCounts:
        """Read what `save` wrote. FileNotFoundError; ValueError: damaged, or a file of another kind or version."""
        tensors, facts = files.load_counts(path)
        counts = cls(facts["vocab_size"], documents="document_counts" in tensors)
        vars(counts).update(tensors | {name: facts[name] for name in FACTS})
        return counts


# numpy where a worker process counts: torch's threads do not survive a fork.


def _zeros(size: int) -> Tensor:
    return torch.from_numpy(np.zeros(size, dtype=np.int64))
