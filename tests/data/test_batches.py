"""Counting data sets, data loaders and texts; interrupting it and going on."""

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tokenizers import ANT, BEE, BOS, CAT, EOS, PAD, UNK, WORDS, make_tokenizer, make_transformers_tokenizer

from pdl_kernels import TokenCounts
from pdl_kernels.weights import counts as frequency

ROOT = Path(__file__).resolve().parents[2]
V = 12
ROWS = [[1, 2, 2], [], [5], [-100, 7, 7, -100, 3], [0, 11], [4, 4, 4, 4], [9, -100], [1, 2]]


@pytest.fixture
def datasets():
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def oracle(rows, shift=True, ignore_index=-100):
    counter = Counter(token for row in rows for token in (row or [])[int(shift) :] if token != ignore_index)
    return [counter[token] for token in range(V)]


from_dataset = functools.partial(TokenCounts.from_dataset, vocab_size=V, progress=False)
from_dataloader = functools.partial(TokenCounts.from_dataloader, vocab_size=V, progress=False)
from_texts = functools.partial(TokenCounts.from_texts, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


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


# ---------------------------------------------------------------------------------------------------------------------
# Data loaders


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)


def test_batches_of_every_kind():
    batches = [padded([row for row in ROWS[i : i + 3] if row]) for i in range(0, len(ROWS), 3)]
    expected = oracle(ROWS)
    assert from_dataloader([{"labels": b, "input_ids": b + 1} for b in batches]).counts.tolist() == expected
    assert from_dataloader([(None, b) for b in batches], column=1).counts.tolist() == expected
    assert from_dataloader([[b] for b in batches], column=-1).counts.tolist() == expected
    assert from_dataloader(batches, column=lambda batch: batch).counts.tolist() == expected
    assert from_dataloader(iter([{"y": b.numpy()} for b in batches]), column="y").counts.tolist() == expected


def test_shifted_labels_are_counted_as_they_are():
    labels = padded([row for row in ROWS if row])
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    got = from_dataloader([{"shift_labels": shifted}], column="shift_labels", shift=False)
    assert got.counts.tolist() == oracle(ROWS)


def test_a_training_loader_gives_what_the_trainer_divides_by():
    """The trainer's number of items is the sum of labels[..., 1:] != -100 over its batches, shuffled and padded."""
    transformers = pytest.importorskip("transformers")
    tokenizer = make_transformers_tokenizer()
    rows = list(np.random.default_rng(1).integers(4, 8, (23, 9)).tolist())
    examples = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    loader = torch.utils.data.DataLoader(examples, 4, shuffle=True, collate_fn=collate)
    got = TokenCounts.from_dataloader(loader, len(tokenizer), progress=False)
    assert got.total == sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in loader)
    expected = Counter(token for example in examples for token in example["labels"][1:] if token != -100)
    assert got.counts.tolist() == [expected[token] for token in range(len(tokenizer))]
    assert got.sequences == len(examples)


def test_loader_workers_change_nothing():
    rows = torch.randint(0, V, (40, 6))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), 8, num_workers=2)
    assert from_dataloader(loader, column=0).counts.tolist() == oracle(rows.tolist())


@pytest.mark.parametrize(
    ("batch", "column", "error", "message"),
    [
        ({"ids": [1]}, "labels", ValueError, "column is 'labels', and a batch has the keys 'ids'"),
        (([1],), 1, ValueError, "column is 1, and a batch has tuple"),
        (([1],), "labels", ValueError, "column is 'labels', and a batch has tuple"),
        ({"labels": None}, "labels", TypeError, "batch 1, labels is a NoneType"),
        ({"labels": torch.tensor([[1, 2], [3, 77]])}, "labels", IndexError, r"batch 1, labels\[1, 1\] is 77"),
    ],
)
def test_batches_without_labels(batch, column, error, message):
    good = {"labels": [[1, 2]]} if isinstance(batch, dict) else ([1, 2], [1, 2])
    if column == "labels":
        good = {"labels": [[1, 2]]}
    with pytest.raises(error, match=message):
        from_dataloader([good, batch], column=column)


def answers(batch):
    return batch["labels"]


def test_what_was_counted_names_no_memory_address():
    class Answers:
        def __call__(self, batch):
            return batch["labels"]

    batches = [{"labels": [[1, 2]]}]
    assert from_dataloader(batches, column=answers).counted == "answers of a data loader, shifted, ignore_index -100"
    for column in (Answers(), functools.partial(answers), lambda batch: batch["labels"]):
        assert " at 0x" not in from_dataloader(batches, column=column).counted


# ---------------------------------------------------------------------------------------------------------------------
# Texts

TEXTS = ["ant bee", "cat", "", "ant ant eel", "dog"]
IDS = [[ANT, BEE], [CAT], [], [ANT, ANT, UNK], [7]]


def by_hand(text):
    return [WORDS.index(word) if word in WORDS else UNK for word in text.split()]


TOKENIZERS = {"transformers": make_transformers_tokenizer, "tokenizers": make_tokenizer}


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts(kind, shift, batch_size):
    tokenizer = TOKENIZERS[kind]()
    for add_special_tokens in (True, False):
        got = from_texts(
            TEXTS, tokenizer, vocab_size=V, shift=shift, add_special_tokens=add_special_tokens, batch_size=batch_size
        )
        rows = [[BOS] * add_special_tokens + row for row in IDS]
        assert got.counts.tolist() == oracle(rows, shift)
        assert got.sequences == len(TEXTS)
    assert from_texts(TEXTS, tokenizer).vocab_size == len(WORDS) + 1


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "numpy", "torch"])
def test_a_function_as_tokenizer(convert):
    texts = [text for text in TEXTS if text]
    got = from_texts(iter(texts), lambda text: convert(by_hand(text)), vocab_size=V, documents=True)
    assert got == TokenCounts(V, documents=True).update([row for row in IDS if row], shift=True)
    with pytest.raises(ValueError, match="vocab_size is missing"):
        from_texts(TEXTS, by_hand)


@pytest.mark.parametrize("bos", [True, False])
def test_end_of_text(bos):
    tokenizer = make_transformers_tokenizer(bos)
    got = from_texts(TEXTS, tokenizer, vocab_size=V, append_eos=True)
    assert got.counts.tolist() == oracle([[BOS] * bos + row + [EOS] for row in IDS])
    assert got.counts[EOS] == len(TEXTS) - (not bos), "the EOS of an empty text without BOS is at position 0"
    assert "EOS appended" in got.counted


def test_no_end_of_text_to_append():
    for tokenizer in (make_tokenizer(), by_hand, make_transformers_tokenizer(eos_token=None)):
        with pytest.raises(ValueError, match="no EOS token"):
            from_texts(TEXTS, tokenizer, vocab_size=V, append_eos=True)


@pytest.mark.parametrize(
    "kind",
    [
        "transformers",
        "tokenizers",
    ],
)
def test_stored_padding_and_truncation_are_not_counted(kind):
    """tokenizer.json files of embedding models switch both on; counts are of the texts."""
    tokenizer = make_tokenizer()
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    tokenizer.enable_truncation(3)
    if kind == "transformers":
        import transformers

        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    got = from_texts(["ant bee cat ant bee", "cat"], tokenizer, vocab_size=V)
    assert got.counts.tolist() == oracle([[BOS, ANT, BEE, CAT, ANT, BEE], [BOS, CAT]])
    if kind == "tokenizers":
        assert tokenizer.truncation is not None, "the caller's stays as it was"


@pytest.mark.parametrize(
    ("texts", "tokenizer", "error", "message"),
    [
        ("a text", by_hand, TypeError, "texts is a str"),
        (["ant", None], by_hand, TypeError, r"texts\[1\] is a NoneType"),
        (["ant", b"bee"], by_hand, TypeError, r"texts\[1\] is a bytes"),
        (["ant"], "gpt2", TypeError, "tokenizer is a str"),
        (["ant"], None, TypeError, "tokenizer is a NoneType"),
        (["ant bee", "ant"], lambda text: [0, 1, 55][: len(text)], IndexError, r"the tokens of text 0\[2\] is 55"),
    ],
)
def test_bad_texts_and_tokenizers(texts, tokenizer, error, message):
    with pytest.raises(error, match=message):
        from_texts(texts, tokenizer, vocab_size=V, batch_size=1)


def test_texts_remember_their_tokenizer(tmp_path):
    tokenizer = make_transformers_tokenizer()
    tokenizer.save_pretrained(tmp_path / "animals")
    import transformers

    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "animals")
    got = from_texts(TEXTS, loaded)
    assert got.tokenizer == str(tmp_path / "animals")
    assert got.counts.tolist() == from_texts(TEXTS, tokenizer).counts.tolist()
    assert from_texts(TEXTS, by_hand, vocab_size=V).tokenizer is None


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


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed


class Interrupted:
    """`rows` until `stop` of them were read, then `error`; it also counts what is read."""

    def __init__(self, rows, stop=None, error=KeyboardInterrupt):
        self.rows, self.stop, self.error, self.read = rows, stop, error, 0

    def __iter__(self):
        for row in self.rows:
            if self.read == self.stop:
                raise self.error
            self.read += 1
            yield row


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("stop", range(len(ROWS)))
def test_counting_goes_on_where_it_stopped(tmp_path, stop, error):
    rows = [{"labels": row} for row in ROWS]
    path = tmp_path / "checkpoint"
    resume = functools.partial(from_dataset, documents=True, checkpoint=path, batch_size=2)
    with pytest.raises(error):
        resume(Interrupted(rows, stop, error))
    done = stop // 2 * 2  # whole batches
    assert path.exists() == (done > 0)
    if done:
        assert TokenCounts.load(path) == TokenCounts(V, documents=True).update(ROWS[:done], shift=True)
    got = resume(rows)
    assert got == from_dataset(rows, documents=True) == TokenCounts.load(path)
    assert resume(rows) == got, "a finished checkpoint is not counted twice"


def test_every_batch_is_counted_once_over_many_interruptions(tmp_path):
    rows = [{"labels": row} for row in np.random.default_rng(0).integers(0, V, (60, 4)).tolist()]
    for stop in range(5, 60, 5):
        with pytest.raises(KeyboardInterrupt):
            from_dataset(Interrupted(rows, stop), checkpoint=tmp_path / "c", batch_size=5)
    got = from_dataset(rows, checkpoint=tmp_path / "c", batch_size=5)
    assert got.counts.tolist() == oracle([row["labels"] for row in rows])


@pytest.mark.parametrize("kind", ["texts", "arrow", "streamed"])
def test_texts_and_data_sets_go_on(datasets, tmp_path, monkeypatch, kind):
    path = tmp_path / "checkpoint"
    dataset = datasets.Dataset.from_dict({"labels": ROWS})
    source = {"texts": TEXTS * 3, "arrow": dataset, "streamed": dataset.to_iterable_dataset()}[kind]

    def run(source, **options):
        if kind == "texts":
            return from_texts(source, by_hand, vocab_size=V, batch_size=2, **options)
        return from_dataset(source, batch_size=2, **options)

    calls = 0
    add = TokenCounts._add

    def interrupted(self, blocks, ignore_index, rows):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return add(self, blocks, ignore_index, rows)

    monkeypatch.setattr(TokenCounts, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, checkpoint=path)
    assert TokenCounts.load(path).sequences == 4
    assert run(source, checkpoint=path) == run(source)


def test_checkpoints_are_written_on_the_way(tmp_path, monkeypatch):
    """A killed process writes nothing at the end."""
    monkeypatch.setattr(frequency, "CHECKPOINT_IDS", 5)
    saved = []
    save = TokenCounts.save
    monkeypatch.setattr(TokenCounts, "save", lambda self, path: (saved.append(self.sequences), save(self, path)))
    rows = [{"labels": [1, 2, 3]}] * 10
    from_dataset(rows, checkpoint=tmp_path / "c", batch_size=1)
    assert saved == [3, 6, 9, 10]


def test_a_first_run_that_fails_at_once_leaves_no_checkpoint(datasets, tmp_path):
    dataset = datasets.Dataset.from_dict({"labels": ROWS})
    with pytest.raises(ValueError, match="column is"):
        from_dataset(dataset, column="label", checkpoint=tmp_path / "c")
    assert not list(tmp_path.iterdir())
    assert from_dataset(dataset, checkpoint=tmp_path / "c").counts.tolist() == oracle(ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": V + 1}, "vocab_size 12; accepted is 13"),
        ({"shift": False}, "not shifted"),
        ({"ignore_index": 0}, "ignore_index 0"),
        ({"column": "other"}, "column 'other'"),
        ({"documents": True}, "documents=False; accepted is True"),
        ({"tokenizer": "b"}, "'a'; accepted is 'b'"),
        ({"source": "elsewhere"}, "elsewhere"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change, message):
    rows = [{"labels": row, "other": row} for row in ROWS]
    settings = {"vocab_size": V, "tokenizer": "a", "checkpoint": tmp_path / "c", "progress": False}
    TokenCounts.from_dataset(rows, **settings)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        TokenCounts.from_dataset(rows, **(settings | change))
    assert str(tmp_path / "c") in str(caught.value)
    assert (tmp_path / "c").read_bytes() == before


def test_a_checkpoint_of_another_data_set_is_refused(datasets, tmp_path):
    dataset = datasets.Dataset.from_dict({"labels": ROWS})
    from_dataset(dataset, checkpoint=tmp_path / "c")
    assert from_dataset(dataset, checkpoint=tmp_path / "c").counts.tolist() == oracle(ROWS)
    for other in (dataset.shuffle(seed=1), dataset.select(range(5)), datasets.Dataset.from_dict({"labels": ROWS[:4]})):
        with pytest.raises(ValueError, match="holds counts of column 'labels' of data set"):
            from_dataset(other, checkpoint=tmp_path / "c")


@pytest.mark.parametrize("change", [{"shift": False}, {"add_special_tokens": False}, {"append_eos": True}])
def test_a_checkpoint_of_texts_encoded_otherwise_is_refused(tmp_path, change):
    tokenizer = make_transformers_tokenizer()
    from_texts(TEXTS, tokenizer, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="holds counts of texts"):
        from_texts(TEXTS, tokenizer, checkpoint=tmp_path / "c", **change)


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    first, second = make_transformers_tokenizer(), make_transformers_tokenizer()
    first.name_or_path, second.name_or_path = "animals", "plants"
    from_texts(TEXTS, first, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="counts tokens of 'animals'; accepted is 'plants'"):
        from_texts(TEXTS, second, checkpoint=tmp_path / "c")


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path):
    (tmp_path / "c").write_text("precious")
    with pytest.raises(ValueError, match="damaged"):
        from_dataset([{"labels": [1, 2]}], checkpoint=tmp_path / "c")
    assert (tmp_path / "c").read_text() == "precious"


def test_rows_of_several_sequences_go_on_at_the_right_row(tmp_path):
    rows = [{"labels": [[1, 2], [3, 4, 5]]}] * 6
    with pytest.raises(KeyboardInterrupt):
        from_dataset(Interrupted(rows, 4), checkpoint=tmp_path / "c", batch_size=2)
    assert from_dataset(rows, checkpoint=tmp_path / "c", batch_size=2) == from_dataset(rows)


COUNT_AND_STOP = """
import sys
import datasets
from pdl_kernels import TokenCounts
from pdl_kernels.weights import counts as frequency
dataset = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
def interrupted(add, calls=[]):
    def count(self, blocks, ignore_index, rows):
        calls.append(1)
        if len(calls) == 3 and sys.argv[4] == "stop":
            raise KeyboardInterrupt
        return add(self, blocks, ignore_index, rows)
    return count
TokenCounts._add = interrupted(TokenCounts._add)
dataset = dataset.map(lambda row: {"labels": [token + 1 for token in row["labels"]]})
counts = TokenCounts.from_dataset(dataset, 14, checkpoint=sys.argv[2], batch_size=2, progress=False)
print(counts.counts.tolist(), counts.sequences)
"""


def test_another_process_goes_on(datasets, tmp_path):
    """The fingerprint of a data set from files, mapped by a function, is the same in the next process."""
    import json

    rows = [[token % V for token in row] for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"labels": row}) + "\n" for row in rows))
    (tmp_path / "count.py").write_text(COUNT_AND_STOP)

    def run(what):
        arguments = [tmp_path / "count.py", tmp_path / "rows.jsonl", tmp_path / "c", tmp_path / "cache", what]
        environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
        )

    stopped = run("stop")
    assert "KeyboardInterrupt" in stopped.stderr
    assert TokenCounts.load(tmp_path / "c").sequences == 4
    done = run("go on")
    expected = Counter(token + 1 for row in rows for token in row[1:])
    assert done.stdout.split("\n")[-2] == f"{[expected[token] for token in range(14)]} 8", done.stderr
