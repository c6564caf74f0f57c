"""Counts per vocabulary entry that add up, over parts of the data and over processes, and are kept in files."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pdl_kernels.data.batches import Batches
from pdl_kernels.data.labels import Block, count_documents, count_ids
from pdl_kernels.data.tokenizers import special_token_ids
from pdl_kernels.distributed import equality, groups
from pdl_kernels.weights import files
from pdl_kernels.weights.checks import check_integer
from pdl_kernels.weights.progress import Progress

CHECKPOINT_IDS = 20_000_000  # targets between two checkpoints

# Attributes that a file holds beside the counts, and what they are where an older file lacks them.
FACTS: dict[str, Any] = {
    "sequences": 0,
    "rows_read": 0,
    "left_out": 0,
    "tokenizer": None,
    "counted": None,
    "parts": [],
    "eos_id": None,
    "special_ids": [],
}
Self = TypeVar("Self", bound="Tally")


class Tally:
    """What `TokenCounts` holds and how it adds up; see there."""

    def __init__(self, vocab_size: int, *, documents: bool = False, tokenizer: str | None = None) -> None:
        check_integer("vocab_size", vocab_size, 1)
        self.counts = _zeros(vocab_size)
        self.document_counts = _zeros(vocab_size) if documents else None
        self.sequences = 0
        self.rows_read = 0  # of a data set, of texts, or ids of a stream: where an interrupted count goes on
        self.left_out = 0
        self.tokenizer = tokenizer
        self.counted: str | None = None
        self.parts: list[str] = []  # "prompts", "answers", "texts": what the targets are, where known
        self.eos_id: int | None = None
        self.special_ids: list[int] = []

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
        if not isinstance(other, Tally):
            return NotImplemented
        if self.document_counts is None or other.document_counts is None:
            same_documents = self.document_counts is other.document_counts
        else:
            same_documents = torch.equal(self.document_counts, other.document_counts)
        return same_documents and torch.equal(self.counts, other.counts) and self.sequences == other.sequences

    __hash__ = None  # type: ignore[assignment]

    def remember_special_tokens(self, tokenizer: Any) -> None:
        """Which ids are EOS and special, for the warnings of `describe`; of tokenizers that can tell."""
        try:
            self.special_ids = list(special_token_ids(tokenizer))
        except TypeError:  # a function
            return
        self.eos_id = getattr(tokenizer, "eos_token_id", None)

    # Counting blocks

    def _add(self, blocks: Iterator[Block], ignore_index: int | None, rows: int = 0, left_out: int = 0) -> None:
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        document_counts = np.zeros(self.vocab_size, dtype=np.int64)
        sequences = 0
        for block in blocks:
            kept = np.ones(len(block.ids), dtype=bool) if ignore_index is None else block.ids != ignore_index
            counts += count_ids(block, kept, self.vocab_size)
            if self.document_counts is not None:
                document_counts += count_documents(block, kept, self.vocab_size)
            sequences += len(block.lengths)
        sums: dict[str, Any] = {"sequences": self.sequences + sequences}
        sums |= {"rows_read": self.rows_read + rows, "left_out": self.left_out + left_out}
        sums["counts"] = torch.from_numpy(self.counts.numpy() + counts)
        if self.document_counts is not None:
            sums["document_counts"] = torch.from_numpy(self.document_counts.numpy() + document_counts)
        vars(self).update(sums)  # in one step: Ctrl-C finds all of a batch counted or none, or resuming would be wrong

    def _resume(self, checkpoint: str | os.PathLike[str] | None) -> None:
        if checkpoint is None or not Path(checkpoint).exists():
            return
        saved = type(self).load(checkpoint)
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
        source: Any,
        unit: str,
        progress: bool,
    ) -> None:
        since_checkpoint = 0
        bar = Progress(source, unit, self.rows_read, shown=progress)
        try:
            for batch in batches:
                before = self.total
                self._add(batch.blocks, ignore_index, batch.rows, batch.left_out)
                bar.advance(batch.rows, self.total - before)
                since_checkpoint += self.total - before
                if checkpoint is not None and since_checkpoint >= CHECKPOINT_IDS:
                    self.save(checkpoint)
                    since_checkpoint = 0
        finally:  # also after Ctrl-C: what was counted is kept
            bar.close()
            if checkpoint is not None and self.rows_read:  # an error before the first row leaves no file in the way
                self.save(checkpoint)

    # Adding up

    def _check_mergeable(self, other: object, name: str) -> None:
        if not isinstance(other, Tally):
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

    def merge(self: Self, other: Tally) -> Self:
        """Add `other` in place; returns self. ValueError: another vocab_size, tokenizer or only one with documents."""
        self._check_mergeable(other, "other")
        self.counts.numpy()[:] += other.counts.numpy()
        if self.document_counts is not None and other.document_counts is not None:
            self.document_counts.numpy()[:] += other.document_counts.numpy()
        self.sequences += other.sequences
        self.rows_read += other.rows_read
        self.left_out += other.left_out
        self.tokenizer = self.tokenizer or other.tokenizer
        self.eos_id = other.eos_id if self.eos_id is None else self.eos_id
        self.special_ids = sorted({*self.special_ids, *other.special_ids})
        self.parts = list(dict.fromkeys([*self.parts, *other.parts]))
        self.counted = "; ".join(dict.fromkeys(filter(None, (self.counted, other.counted)))) or None
        return self

    def copy(self: Self) -> Self:
        fresh = type(self)(self.vocab_size, documents=self.document_counts is not None, tokenizer=self.tokenizer)
        return fresh.merge(self)

    def __add__(self: Self, other: Tally) -> Self:
        return self.copy().merge(other) if isinstance(other, Tally) else NotImplemented

    def __radd__(self: Self, other: object) -> Self:
        return self.copy() if isinstance(other, int) and other == 0 else NotImplemented  # sum() starts at 0

    def all_reduce(self: Self, group: dist.ProcessGroup | None = None) -> Self:
        """Add the counts of every rank of `group` (default: all), in place on every rank; returns self.

        Call it once, on each rank, when each has counted its share: a second call adds the sums.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: ranks with different vocabularies, or only some with documents; on every rank.
        """
        groups.require("all_reduce")
        extremes = groups.extremes([self.vocab_size, int(self.document_counts is not None)], group)
        if any(smallest != largest for smallest, largest in extremes):
            sizes, documents = extremes
            raise ValueError(
                f"ranks have vocab_size from {sizes[0]} to {sizes[1]} and documents {bool(documents[0])} or "
                f"{bool(documents[1])}; accepted is the same on every rank"
            )
        parts = [self.counts, torch.tensor([self.sequences, self.rows_read, self.left_out])]
        if self.document_counts is not None:
            parts.append(self.document_counts)
        sums = groups.sums(parts, group)
        self.counts = sums[0]
        self.sequences, self.rows_read, self.left_out = sums[1].tolist()
        if self.document_counts is not None:
            self.document_counts = sums[2]
        return self

    # Files

    def save(self, path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> None:
        """Write a safetensors file with what was counted; whole or not at all. Counting can go on after `load`.

        Args:
            group: a group of torch.distributed, such as `torch.distributed.group.WORLD`, every rank of which calls
                this, as after `all_reduce`. They check that all have the same, the group's first rank writes to its
                `path`, and the others wait until the file is there. None, which WORLD also is before
                `init_process_group`: this process alone, whatever others do.

        Raises:
            OSError: the file cannot be written.
            ValueError: on every rank of the group, where a rank has other counts than the others; it names the rank.
                What was counted, in words, may differ, and is kept as the first rank says it.
            RuntimeError: another rank of the group has failed; names it and its error. Or torch.distributed is not
                initialised.
        """
        tensors = {"counts": self.counts}
        if self.document_counts is not None:
            tensors["document_counts"] = self.document_counts
        facts = {"vocab_size": self.vocab_size, "tokens": self.total} | {name: getattr(self, name) for name in FACTS}
        caller = f"TokenCounts.save to {os.fspath(path)}"
        equality.check_equal(caller, {**tensors, **facts, "counted": None}, group)
        with equality.together(caller, group):
            if equality.is_first(group):
                files.save(path, files.COUNTS, tensors, facts)

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            group: a group of torch.distributed, such as `torch.distributed.group.WORLD`, every rank of which calls
                this. Each reads its own `path`, and they check that they have read the same. None: as in `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged file, or one of another kind or version. On every rank of the group, where a rank has
                read other counts or facts than the others; it names the rank.
            RuntimeError: another rank of the group cannot read its file; names it and its error. Or torch.distributed
                is not initialised.
        """
        caller = f"TokenCounts.load of {os.fspath(path)}"
        with equality.together(caller, group):
            tensors, facts = files.load_counts(path)
        equality.check_equal(caller, tensors | facts, group)
        counts = cls(facts["vocab_size"], documents="document_counts" in tensors)
        vars(counts).update(tensors | {name: facts.get(name, copy.copy(default)) for name, default in FACTS.items()})
        return counts


# numpy where a worker process counts: torch's threads do not survive a fork.


def _zeros(size: int) -> Tensor:
    return torch.from_numpy(np.zeros(size, dtype=np.int64))
