"""`pdl-kernels count`, end to end, on files that the tests make."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.command_line import TEXTS, WORDS, fail, files_here, pa, run, write_json, write_parquet

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from pdl_kernels import TokenCounts  # noqa: E402
from pdl_kernels.data import corpora, tables  # noqa: E402

LABELS = [[3, 4, 5], [-100, -100, 6, 7], [], [2], [3, 3, 3]]


def expected_counts(texts, *, shift=True, special=True, eos=False):
    """(8,) of the words, by hand."""
    found = Counter()
    for text in texts:
        ids = [1] * special + [WORDS.get(word, 0) for word in text.split()] + [2] * eos
        found.update(ids[shift:])
    return [found[index] for index in range(len(WORDS))]


# count


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
        assert message == "error: datasets is not installed: pip install 'pdl-kernels[cli]'\n"
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
        (["--no-shift"], {"shift": False}),
        (["--no-special-tokens"], {"special": False}),
        (["--append-eos"], {"eos": True}),
        (["--append-eos", "--no-shift", "--no-special-tokens"], {"eos": True, "shift": False, "special": False}),
    ],
)
def test_count_options_of_texts(folder, options, settings):
    write_json("corpus.jsonl", [{"text": text} for text in TEXTS])
    run("count", "corpus.jsonl", "--tokenizer", folder, "--output", "c.safetensors", *options)
    assert TokenCounts.load("c.safetensors").counts.tolist() == expected_counts(TEXTS, **settings)


def test_count_vocab_size_and_documents(tokenizer):
    Path("corpus.txt").write_text("the the\nthe cat\n")
    options = ["--documents", "--vocab-size", 11, "--no-shift", "--no-special-tokens"]
    run("count", "corpus.txt", "--tokenizer", tokenizer, "--output", "c.safetensors", *options)
    counts = TokenCounts.load("c.safetensors")
    assert counts.counts.tolist() == [0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0]
    assert counts.document_counts.tolist() == [0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]


def test_count_says_when_nothing_was_counted():
    write_json("labels.jsonl", [{"labels": [3]}])
    options = ["--column", "labels", "--vocab-size", 8]
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
    options = ["--column", "labels", "--vocab-size", 8, "--output", "c.safetensors"]
    run("count", name, *options, "--shift" if shift else "--no-shift")
    counts = TokenCounts.load("c.safetensors")
    assert counts == TokenCounts(8).update(LABELS, shift=shift)
    assert counts.total == (6 if shift else 9)


def test_count_labels_ignore_index_and_length_from_the_tokenizer(tokenizer):
    write_json("labels.jsonl", [{"labels": [7, 3, 4, 3]}])
    options = ["--column", "labels", "--ignore-index", 3, "--no-shift", "--tokenizer", tokenizer]
    run("count", "labels.jsonl", *options, "--output", "c.safetensors")
    counts = TokenCounts.load("c.safetensors")
    assert counts.counts.tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    assert counts.tokenizer == tokenizer


def test_count_labels_never_become_python_lists(monkeypatch):
    name = label_file("list")

    def refused(*_):
        raise AssertionError("a Python list of a column")

    monkeypatch.setattr(tables.ParquetFiles, "__iter__", refused)
    run("count", name, "--column", "labels", "--vocab-size", 8, "--output", "c.safetensors")


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


# Interrupting and resuming


class Interruption:
    """Stops counting with Ctrl-C, or with an error, when the n-th batch comes."""

    def __init__(self, monkeypatch, batch, error=KeyboardInterrupt):
        self.left = batch
        self.error = error
        add = TokenCounts._add
        monkeypatch.setattr(TokenCounts, "_add", lambda counts, *arguments: self.add(add, counts, *arguments))

    def add(self, add, counts, *arguments):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return add(counts, *arguments)


def big_corpus(kind):
    """Enough rows for several batches."""
    texts = [f"the cat sat {'on ' * (row % 5)}" for row in range(3500)]
    labels = [[WORDS[word] for word in text.split()] for text in texts]
    if kind == "text":
        Path("big.txt").write_text("\n".join(texts))
        return "big.txt", ["--tokenizer", "tokenizer.json"]
    if kind == "parquet labels":
        write_parquet("big.parquet", {"labels": pa.array(labels, pa.list_(pa.int32()))}, row_group_size=1000)
        return "big.parquet", ["--column", "labels", "--vocab-size", 8]
    write_json("big.jsonl", [{"text": text, "labels": ids} for text, ids in zip(texts, labels, strict=True)])
    if kind == "json labels":
        return "big.jsonl", ["--column", "labels", "--vocab-size", 8]
    return "big.jsonl", ["--tokenizer", "tokenizer.json"]


@pytest.mark.parametrize("kind", ["text", "json texts", "json labels", "parquet labels"])
def test_resume_after_an_interruption(tokenizer, monkeypatch, kind):
    monkeypatch.setattr(tables, "LARGEST_BATCH", 1000)
    name, options = big_corpus(kind)
    run("count", name, *options, "--output", "whole.safetensors")
    with monkeypatch.context() as patches:
        Interruption(patches, 2)
        output = fail(130, "count", name, *options, "--output", "c.safetensors")
    assert "interrupted" in output
    assert "c.safetensors.partial keeps the work so far; --resume goes on" in output
    assert TokenCounts.load("c.safetensors.partial").sequences == 2000
    assert not Path("c.safetensors").exists()

    message = fail(2, "count", name, *options, "--output", "c.safetensors")
    assert "--resume goes on with it, --overwrite starts again" in message
    counted = []
    batches = TokenCounts._add
    monkeypatch.setattr(TokenCounts, "_add", lambda *arguments: counted.append(1) or batches(*arguments))
    run("count", name, *options, "--output", "c.safetensors", "--resume")
    assert len(counted) == 2  # of 1000 and 500 rows: the first 2000 are not counted again
    assert TokenCounts.load("c.safetensors") == TokenCounts.load("whole.safetensors")
    assert not Path("c.safetensors.partial").exists()


def test_start_again_after_an_interruption(tokenizer, monkeypatch):
    name, options = big_corpus("text")
    with monkeypatch.context() as patches:
        Interruption(patches, 1)
        fail(130, "count", name, *options, "--output", "c.safetensors")
    Path(name).write_text("the cat\n")
    run("count", name, *options, "--output", "c.safetensors", "--overwrite")
    assert TokenCounts.load("c.safetensors").sequences == 1
    assert not Path("c.safetensors.partial").exists()


def test_failed_work_is_kept_too(tokenizer, monkeypatch):
    name, options = big_corpus("text")
    with monkeypatch.context() as patches:
        Interruption(patches, 1, OSError("the disk is gone"))
        message = fail(1, "count", name, *options, "--output", "c.safetensors")
    assert "error: the disk is gone" in message
    assert "keeps the work so far" in message
    run("count", name, *options, "--output", "c.safetensors", "--resume")
    assert TokenCounts.load("c.safetensors").sequences == 3500


def test_interrupted_before_anything_was_counted_leaves_no_file(tokenizer, monkeypatch):
    name, options = big_corpus("text")
    Interruption(monkeypatch, 0)
    assert "keeps" not in fail(130, "count", name, *options, "--output", "c.safetensors")
    assert not [file for file in files_here() if file.startswith("c.")]


def test_resume_refuses_a_damaged_partial_file_and_keeps_it(tokenizer):
    Path("corpus.txt").write_text("the cat\n")
    Path("c.safetensors.partial").write_text("precious")
    message = fail(2, "count", "corpus.txt", "--tokenizer", tokenizer, "--output", "c.safetensors", "--resume")
    assert "c.safetensors.partial is damaged" in message
    assert Path("c.safetensors.partial").read_text() == "precious"


def test_resume_without_a_partial_file_starts(tokenizer):
    Path("corpus.txt").write_text("the cat\n")
    run("count", "corpus.txt", "--tokenizer", tokenizer, "--output", "c.safetensors", "--resume")
    assert TokenCounts.load("c.safetensors").total == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("file", "holds counts of"),
        ("name", "holds counts of"),
        ("tokenizer", "holds counts of"),
        ("--no-shift", "holds counts of"),
        ("--no-special-tokens", "holds counts of"),
        ("--documents", "documents=False"),
        ("--vocab-size=9", "vocab_size 8"),
    ],
)
def test_resume_refuses_other_files_and_settings(tokenizer, monkeypatch, change, message):
    name, options = big_corpus("text")
    with monkeypatch.context() as patches:
        Interruption(patches, 1)
        fail(130, "count", name, *options, "--output", "c.safetensors")
    kept = Path("c.safetensors.partial").read_bytes()
    if change == "file":
        text = Path(name).read_text()
        Path(name).write_text(text[:5] + "m" + text[6:])  # of the same size
    elif change == "name":
        Path(name).rename("other.txt")
        name = "other.txt"
    elif change == "tokenizer":
        other = tokenizers.Tokenizer.from_file(tokenizer)
        other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        other.save(tokenizer)
    else:
        options = [*options, change]
    assert message in fail(2, "count", name, *options, "--output", "c.safetensors", "--resume")
    assert Path("c.safetensors.partial").read_bytes() == kept
    assert not Path("c.safetensors").exists()


@pytest.mark.parametrize("kind", ["json labels", "parquet labels"])
def test_resume_refuses_other_labels(tokenizer, monkeypatch, kind):
    monkeypatch.setattr(tables, "LARGEST_BATCH", 1000)
    name, options = big_corpus(kind)
    with monkeypatch.context() as patches:
        Interruption(patches, 1)
        fail(130, "count", name, *options, "--output", "c.safetensors")
    write_json("big.jsonl", [{"labels": [3, 4]}])
    write_parquet("big.parquet", {"labels": pa.array([[3, 4]], pa.list_(pa.int32()))})
    assert "holds counts of" in fail(2, "count", name, *options, "--output", "c.safetensors", "--resume")


def test_ctrl_c_at_any_line_counts_all_of_a_batch_or_none():
    # A checkpoint with a batch's counts and without its sequences would count that batch twice when resumed.
    code = TokenCounts._add.__code__
    found = set()
    for line in range(100):
        counts = TokenCounts(8, documents=True)
        left = [line]

        def trace(frame, event, _, left=left):
            if frame.f_code is not code:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            counts.update([[3, 4], [4]], shift=False)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        found.add((counts.total, int(counts.document_counts.sum()), counts.sequences))
        if left[0] >= 0:
            break
    assert left[0] >= 0  # the last round ran through
    assert found == {(0, 0, 0), (3, 3, 2)}


def test_fingerprint_sees_size_and_every_sampled_block():
    content = bytearray(3_000_000)
    path = Path("large")
    seen = set()
    for position in (None, 0, 2_999_999, 1_500_000 // corpora.SAMPLE_BYTES):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        path.write_bytes(changed)
        seen.add(corpora.fingerprint([path]))
    path.write_bytes(content[:-1])
    seen.add(corpora.fingerprint([path]))
    assert len(seen) == 5


# Errors of count


def test_errors_of_files(tokenizer):
    write_json("corpus.jsonl", [{"text": "the cat", "n": 1}])
    Path("corpus.doc").write_text("the cat\n")
    Path("corpus.txt").write_text("the cat\n")
    Path("empty.txt").write_text("\n  \n")
    Path("damaged.parquet").write_text("the cat\n")
    Path("folder.jsonl").mkdir()
    Path("latin.txt").write_bytes(b"the cat\ncaf\xe9\n")

    def message(*names, code=2):
        return fail(code, "count", *names, "--tokenizer", tokenizer, "--output", "c.safetensors")

    assert "there is no file nowhere.jsonl" in message("nowhere.jsonl")
    assert "folder.jsonl is a folder" in message("folder.jsonl")
    assert "corpus.doc has the suffix '.doc'; accepted are .jsonl or .json" in message("corpus.doc")
    mixed = message("corpus.jsonl", "corpus.txt")
    assert "several kinds, JSON lines (corpus.jsonl) and text (corpus.txt)" in mixed
    assert "corpus.txt is given twice" in message("corpus.txt", "./corpus.txt")
    assert "empty.txt: there is no text and no label" in message("empty.txt")
    assert "damaged.parquet is damaged or no parquet file" in message("damaged.parquet")
    assert "latin.txt, line 2 is no UTF-8" in message("latin.txt")
    assert not [name for name in files_here() if name.startswith("c.")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "corpus.jsonl, line 3 is no JSON (Expecting ',' delimiter)"),
        ('["the cat"]', "corpus.jsonl, line 3 is a JSON list; accepted is one JSON object a line"),
        ('{"txt": "a", "n": 1}', "corpus.jsonl, line 3 has no column 'text'; accepted by --column are those it has"),
        ('{"text": null}', "corpus.jsonl, line 3: column 'text' holds null"),
        ('{"text": 5}', "corpus.jsonl, line 3: column 'text' holds int"),
        ('{"text": [3, 4]}', "corpus.jsonl, line 3: column 'text' holds a list; accepted is a string"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_errors_in_json_lines_name_file_and_line(tokenizer, line, message, first):
    good = '{"text": "the cat"}\n'
    if first and "holds a list" in message:
        message = (
            "corpus.jsonl, line 4: column 'text' holds a string; accepted is a list of ids"  # the first row decides
        )
    # Line 2 is empty. Where it is the first row, it is found before counting; otherwise during it.
    Path("corpus.jsonl").write_text(f"{'' if first else good}\n{chr(10) if first else ''}{line}\n{good}")
    found = fail(2, "count", "corpus.jsonl", "--tokenizer", tokenizer, "--output", "c.safetensors")
    assert message in found
    if "no column" in message:
        assert "'txt', 'n'" in found
    assert not [name for name in files_here() if name.startswith("c.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([3, 2.5], "line 2: column 'labels' holds a list with 2.5"),
        ([3, None], "line 2: column 'labels' holds a list with null"),
        ([3, "a"], "line 2: column 'labels' holds a list with \"a\""),
        ([[3], [4, 5]], "line 2: column 'labels' holds a list with [3]"),
        ("the cat", "line 2: column 'labels' holds a string; accepted is a list of ids"),
        ([3, 8], "labels.jsonl, line 2: labels[1] is 8; accepted are ids from 0 to 7"),
        ([3, -7], "labels.jsonl, line 2: labels[1] is -7"),
    ],
)
def test_errors_in_json_labels(row, message):
    write_json("labels.jsonl", [{"labels": [3]}, {"labels": row}])
    options = ["--column", "labels", "--vocab-size", 8, "--output", "c.safetensors"]
    assert message in fail(2, "count", "labels.jsonl", *options)


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        ({"a": ["x"], "b": [1]}, "text", "has no column 'text'; accepted by --column are those it has: 'a', 'b'"),
        ({"text": [1]}, "text", "column 'text' holds int64; accepted are strings or lists of integers"),
        ({"text": [[0.5]]}, "text", "column 'text' holds list<"),
        ({"text": ["the", None]}, "text", "corpus.parquet, row 1: column 'text' is null"),
        ({"text": [[3, None]]}, "text", "corpus.parquet, row 0: text[1] is null inside a list"),
        ({"text": [[0, 8]]}, "text", "corpus.parquet, row 0: text[1] is 8"),
    ],
)
def test_errors_in_parquet(tokenizer, columns, column, message):
    write_parquet("corpus.parquet", columns)
    options = ["--column", column, "--tokenizer", tokenizer, "--output", "c.safetensors"]
    assert message in fail(2, "count", "corpus.parquet", *options)
    assert not [name for name in files_here() if name.startswith("c.")]


def test_columns_that_hold_different_things(tokenizer):
    write_json("a.jsonl", [{"text": "the cat"}])
    write_json("b.jsonl", [{"text": []}, {"text": [3]}])
    message = fail(2, "count", "a.jsonl", "b.jsonl", "--tokenizer", tokenizer, "--output", "c.safetensors")
    assert "column 'text' holds texts in a.jsonl and labels in b.jsonl" in message


def test_errors_of_options_of_count(tokenizer, folder):
    write_json("corpus.jsonl", [{"text": "the cat", "labels": [3, 4]}])
    Path("corpus.txt").write_text("the cat\n")
    Path("taken.safetensors").write_text("precious")
    labels = ("corpus.jsonl", "--column", "labels")

    def message(*arguments, output="c.safetensors"):
        return fail(2, "count", *arguments, "--output", output)

    assert "column 'text' holds texts, and --tokenizer is missing" in message("corpus.jsonl")
    assert "text holds texts, and --tokenizer is missing" in message("corpus.txt")
    assert "column 'labels' holds label ids, and --vocab-size is missing" in message(*labels)
    assert "--append-eos is for texts" in message(*labels, "--vocab-size", 8, "--append-eos")
    assert "--special-tokens is for texts" in message(*labels, "--vocab-size", 8, "--no-special-tokens")
    ignored = message("corpus.jsonl", "--tokenizer", tokenizer, "--ignore-index", 3)
    assert "--ignore-index is for label ids, and column 'text' holds texts" in ignored
    assert "--column is 'text', and text files have no columns" in message("corpus.txt", "--column", "text")
    assert f"{tokenizer} names no end-of-text token" in message(
        "corpus.jsonl", "--tokenizer", tokenizer, "--append-eos"
    )
    assert "--vocab-size" in message(*labels, "--vocab-size", 0)
    assert "accepted are ids from 0 to 3" in message("corpus.txt", "--tokenizer", tokenizer, "--vocab-size", 4)
    exists = message("corpus.txt", "--tokenizer", tokenizer, output="taken.safetensors")
    assert "taken.safetensors, which exists; --overwrite replaces it" in exists
    assert Path("taken.safetensors").read_text() == "precious"
    assert "there is no folder nowhere" in message("corpus.txt", output="nowhere/c.safetensors")
    assert "accepted are names that end in .safetensors" in message("corpus.txt", output="c.json")
    assert "Missing option '--output'" in fail(2, "count", "corpus.txt")
    assert "Missing argument" in fail(2, "count", "--output", "c.safetensors")
    assert not [name for name in files_here() if name.startswith("c.")]

    run("count", "corpus.txt", "--tokenizer", tokenizer, "--output", "taken.safetensors", "--overwrite")
    assert TokenCounts.load("taken.safetensors").total == 2


def test_errors_of_tokenizers(monkeypatch):
    Path("corpus.txt").write_text("the cat\n")
    Path("bad.json").write_text("{}")
    Path("bad.gguf").write_text("{}")
    Path("model.bin").write_text("{}")
    Path("empty").mkdir()

    def message(name):
        return fail(2, "count", "corpus.txt", "--tokenizer", name, "--output", "c.safetensors")

    assert "bad.json, which is no tokenizer.json" in message("bad.json")
    assert "bad.gguf, which cannot be read" in message("bad.gguf")
    assert "accepted are a folder, a hub name, and files .json and .gguf" in message("model.bin")
    assert "empty, which cannot be read" in message("empty")
    for missing in ("./nowhere", "nowhere.json", "nowhere.gguf", "a/b/c"):
        assert f"{missing}, and there is no such file or folder" in message(missing)

    def no_network(*_, **options):
        raise OSError("We couldn't connect to the hub\nand a second line")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_network)
    offline = message("someone/some-model")
    assert "the Hugging Face hub did not give it (We couldn't connect to the hub)" in offline
    assert "second line" not in offline


def test_gguf_is_read_from_its_folder(folder, monkeypatch):
    Path("model").mkdir()
    Path("model/small.gguf").write_text("")
    asked = []
    read = transformers.AutoTokenizer.from_pretrained

    def from_pretrained(name, **options):
        asked.append((name, options))
        return read(folder)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    Path("corpus.txt").write_text("the cat\n")
    run("count", "corpus.txt", "--tokenizer", "model/small.gguf", "--output", "c.safetensors")
    assert asked == [("model", {"gguf_file": "small.gguf"})]
    assert TokenCounts.load("c.safetensors").tokenizer == "model/small.gguf"
