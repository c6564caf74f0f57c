"""Reads data sets and lists of rows a batch at a time, and turns each batch into blocks of label ids."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pdl_kernels.data.labels import Block, Integers, check_fits, gather_blocks, label_blocks

Place = Callable[[int], str]  # where row i of a data set stands, such as "labels.jsonl, line 2"


class Batch(NamedTuple):
    rows: int  # that were read for it
    blocks: Iterator[Block]  # their ids
    left_out: int = 0  # of the rows: those without ids


Batches = Iterator[Batch]


class RowName:
    """Where a row stands, found out only for a message: that may mean to read a file again."""

    def __init__(self, place: Place, row: int, prefix: str = "") -> None:
        self.place, self.row, self.prefix = place, row, prefix

    def __str__(self) -> str:
        return f"{self.prefix}{self.place(self.row)}"


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
        tables = arrow_tables(dataset, [column], skipped, batch_size)
    else:
        return row_batches(dataset, column, shift, skipped, batch_size)
    return table_batches(tables, column, shift, skipped, getattr(dataset, "place", None))


def arrow_tables(dataset: Any, columns: Sequence[str], skipped: int, batch_size: int) -> Iterator[Any]:
    """Columns of a Hugging Face data set as arrow tables, without making Python lists of them."""
    names = getattr(dataset, "column_names", None)
    for column in columns:
        if names is not None and column not in names:
            raise ValueError(f"column is {column!r}; accepted are the data set's columns {', '.join(map(repr, names))}")
    if skipped and skipped == length(dataset):
        return  # all rows were counted before, and `skip` of `datasets` raises an error where it leaves none
    dataset = (dataset.skip(skipped) if skipped else dataset).select_columns(list(columns)).with_format("arrow")
    yield from dataset.iter(batch_size=batch_size)


def table_batches(tables: Iterable[Any], column: str, shift: bool, skipped: int, place: Place | None) -> Batches:
    rows = skipped
    for table in tables:
        yield Batch(len(table), arrow_blocks(table[column], shift, column, rows, place))
        rows += len(table)


def row_batches(dataset: Iterable[Any], column: str, shift: bool, skipped: int, batch_size: int) -> Batches:
    rows = skipped
    for batch in batched(itertools.islice(dataset, skipped, None), batch_size):
        labels = [labels_of(row, column) for row in batch]
        yield Batch(
            len(batch), row_blocks(labels, shift, [f"{column} of row {rows + row}" for row in range(len(batch))])
        )
        rows += len(batch)


def row_blocks(rows: Sequence[Any], shift: bool, names: Sequence[object]) -> Iterator[Block]:
    """The ids of `rows`, which messages call by these names."""
    if rows and all(isinstance(row, np.ndarray) and row.ndim == 1 and row.dtype == np.int64 for row in rows):
        return iter([_flat_block(rows, shift, names)])
    blocks = (label_blocks(labels, shift, name) for labels, name in zip(rows, names, strict=True))
    return gather_blocks(itertools.chain.from_iterable(blocks))


def _flat_block(rows: Sequence[Integers], shift: bool, names: Sequence[object]) -> Block:
    first = int(shift)
    lengths = np.array([max(len(row) - first, 0) for row in rows])

    def locate(index: int) -> str:
        ends = np.cumsum(lengths)
        row = int(np.searchsorted(ends, index, side="right"))
        return f"{names[row]}[{index - int(ends[row] - lengths[row]) + first}]"

    return Block(np.concatenate([row[first:] for row in rows]), lengths, locate)


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
