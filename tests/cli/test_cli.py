"""The command line, end to end, on files that the tests make."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the extra cli is not installed")
pytest.importorskip("rich")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from pdl_kernels import TokenCounts, backends, load_weights  # noqa: E402
from pdl_kernels.cli import weights as weights_command  # noqa: E402
from pdl_kernels.cli.commands import app  # noqa: E402
from pdl_kernels.data import corpora  # noqa: E402
from pdl_kernels.weights import files  # noqa: E402
from pdl_kernels.weights.recipes import weightings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "the": 3, "cat": 4, "sat": 5, "on": 6, "mat": 7}
TEXTS = ["the cat sat on the mat", "the mat", "cat", "the dog sat", "on on on the cat"] * 3
LABELS = [[3, 4, 5], [-100, -100, 6, 7], [], [2], [3, 3, 3]]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer.json that puts <bos> first, and, as some are saved, cuts and pads."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    made.enable_truncation(4)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    return "tokenizer.json"


@pytest.fixture
def folder(tokenizer):
    made = tokenizers.Tokenizer.from_file(tokenizer)
    made.no_padding()  # transformers would add a padding token for it
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained("folder")
    return "folder"


@pytest.fixture
def counts(tokenizer):
    write_json("corpus.jsonl", [{"text": text} for text in TEXTS])
    run("count", "corpus.jsonl", "--tokenizer", tokenizer, "--output", "counts.safetensors")
    return "counts.safetensors"


@pytest.fixture
def weights(counts):
    run("weights", counts, "--output", "weights.safetensors")
    return "weights.safetensors"


def invoke(*arguments):
    # Wide, so that no message is broken into lines.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def run(*arguments):
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


def fail(code, *arguments):
    """The message of a command that ends with this code, and not with a traceback."""
    done = invoke(*arguments)
    assert done.exit_code == code, (done.exit_code, done.output)
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def write_json(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def write_parquet(name, columns, **options):
    pq.write_table(pa.table(columns), name, **options)
    return name


def expected_counts(texts, *, shift=True, special=True, eos=False):
    """(8,) of the words, by hand."""
    found = Counter()
    for text in texts:
        ids = [1] * special + [WORDS.get(word, 0) for word in text.split()] + [2] * eos
        found.update(ids[shift:])
    return [found[index] for index in range(len(WORDS))]


def files_here():
    return {path.name for path in Path.cwd().iterdir()}


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

    monkeypatch.setattr(corpora.ParquetFiles, "__iter__", refused)
    run("count", name, "--column", "labels", "--vocab-size", 8, "--output", "c.safetensors")


@pytest.mark.parametrize(("ids_per_row", "rows"), [(1, corpora.LARGEST_BATCH), (2**12, 2**10)])
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
    monkeypatch.setattr(corpora, "LARGEST_BATCH", 1000)
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
    monkeypatch.setattr(corpora, "LARGEST_BATCH", 1000)
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
    for position in (None, 0, 2_999_999, 1_500_000 // corpora.BLOCK_BYTES):
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
    Path("corpus.csv").write_text("the cat\n")
    Path("corpus.txt").write_text("the cat\n")
    Path("empty.txt").write_text("\n  \n")
    Path("damaged.parquet").write_text("the cat\n")
    Path("folder.jsonl").mkdir()
    Path("latin.txt").write_bytes(b"the cat\ncaf\xe9\n")

    def message(*names, code=2):
        return fail(code, "count", *names, "--tokenizer", tokenizer, "--output", "c.safetensors")

    assert "there is no file nowhere.jsonl" in message("nowhere.jsonl")
    assert "folder.jsonl is a folder" in message("folder.jsonl")
    assert "corpus.csv has the suffix '.csv'; accepted are .jsonl or .json" in message("corpus.csv")
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
        ([3, 8], "labels of row 1[1] is 8; accepted are ids from 0 to 7"),
        ([3, -7], "labels of row 1[1] is -7"),
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
        ({"text": [[3, None]]}, "text", "null inside a list"),
        ({"text": [[0, 8]]}, "text", "text[0][1] is 8"),
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


def test_a_full_disk_is_exit_code_1(counts, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace_file", full)
    message = fail(1, "weights", counts, "--output", "weights.safetensors")
    assert message == "error: [Errno 28] No space left on device\n"


def test_a_bug_is_shown_on_demand(counts):
    done = invoke("--traceback", "weights", "nowhere.safetensors", "--output", "w.safetensors")
    assert isinstance(done.exception, FileNotFoundError)


# weights


def test_weights_are_the_recipe_with_its_defaults(counts):
    output = run("weights", counts, "--output", "weights.safetensors")
    saved = load_weights("weights.safetensors")
    expected = weightings()["power_law"]()
    assert saved.weighting == expected
    torch.testing.assert_close(saved.table, expected.table(TokenCounts.load(counts)), rtol=0, atol=0)
    assert saved.facts["tokens"] == TokenCounts.load(counts).total
    assert "effective sample size" in output


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (["--alpha", 0.7, "--eps", 2], {"alpha": 0.7, "eps": 2.0}),
        (["--recipe", "inverse"], {"name": "inverse"}),
        (
            ["--recipe", "square_root_inverse", "--normalize", "max"],
            {"name": "square_root_inverse", "normalize": "max"},
        ),
        (["--recipe", "class_balanced", "--beta", 0.9], {"name": "class_balanced", "beta": 0.9}),
        (["--recipe", "smoothed_inverse", "--a", 0.01], {"name": "smoothed_inverse", "a": 0.01}),
        (["--normalize", "none"], {"normalize": None}),
        (["--unseen", "cap"], {"unseen": "cap"}),
        (["--unseen", "formula"], {"unseen": "formula"}),
        (["--unseen", 0.5], {"unseen": 0.5}),
        (["--clip", 0.5, 2], {"clip": (0.5, 2.0)}),
        (["--neutral-id", 3, "--neutral-id", 7], {"neutral_ids": (3, 7)}),
        (["--tokenizer", "tokenizer.json", "--neutral-special"], {"neutral_ids": (0, 1, 2)}),
        (["--tokenizer", "tokenizer.json", "--neutral-special", "--neutral-id", 5], {"neutral_ids": (0, 1, 2, 5)}),
        (["--paper"], {"alpha": 1.0, "eps": 1e-7, "normalize": None, "unseen": "formula"}),
    ],
)
def test_options_of_weights(counts, options, recipe):
    run("weights", counts, "--output", "weights.safetensors", *options)
    saved = load_weights("weights.safetensors")
    defaults = weightings()[recipe.get("name", "power_law")]().recipe()
    assert saved.weighting.recipe() == {**defaults, **recipe}
    table = saved.weighting.table(TokenCounts.load(counts))
    torch.testing.assert_close(saved.table, table, rtol=0, atol=0)


def test_idf_needs_documents(counts, tokenizer):
    message = fail(2, "weights", counts, "--recipe", "idf", "--output", "weights.safetensors")
    assert "accepted are counts of `pdl-kernels count --documents`" in message
    run("count", "corpus.jsonl", "--tokenizer", tokenizer, "--output", counts, "--overwrite", "--documents")
    run("weights", counts, "--recipe", "idf", "--output", "weights.safetensors")
    assert load_weights("weights.safetensors").weighting.name == "idf"


def test_weights_of_a_longer_output_layer_and_warnings(counts):
    output = run("weights", counts, "--output", "weights.safetensors", "--vocab-size", 12, "--paper")
    assert load_weights("weights.safetensors").table[8:].tolist() == pytest.approx([1e7] * 4, rel=1e-6)
    assert "warning: " in output
    assert "never counted" in output


def test_every_recipe_is_on_offer():
    assert [recipe.value for recipe in weights_command.Recipe] == list(weightings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", 0.9], "--beta belongs to --recipe class_balanced; --recipe power_law takes --alpha, --eps"),
        (["--recipe", "inverse", "--alpha", 1], "--recipe inverse takes no option of its own"),
        (["--recipe", "class_balanced", "--a", 1], "--a belongs to --recipe smoothed_inverse"),
        (["--recipe", "tfidf"], "Invalid value for '--recipe'"),
        (["--normalize", "median"], "Invalid value for '--normalize'"),
        (["--alpha", -1], "Invalid value for '--alpha'"),
        (["--alpha", "much"], "Invalid value for '--alpha'"),
        (["--alpha", "nan"], "--alpha"),  # typer refuses it, or, where it is an older one, the package
        (["--alpha", "inf"], "--alpha"),
        (["--recipe", "class_balanced", "--beta", 1], "--beta is 1; accepted are numbers >= 0 and < 1"),
        (["--unseen", "most"], "--unseen is 'most'; accepted are a number >= 0, formula and cap"),
        (["--unseen", -1], "--unseen is -1"),
        (["--recipe", "inverse", "--unseen", "formula"], "is not finite in float32"),
        (["--clip", 2, 1], "--clip is 2 1; accepted are two numbers, 0 <= LOW <= HIGH"),
        (["--neutral-id", 8], "neutral_ids hold 8; accepted are ids from 0 to 7"),
        (["--neutral-special"], "--neutral-special needs --tokenizer"),
        (["--vocab-size", 4], "--vocab-size is 4; accepted are integers >= 8"),
        (["--paper", "--alpha", 1], "--paper is a whole recipe, and --alpha came with it"),
        (["--paper", "--recipe", "inverse"], "--paper is a whole recipe, and --recipe came with it"),
        (["--paper", "--clip", 1, 2], "--paper is a whole recipe, and --clip came with it"),
        (["--paper", "--neutral-id", 1], "--paper is a whole recipe, and --neutral-id came with it"),
        (["--alhpa", 1], "No such option"),
    ],
)
def test_errors_of_options_of_weights(counts, options, message):
    assert message in fail(2, "weights", counts, "--output", "weights.safetensors", *options)
    assert not Path("weights.safetensors").exists()


def test_errors_of_files_of_weights(counts, weights):
    before = Path(weights).read_bytes()
    assert "which exists; --overwrite replaces it" in fail(2, "weights", counts, "--output", weights, "--alpha", 1)
    assert Path(weights).read_bytes() == before
    run("weights", counts, "--output", weights, "--alpha", 1, "--overwrite")
    assert load_weights(weights).weighting.alpha == 1

    assert "there is no file nowhere" in fail(2, "weights", "nowhere", "--output", "w.safetensors")
    Path("damaged.safetensors").write_bytes(before[:50])
    assert "damaged.safetensors is damaged" in fail(2, "weights", "damaged.safetensors", "--output", "w.safetensors")
    swapped = fail(2, "weights", weights, "--output", "w.safetensors")
    assert "is pdl_kernels weight table; accepted is pdl_kernels token counts" in swapped


# inspect


def test_inspect(weights, counts, tokenizer):
    output = run("inspect", weights, counts, "--tokenizer", tokenizer)
    for expected in ("Weights and corpus", "Heaviest types", "Lightest types seen", "Largest shares", "alpha=0.4"):
        assert expected in output
    assert "'mat'" in output
    assert f"{TokenCounts.load(counts).total:,} in {len(TEXTS)} sequences" in output
    assert "'mat'" not in run("inspect", weights, counts)


def test_inspect_json(weights, counts, tokenizer):
    found = json.loads(run("inspect", weights, counts, "--tokenizer", tokenizer, "--json"))
    total = TokenCounts.load(counts)
    assert found["targets"] == total.total
    assert found["recipe"] == {**weightings()["power_law"]().recipe(), "neutral_ids": []}
    assert found["lightest_types"][0]["text"] == "the"
    assert found["lightest_types"][0]["count"] == int(total.counts[3])
    assert found["warnings"] == []


def test_inspect_shows_tokens_as_they_are(tokenizer):
    # In a table of rich, [red] would be a colour and a line end would break the row.
    made = tokenizers.Tokenizer.from_file(tokenizer)
    made.add_tokens(["[red]", "a\nb"])
    made.save("markup.json")
    write_json("labels.jsonl", [{"labels": [8, 9, 9]}])
    options = ["--column", "labels", "--vocab-size", 10, "--no-shift"]
    run("count", "labels.jsonl", *options, "--output", "c.safetensors")
    run("weights", "c.safetensors", "--output", "w.safetensors")
    output = run("inspect", "w.safetensors", "c.safetensors", "--tokenizer", "markup.json")
    assert "'[red]'" in output
    assert r"'a\nb'" in output


def test_inspect_warns_of_other_counts(weights, counts, tokenizer):
    Path("other.txt").write_text("the cat\n")
    run("count", "other.txt", "--tokenizer", tokenizer, "--output", "other.safetensors")
    output = run("inspect", weights, "other.safetensors")
    assert "warning: the weights were made from counts of" in output
    assert "these are counts of 2" in output


def test_errors_of_inspect(weights, counts):
    assert "there is no file nowhere" in fail(2, "inspect", "nowhere", counts)
    assert "accepted is pdl_kernels weight table" in fail(2, "inspect", counts, weights)
    write_json("labels.jsonl", [{"labels": [3, 4]}])
    run("count", "labels.jsonl", "--column", "labels", "--vocab-size", 20, "--output", "long.safetensors")
    assert "counts have 20 entries; accepted are at most 8" in fail(2, "inspect", weights, "long.safetensors")
    assert "long.safetensors" in fail(2, "inspect", weights, "long.safetensors", "--tokenizer", "long.safetensors")


# plot


def png_size(path):
    content = Path(path).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_plot(weights, counts):
    pytest.importorskip("matplotlib")
    before = files_here()
    run("plot", weights, counts, "--output", "plot.png")
    assert png_size("plot.png") == (1500, 500)
    assert files_here() - before == {"plot.png"}
    assert "which exists" in fail(2, "plot", weights, counts, "--output", "plot.png")
    run("plot", weights, counts, "--output", "plot.png", "--overwrite")
    assert "accepted are names that end in .png" in fail(2, "plot", weights, counts, "--output", "plot.pdf")
    assert "there is no file nowhere" in fail(2, "plot", "nowhere", counts, "--output", "other.png")
    assert not Path("other.png").exists()


def test_plot_that_cannot_be_written_leaves_nothing(weights, counts, monkeypatch):
    pytest.importorskip("matplotlib")

    def broken(*_):
        raise OSError(28, "No space left on device")

    before = files_here()
    monkeypatch.setattr(os, "replace", broken)
    assert "No space left" in fail(1, "plot", weights, counts, "--output", "plot.png")
    assert files_here() == before


def test_zipf_fit():
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    ranks = torch.arange(1, 20001).double().numpy()
    counts = 1e7 / ranks**1.25
    counts[:5] = 1e7  # the most frequent types are not on the line, and are left out
    fit = plots.zipf_fit(counts)
    assert fit.slope == pytest.approx(-1.25, abs=1e-6)
    assert fit.first == 10
    assert fit.last == 20000
    # Each decade of ranks counts alike: two slopes that meet at rank 1000 give about their mean over 10 to 100,000.
    ranks = torch.arange(1, 100001).double().numpy()
    bent = 1e12 * ranks**-1.0
    bent[999:] = 1e9 * (ranks[999:] / 1000) ** -2.0
    assert plots.zipf_fit(bent).slope == pytest.approx(-1.5, abs=0.05)
    assert plots.zipf_fit(counts[:2]) is None


def test_shares_by_decade():
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    counts = torch.tensor([1, 9, 10, 99, 1000, 10**15]).double().numpy()
    weights = torch.tensor([1, 1, 2, 0, 0.5, 0]).double().numpy()
    decades, before, after = plots.shares_by_decade(weights, counts)
    assert decades == list(range(16))
    assert before[[0, 1, 2, 3, 15]].tolist() == pytest.approx([10 / 1e15, 109 / 1e15, 0, 1000 / 1e15, 1], rel=1e-6)
    assert after[[0, 1, 2, 3]].tolist() == pytest.approx([10 / 530, 20 / 530, 0, 500 / 530])


@pytest.mark.parametrize(
    ("table", "counts"), [([1.0], [1]), ([0.0, 0.0], [3, 4]), ([1.0, 1e7, 2.0], [5, 0, 4]), ([0.5] * 40, [1] * 30)]
)
def test_plot_of_odd_tables(table, counts):
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    plots.plot("plot.png", torch.tensor(table), torch.tensor(counts))
    assert png_size("plot.png") == (plots.WIDTH, plots.HEIGHT)


def test_plot_refuses():
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    with pytest.raises(ValueError, match="counts are all 0"):
        plots.plot("plot.png", torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="accepted are at most 2"):
        plots.plot("plot.png", torch.ones(2), torch.ones(3))


# doctor


def test_doctor(monkeypatch):
    monkeypatch.setenv("PDL_KERNELS_VALIDATE", "1")
    output = run("doctor")
    for expected in (torch.__version__, "Device cpu", "bfloat16", "eager", "TRITON_INTERPRET", "on every device"):
        assert expected in output
    found = json.loads(run("doctor", "--json", "-"))
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert {dtype: choice["auto"] for dtype, choice in cpu["backends"].items()} == dict.fromkeys(
        ("float16", "bfloat16", "float32", "float64"), "eager"
    )
    assert found["settings"][0]["value"] == "1"


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(None, "where a recorded run has shown them right"), ("1", "wherever Triton compiles them"),
     ("0", "no row is held by more than one"), ("yes", "an error: accepted are 0, 1, or not set")],
)  # fmt: skip
def test_doctor_shows_the_setting_of_clusters(monkeypatch, value, meaning):
    if value is None:
        monkeypatch.delenv("PDL_KERNELS_CLUSTERS", raising=False)
    else:
        monkeypatch.setenv("PDL_KERNELS_CLUSTERS", value)
    found = {setting["variable"]: setting for setting in json.loads(run("doctor", "--json", "-"))["settings"]}
    assert found["PDL_KERNELS_CLUSTERS"]["value"] == value
    assert meaning in found["PDL_KERNELS_CLUSTERS"]["meaning"]


def test_doctor_says_what_is_missing(monkeypatch):
    from importlib import metadata

    version = metadata.version

    def without_datasets(package):
        if package == "datasets":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_datasets)
    assert json.loads(run("doctor", "--json", "-"))["versions"]["datasets"] == "not installed"


@pytest.mark.parametrize("triton", [None, "Triton cannot be imported (gone)"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:pdl_kernels runs its slower")
def test_explanations_agree_with_the_choice(monkeypatch, triton, device, dtype):
    monkeypatch.setattr(backends, "triton_import_problem", lambda: triton)
    chosen, why = backends.explain_auto(torch.device(device), dtype)
    assert chosen == backends.choose_backend("auto", torch.device(device), dtype)
    if device == "cuda" and dtype != torch.float64:
        assert why == (triton or "the fused kernels run on this device")


def test_doctor_of_a_gpu(monkeypatch):
    properties = type("Properties", (), {"name": "Some GPU", "major": 9, "minor": 0, "total_memory": 2**36})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "triton_import_problem", lambda: None)
    output = run("doctor")
    assert "Device cuda:1: Some GPU, capability 9.0, 64.0 GiB" in output
    assert "the fused kernels run on this device" in output


# The command itself


@pytest.mark.parametrize("command", [None, "count", "weights", "inspect", "plot", "doctor"])
def test_help(command):
    output = run(*([command] if command else []), "--help")
    assert "Usage: " in output
    if command is None:
        for code in ("0 done", "1 the work", "2 an option", "130 interrupted"):
            assert code in output
        for name in ("count", "weights", "inspect", "plot", "doctor"):
            assert name in output
    elif command == "count":
        assert ".jsonl or .json (one JSON object a line), .parquet, .txt" in output


def test_no_command_shows_help_and_a_wrong_one_is_refused():
    assert "Usage: " in invoke().output
    assert "No such command" in fail(2, "cuont")
    assert run("--version").startswith("pdl-kernels ")


def subprocess_run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_as_a_process(tokenizer):
    Path("corpus.txt").write_text("the cat\nthe mat\n")
    command = ["-m", "pdl_kernels.cli", "count", "corpus.txt", "--tokenizer"]
    done = subprocess_run(*command, tokenizer, "--output", "c.safetensors")
    assert done.returncode == 0, done.stderr
    assert "4 targets in 2 sequences" in done.stdout
    done = subprocess_run(*command, "someone/no-such-model", "--output", "d.safetensors")
    assert done.returncode == 2
    *_, line = done.stderr.strip().splitlines()
    assert line.startswith("error: --tokenizer is someone/no-such-model: there is no such file or folder")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from pdl_kernels import cli; cli.main()"
    done = subprocess_run("-c", code)
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} is not installed: pip install 'pdl-kernels[cli]'\n"


def test_import_of_the_package_loads_nothing_of_the_extra():
    names = ("typer", "rich", "matplotlib", "pyarrow", "transformers", "tokenizers")
    done = subprocess_run("-c", f"import sys, pdl_kernels; print([n for n in {names} if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_a_missing_package_of_one_command(counts, weights, monkeypatch):
    monkeypatch.delitem(sys.modules, "pdl_kernels.weights.plots", raising=False)
    monkeypatch.delattr("pdl_kernels.weights.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = fail(2, "plot", weights, counts, "--output", "plot.png")
    assert message == "error: matplotlib is not installed: pip install 'pdl-kernels[cli]'\n"
