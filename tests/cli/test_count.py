"""What `pdl-kernels count` counts, end to end, on files that the tests make."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.command_line import TEXTS, WORDS, fail, files_here, pa, run, write_json, write_parquet

from pdl_kernels import TokenCounts
from pdl_kernels.data import corpora, tables

LABELS = [[3, 4, 5], [-100, -100, 6, 7], [], [2], [3, 3, 3]]


def expected_counts(texts, *, shift=True, special=True, eos=False):
    """(8,) of the words, by hand."""
    found = Counter()
    for text in texts:
        ids = [1] * special + [WORDS.get(word, 0) for word in text.split()] + [2] * eos
        found.update(ids[shift:])
    return [found[index] for index in range(len(WORDS))]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_count_texts_of_every_kind(tokenizer, suffix):
    half = len(TEXTS) // 2
    names = []
    for number, texts in enumerate((TEXTS[:half], TEXTS[half:])):
        names.append(f"part{number}{suffix}")
        if suffix == ".parquet":
            write_parquet(names[-1], {"text": texts, "other": [0] * len(texts)}, row_group_size=2)
        elif suffix == ".txt":
            Path(names[-1]).write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n   \n".join(texts).encode())
        else:
            write_json(names[-1], [{"text": text} for text in texts])
    output = run("count", *names, "--tokenizer", tokenizer, "--output", "counts.safetensors")
    counts = TokenCounts.load("counts.safetensors")
    assert counts.counts.tolist() == expected_counts(TEXTS)
    assert counts.sequences == len(TEXTS)
    assert counts.tokenizer == tokenizer
    assert f"{counts.total} targets in {len(TEXTS)} sequences" in output
    assert not [name for name in files_here() if "partial" in name or name.startswith(".")]


def test_count_globs_folders_and_compressed_files(tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk("saved")
    with gzip.open("corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    Path("a.csv").write_text("text\n" + "\n".join(TEXTS[:4]))
    Path("b.csv").write_text("text\n" + "\n".join(TEXTS[4:]))
    for name in ("saved", "corpus.jsonl.gz", "?.csv"):
        run("count", name, "--tokenizer", tokenizer, "--output", "c.safetensors", "--overwrite")
        assert TokenCounts.load("c.safetensors").counts.tolist() == expected_counts(TEXTS), name


def test_count_names_the_extra_where_datasets_is_missing(tokenizer, monkeypatch):
    write_parquet("corpus.parquet", {"text": TEXTS})
    Path("corpus.txt").write_text("the cat\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    options = ["--tokenizer", tokenizer, "--output", "c.safetensors"]
    for name in ("corpus.parquet", "someone/data:train"):
        message = fail(2, "count", name, *options)
        assert message.endswith("error: datasets is not installed: pip install 'pdl-kernels[cli]'\n")
    run("count", "corpus.txt", *options)


@pytest.mark.parametrize("kind", ["strings", "large strings", "dictionary"])
def test_count_texts_of_every_arrow_type(tokenizer, kind):
    texts = pa.array(TEXTS)
    if kind == "large strings":
        texts = texts.cast(pa.large_string())
    elif kind == "dictionary":
        texts = texts.dictionary_encode()
    write_parquet("corpus.parquet", {"answer": texts})
    run("count", "corpus.parquet", "--column", "answer", "--tokenizer", tokenizer, "--output", "c.safetensors")
    assert TokenCounts.load("c.safetensors").counts.tolist() == expected_counts(TEXTS)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--encoder-decoder"], {"shift": False}),
        (["--no-special-tokens"], {"special": False}),
        (["--append-eos"], {"eos": True}),
        (["--append-eos", "--encoder-decoder", "--no-special-tokens"], {"eos": True, "shift": False, "special": False}),
    ],
)
def test_count_options_of_texts(folder, options, settings):
    write_json("corpus.jsonl", [{"text": text} for text in TEXTS])
    run("count", "corpus.jsonl", "--tokenizer", folder, "--output", "c.safetensors", *options)
    assert TokenCounts.load("c.safetensors").counts.tolist() == expected_counts(TEXTS, **settings)


def test_count_vocab_size_and_documents(tokenizer):
    Path("corpus.txt").write_text("the the\nthe cat\n")
    options = ["--documents", "--vocab-size", 11, "--encoder-decoder", "--no-special-tokens"]
    run("count", "corpus.txt", "--tokenizer", tokenizer, "--output", "c.safetensors", *options)
    counts = TokenCounts.load("c.safetensors")
    assert counts.counts.tolist() == [0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0]
    assert counts.document_counts.tolist() == [0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]


def test_count_says_when_nothing_was_counted():
    write_json("labels.jsonl", [{"labels": [3]}])
    options = ["--column", "labels", "--causal", "--vocab-size", 8]
    assert "warning: no target was counted" in run("count", "labels.jsonl", *options, "--output", "c.safetensors")
    assert "normalize is 'token_mean'" in fail(2, "weights", "c.safetensors", "--output", "w.safetensors")
    assert not Path("w.safetensors").exists()


def label_file(kind):
    if kind == "jsonl":
        return write_json("labels.jsonl", [{"labels": labels} for labels in LABELS])
    types = {"list": pa.list_(pa.int32()), "large_list": pa.large_list(pa.int64()), "int16": pa.list_(pa.int16())}
    return write_parquet("labels.parquet", {"labels": pa.array(LABELS, types[kind])}, row_group_size=2)


@pytest.mark.parametrize("kind", ["jsonl", "list", "large_list", "int16"])
@pytest.mark.parametrize("shift", [True, False])
def test_count_labels(kind, shift):
    name = label_file(kind)
    options = ["--column", "labels", "--causal", "--vocab-size", 8, "--output", "c.safetensors"]
    run("count", name, *options, "--causal" if shift else "--encoder-decoder")
    counts = TokenCounts.load("c.safetensors")
    assert counts == TokenCounts(8).update(LABELS, shift=shift)
    assert counts.total == (6 if shift else 9)


def test_count_labels_ignore_index_and_length_from_the_tokenizer(tokenizer):
    write_json("labels.jsonl", [{"labels": [7, 3, 4, 3]}])
    options = ["--column", "labels", "--ignore-index", 3, "--encoder-decoder", "--tokenizer", tokenizer]
    run("count", "labels.jsonl", *options, "--output", "c.safetensors")
    counts = TokenCounts.load("c.safetensors")
    assert counts.counts.tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    assert counts.tokenizer == tokenizer


def test_count_labels_never_become_python_lists(monkeypatch):
    name = label_file("list")

    def refused(*_):
        raise AssertionError("a Python list of a column")

    monkeypatch.setattr(tables.ParquetFiles, "records", refused)
    run("count", name, "--column", "labels", "--causal", "--vocab-size", 8, "--output", "c.safetensors")


@pytest.mark.parametrize(("ids_per_row", "rows"), [(1, tables.LARGEST_BATCH), (2**12, 2**10)])
def test_batches_are_bounded_by_ids(ids_per_row, rows):
    # Long rows make the batch small, whatever lies in the other columns.
    columns = {"x": [[0] * 9] * 8, "labels": pa.array([[1] * ids_per_row] * 8, pa.list_(pa.int32()))}
    corpus = corpora.open_corpus([write_parquet("labels.parquet", columns)], "labels")
    assert corpus.batch_size == rows
    assert len(corpus.rows) == 8


def test_tables_after_skipped_rows():
    parts = []
    for part in range(2):
        labels = pa.array([[10 * part + row] for row in range(7)], pa.list_(pa.int64()))
        parts.append(write_parquet(f"{part}.parquet", {"labels": labels}, row_group_size=3))
    corpus = corpora.open_corpus(parts, "labels")
    everything = [[number] for number in (*range(7), *range(10, 17))]
    for skipped in range(15):
        for batch_size in (1, 2, 3, 5, 100):
            tables = corpus.rows.arrow_tables("labels", skipped, batch_size)
            assert [ids for table in tables for ids in table["labels"].to_pylist()] == everything[skipped:]
