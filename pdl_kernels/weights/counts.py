"""How often each vocabulary entry is a training target."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdl_kernels.data.batches import check_batch_size, label_batches, labels_of, length
from pdl_kernels.data.labels import check_label_settings, describe_label_settings, gather_blocks, label_blocks
from pdl_kernels.data.streams import TokenFiles
from pdl_kernels.weights.text_counts import TextCounts


class TokenCounts(TextCounts):
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
        left_out: number of rows without a text, a completion or an assistant's turn that `skip_empty` left out.
        tokenizer: the name, or None.
        counted: what was counted, in words, or None.

    >>> counts = TokenCounts(5).update([[4, 1, 1], [4, -100, 2, 3]], shift=True)
    >>> counts.counts.tolist(), counts.total, counts.sequences
    ([0, 2, 1, 1, 0], 4, 2)
    """

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
        self._add(gather_blocks(label_blocks(labels, shift, whole=whole)), ignore_index)
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
        counts._add_batches(batches, ignore_index, checkpoint, dataset, "row", progress)
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
    def from_stream(
        cls,
        files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | TokenFiles,
        vocab_size: int,
        *,
        dtype: str | None = None,
        separator: int | None = None,
        documents: bool = False,
        tokenizer: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        source: str | None = None,
        progress: bool = True,
    ) -> TokenCounts:
        """Count files of nothing but token ids, mapped into memory: all ids but each file's first are targets.

        Args:
            files: .bin files of nanoGPT, of llm.c, or of Megatron with the .idx beside it.
            dtype: of the ids, "uint16", "uint32", "int32" or "int64"; needed for nanoGPT's, which do not tell it.
            separator: the id that ends a document, itself a target. With it, or with an .idx, `sequences` are
                documents; without, files.
            documents, tokenizer: as in the class.
            checkpoint, source: as in `from_dataset`.

        Raises:
            ValueError: a dtype that is missing or does not fit; a size that is no whole number of ids; an .idx that
                does not fit its .bin.
            IndexError: an id outside [0, V); names the file and its position.
        """
        if not isinstance(files, TokenFiles):
            names = [files] if isinstance(files, (str, os.PathLike)) else files
            files = TokenFiles([Path(name) for name in names], dtype, separator)
        counts = cls(vocab_size, documents=documents, tokenizer=tokenizer)
        counts.counted = source or files.source
        counts._resume(checkpoint)
        counts._add_batches(files.blocks(counts.rows_read, documents), None, checkpoint, files, "token", progress)
        return counts
