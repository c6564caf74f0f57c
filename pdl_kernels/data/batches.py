"""Data sets and lists of rows as batches of label pieces."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pdl_kernels.data.labels import Integers, Piece, check_fits, gather_pieces, split_labels

Batches = Iterator[tuple[int, Iterator[Piece]]]  # number of rows, and their pieces


def length(rows: Any) -> int | None:
    try:
        return len(rows)
    except TypeError:
        return None


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def split_rows(rows: Sequence[Any], shift: bool, name: str, first_row: int) -> Iterator[Piece]:
    pieces = (split_labels(labels, shift, f"{name} {row}") for row, labels in enumerate(rows, start=first_row))
    return gather_pieces(itertools.chain.from_iterable(pieces))


def batches(dataset: Any, column: str, shift: bool, skipped: int, batch_size: int) -> Batches:
    """The rows of `dataset` after the first `skipped`, read in the fastest way it offers."""
    if hasattr(dataset, "arrow_tables"):
        return table_batches(dataset.arrow_tables(column, skipped, batch_size), column, shift, skipped)
    if hasattr(dataset, "with_format") and hasattr(dataset, "iter"):
        return arrow_batches(dataset, column, shift, skipped, batch_size)
    return row_batches(dataset, column, shift, skipped, batch_size)


def arrow_batches(dataset: Any, column: str, shift: bool, skipped: int, batch_size: int) -> Batches:
    names = getattr(dataset, "column_names", None)
    if names is not None and column not in names:
        raise ValueError(f"column is {column!r}; accepted are the data set's columns {', '.join(map(repr, names))}")
    if skipped and skipped == length(dataset):
        return  # all were counted before; a data set does not skip its last row
    dataset = (dataset.skip(skipped) if skipped else dataset).select_columns([column]).with_format("arrow")
    yield from table_batches(dataset.iter(batch_size=batch_size), column, shift, skipped)


def table_batches(tables: Iterable[Any], column: str, shift: bool, skipped: int) -> Batches:
    rows = skipped
    for table in tables:
        yield len(table), split_arrow(table[column], shift, column, rows)
        rows += len(table)


def row_batches(dataset: Iterable[Any], column: str, shift: bool, skipped: int, batch_size: int) -> Batches:
    rows = skipped
    for batch in batched(itertools.islice(dataset, skipped, None), batch_size):
        labels = [labels_of(row, column) for row in batch]
        yield len(batch), split_rows(labels, shift, f"{column} of row", rows)
        rows += len(batch)


def labels_of(batch: Any, column: str | int | Callable[[Any], Any]) -> Any:
    if callable(column):
        return column(batch)
    try:
        return batch[column]
    except (KeyError, IndexError, TypeError):
        has = f"the keys {', '.join(map(repr, batch.keys()))}" if hasattr(batch, "keys") else type(batch).__name__
        raise ValueError(f"column is {column!r}, and a batch has {has}; accepted is where its labels are") from None


def split_arrow(column: Any, shift: bool, name: str, first_row: int) -> Iterator[Piece]:
    """The pieces of an arrow column of lists of ids; `first_row` is the data set's number of its first row.

    A null row is a sequence without ids.
    """
    import pyarrow as pa

    for chunk in column.chunks:
        if pa.types.is_null(chunk.type):
            chunk = chunk.cast(pa.list_(pa.int64()))
        elif pa.types.is_fixed_size_list(chunk.type):
            chunk = chunk.cast(pa.list_(chunk.type.value_type))
        if not (pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)):
            raise TypeError(f"the column {name!r} holds {chunk.type}; accepted are lists of integer ids")
        # Rows that are all empty make a list of null.
        if not (pa.types.is_integer(chunk.type.value_type) or pa.types.is_null(chunk.type.value_type)):
            raise TypeError(f"the column {name!r} holds lists of {chunk.type.value_type}; accepted are integer ids")
        flat = chunk.flatten()  # without the ids of null rows
        if flat.null_count:
            raise ValueError(f"the column {name!r} holds null inside a list; accepted are integer ids")
        lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        ids = flat.to_numpy(zero_copy_only=False)
        check_fits(ids, f"the column {name!r}")
        starts = np.cumsum(lengths) - lengths
        if shift:
            kept = np.ones(len(ids), dtype=bool)
            kept[starts[lengths > 0]] = False
            ids, lengths = ids[kept], np.maximum(lengths - 1, 0)
            starts = np.cumsum(lengths) - lengths

        def locate(index: int, lengths: Integers = lengths, first_row: int = first_row) -> str:
            ends = np.cumsum(lengths)
            row = int(np.searchsorted(ends, index, side="right"))
            return f"{name}[{first_row + row}][{index - int(ends[row] - lengths[row]) + int(shift)}]"

        yield Piece(ids.astype(np.int64, copy=False), lengths, locate)
        first_row += len(chunk)
