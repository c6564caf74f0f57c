"""Counting data sets and lists of rows, a batch at a time."""

import numpy as np
import pytest
import torch
from helpers.counting import ROWS, TEXTS, V, by_hand, from_dataloader, from_dataset, from_texts, oracle

from pdl_kernels import TokenCounts


def column_types(datasets):
    value = datasets.Value
    large = getattr(datasets, "LargeList", None)
    types = {f"list of {name}": datasets.Sequence(value(name)) for name in ("int64", "int32", "int16", "int8")}
    return types | ({"large list": large(value("int64"))} if large else {})


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_every_kind_of_list_column(datasets, batch_size, shift):
    for name, feature in column_types(datasets).items():
        dataset = datasets.Dataset.from_dict({"labels": ROWS}, features=datasets.Features({"labels": feature}))
        got = from_dataset(dataset, shift=shift, documents=True, batch_size=batch_size)
        assert got.counts.tolist() == oracle(ROWS, shift), name
        expected = TokenCounts(V, documents=True).update(ROWS, shift=shift)
        assert got == expected, name


def views(datasets, dataset):
    """Data sets over the same memory, whose arrow chunks have offsets, indices or several chunks."""
    return {
        "whole": dataset,
        "sliced": dataset.select(range(2, 7)),
        "selected": dataset.select([6, 0, 0, 3]),
        "shuffled": dataset.shuffle(seed=3),
        "concatenated": datasets.concatenate_datasets([dataset.select(range(4, 8)), dataset.select([1, 3]), dataset]),
        "shard": dataset.shard(3, 1),
        "skipped": dataset.skip(3).take(4),
        "torch format": dataset.with_format("torch"),
        "streamed": dataset.to_iterable_dataset(num_shards=2),
        "streamed, shuffled": dataset.to_iterable_dataset().shuffle(seed=1, buffer_size=4),
        "empty": dataset.select([]),
    }


@pytest.mark.parametrize("kind", ["list", "fixed-size list", "nulls", "fixed-size list with nulls"])
def test_views_of_a_data_set(datasets, kind):
    rows = list(ROWS)
    if "fixed" in kind:
        rows = np.random.default_rng(0).integers(0, V, (8, 4)).tolist()
    if "nulls" in kind:
        rows[0] = rows[3] = rows[5] = None
    length = 4 if "fixed" in kind else -1
    labels = datasets.Sequence(datasets.Value("int64"), length=length)
    features = datasets.Features({"text": datasets.Value("string"), "labels": labels})
    dataset = datasets.Dataset.from_dict({"text": ["-"] * 8, "labels": rows}, features=features)
    for name, view in views(datasets, dataset).items():
        expected = [[] if row["labels"] is None else list(map(int, row["labels"])) for row in view]
        for shift in (True, False):
            got = from_dataset(view, shift=shift, batch_size=3)
            assert got.counts.tolist() == oracle(expected, shift), name
            assert got.sequences == len(expected), name


@pytest.mark.parametrize("row", [[], None])
def test_a_column_without_a_single_id(datasets, row):
    got = from_dataset(datasets.Dataset.from_dict({"labels": [row, row]}))
    assert (got.total, got.sequences) == (0, 2)


def test_a_stream_that_starts_with_empty_rows(datasets):
    """Without declared features arrow takes each batch's type from its rows: a list of null here, then of int64."""
    stream = datasets.IterableDataset.from_generator(lambda: ({"labels": row} for row in [[], [], [1, 2, 3], []]))
    got = from_dataset(stream, batch_size=1)
    assert got.counts.tolist() == oracle([[1, 2, 3]])
    assert got.sequences == 4


def test_another_column_vocabulary_and_ignore_index(datasets):
    dataset = datasets.Dataset.from_dict({"ids": [[1, 0, 0, 2]], "labels": [[5, 5, 5, 5]]})
    got = TokenCounts.from_dataset(dataset, 3, "ids", False, ignore_index=0, tokenizer="animals", progress=False)
    assert got.counts.tolist() == [0, 1, 1]
    assert got.tokenizer == "animals"
    assert got.counted == f"column 'ids' of data set {dataset._fingerprint}, not shifted, ignore_index 0"


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("convert", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_an_iterable_of_rows(convert, batch_size):
    rows = [{"labels": convert(row)} for row in ROWS if row]
    for dataset in (rows, tuple(rows), iter(rows)):
        got = from_dataset(dataset, batch_size=batch_size)
        assert got.counts.tolist() == oracle(ROWS)
        assert got.sequences == len(rows)


def test_tables_read_by_the_caller():
    pa = pytest.importorskip("pyarrow")

    class Tables:
        def arrow_tables(self, column, skipped, batch_size):
            for start in range(skipped, len(ROWS), batch_size):
                yield pa.table({column: ROWS[start : start + batch_size]})

    assert from_dataset(Tables(), batch_size=4).counts.tolist() == oracle(ROWS)
    with pytest.raises(IndexError, match=r"labels\[4\]\[1\] is 11"):
        TokenCounts.from_dataset(Tables(), 11, batch_size=3, progress=False)


@pytest.mark.parametrize("kind", ["arrow", "streamed", "rows"])
def test_an_id_outside_the_vocabulary_is_named_with_its_row(datasets, kind):
    rows = [[1, 2], [], [-100, 3], [50], [4, -100, 99]]
    dataset = datasets.Dataset.from_dict({"labels": rows})
    dataset = {"arrow": dataset, "streamed": dataset.to_iterable_dataset(), "rows": [{"labels": r} for r in rows]}[kind]
    for batch_size in (1, 2, 10):
        with pytest.raises(IndexError, match=r"labels(\[4\]| of row 4)\[2\] is 99"):
            from_dataset(dataset, batch_size=batch_size)
        with pytest.raises(IndexError, match=r"labels(\[3\]| of row 3)\[0\] is 50"):
            from_dataset(dataset, batch_size=batch_size, shift=False)
    if kind == "arrow":
        with pytest.raises(IndexError, match=r"labels\[1\]\[2\] is 99"):
            from_dataset(dataset.select([0, 4]))


@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        (["a", "b"], TypeError, "holds string|holds large_string"),
        ([1, 2], TypeError, "holds int64"),
        ([[1.0], [2.0]], TypeError, "lists of double|lists of float"),
        ([[True], [False]], TypeError, "lists of bool"),
        ([["a"], ["b"]], TypeError, "lists of string|lists of large_string"),
        ([[[1, 2]], [[3]]], TypeError, "lists of list"),
        ([[1, None], [2]], ValueError, "null inside a list"),
    ],
    ids=["strings", "numbers", "floats", "bools", "words", "nested", "null inside"],
)
def test_columns_that_hold_no_ids(datasets, column, error, message):
    with pytest.raises(error, match=message):
        from_dataset(datasets.Dataset.from_dict({"labels": column}))


def test_a_missing_column(datasets):
    with pytest.raises(ValueError, match="column is 'label'; accepted are the data set's columns 'labels'"):
        from_dataset(datasets.Dataset.from_dict({"labels": ROWS}), column="label")
    with pytest.raises(ValueError, match="column is 'label', and a batch has the keys 'labels'"):
        from_dataset([{"labels": [1]}], column="label")


@pytest.mark.parametrize("batch_size", [0, -1, 2.0])
def test_batch_size(datasets, batch_size):
    """Batches of 0 rows would count nothing, or never end."""
    for dataset in ([{"labels": [1, 2]}], datasets.Dataset.from_dict({"labels": [[1, 2]]})):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
            from_dataset(dataset, batch_size=batch_size)
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        from_texts(["ant"], lambda text: [1, 2], vocab_size=V, batch_size=batch_size)


def test_progress_is_shown_when_asked_for(capfd):
    rows = [{"labels": row} for row in ROWS]
    from_dataset(rows)
    from_dataloader([{"labels": [[1]]}])
    from_texts(TEXTS, by_hand, vocab_size=V)
    assert capfd.readouterr().err == ""
    TokenCounts.from_dataset(rows, V)
    assert "8/8" in capfd.readouterr().err
    TokenCounts.from_dataloader([{"labels": [[1]]}], V)
    assert "1/1" in capfd.readouterr().err
    TokenCounts.from_texts(TEXTS, by_hand, vocab_size=V)
    assert "5/5" in capfd.readouterr().err
