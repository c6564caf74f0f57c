"""Reads data sets and lists of rows a batch at a time, and turns each batch into blocks of label ids."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pdl_kernels.data.labels import Block, Integers, check_fits, gather_blocks, label_blocks

Batches = Iterator[tuple[int, Iterator[Block]]]  # for each batch: its number of rows, and their ids
Place = Callable[[int], str]  # where row i of a data set stands, such as "labels.jsonl, line 2"


def length(rows: Any) -> int | None:
    try:
        return len(rows)
    except TypeError:
        return None


def check_batch_size(batch_size: object) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; accepted is an integer >= 1")


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def label_batches(dataset: Any, column: str, shift: bool, skipped: int, batch_size: int) -> Batches:
    """The rows of `dataset` after the first `skipped`, read in the fastest way it offers."""
    if hasattr(dataset, "arrow_tables"):
        tables = dataset.arrow_tables(column, skipped, batch_size)
    elif hasattr(dataset, "with_format") and hasattr(dataset, "iter"):
        tables = arrow_tables(dataset, column, skipped, batch_size)
    else:
        return row_batches(dataset, column, shift, skipped, batch_size)
    return table_batches(tables, column, shift, skipped, getattr(dataset, "place", None))


def arrow_tables(dataset: Any, column: str, skipped: int, batch_size: int) -> Iterator[Any]:
    """One column of a Hugging Face data set as arrow tables, without making Python lists of it."""
    names = getattr(dataset, "column_names", None)
    if names is not None and column not in names:
        raise ValueError(f"column is {column!r}; accepted are the data set's columns {', '.join(map(repr, names))}")
    if skipped and skipped == length(dataset):
        return  # all rows were counted before, and `skip` of `datasets` raises an error where it leaves none
    dataset = (dataset.skip(skipped) if skipped else dataset).select_columns([column]).with_format("arrow")
    yield from dataset.iter(batch_size=batch_size)


def table_batches(tables: Iterable[Any], column: str, shift: bool, skipped: int, place: Place | None) -> Batches:
    rows = skipped
    for table in tables:
        yield len(table), arrow_blocks(table[column], shift, column, rows, place)
        rows += len(table)


def row_batches(dataset: Iterable[Any], column: str, shift: bool, skipped: int, batch_size: int) -> Batches:
    rows = skipped
    for batch in batched(itertools.islice(dataset, skipped, None), batch_size):
        labels = [labels_of(row, column) for row in batch]
        yield len(batch), row_blocks(labels, shift, f"{column} of row", rows)
        rows += len(batch)


def row_blocks(rows: Sequence[Any], shift: bool, name: str, first_row: int) -> Iterator[Block]:
    """The ids of `rows`; messages say `name` and the number of the row, of which the first is `first_row`."""
    blocks = (label_blocks(labels, shift, f"{name} {row}") for row, labels in enumerate(rows, start=first_row))
    return gather_blocks(itertools.chain.from_iterable(blocks))


def labels_of(batch: Any, column: str | int | Callable[[Any], Any]) -> Any:
    if callable(column):
        return column(batch)
    try:
        return batch[column]
    except (KeyError, IndexError, TypeError):
        has = f"the keys {', '.join(map(repr, batch.keys()))}" if hasattr(batch, "keys") else type(batch).__name__
        raise ValueError(f"column is {column!r}, and a batch has {has}; accepted is where its labels are") from None


def arrow_blocks(column: Any, shift: bool, name: str, first_row: int, place: Place | None = None) -> Iterator[Block]:
    """The ids of an arrow column of lists, one block for each of its chunks; a null row is a sequence without ids.

    Messages name a row by what `place` says of it; without `place`, by `name` and its number, counted from `first_row`.
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
        lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        if flat.null_count:
            where = _locator(lengths, name, first_row, place)(flat.is_null().index(True).as_py())
            raise ValueError(f"{where} is null inside a list; accepted are integer ids")
        ids = flat.to_numpy(zero_copy_only=False)
        check_fits(ids, f"the column {name!r}")
        if shift:
            kept = np.ones(len(ids), dtype=bool)
            kept[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
            ids, lengths = ids[kept], np.maximum(lengths - 1, 0)
        yield Block(ids.astype(np.int64, copy=False), lengths, _locator(lengths, name, first_row, place, int(shift)))
        first_row += len(chunk)


def _locator(
    lengths: Integers, name: str, first_row: int, place: Place | None, first_position: int = 0
) -> Callable[[int], str]:
    """A function from the index of an id, among rows of these lengths, to its row and position in words."""

    def locate(index: int) -> str:
        ends = np.cumsum(lengths)
        row = int(np.searchsorted(ends, index, side="right"))
        position = index - int(ends[row] - lengths[row]) + first_position
        if place is None:
            return f"{name}[{first_row + row}][{position}]"
        return f"{place(first_row + row)}: {name}[{position}]"

    return locate
