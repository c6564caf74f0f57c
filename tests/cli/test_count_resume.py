"""`pdl-kernels count`, interrupted: what is kept, how it goes on, and when it refuses to."""

import sys
from pathlib import Path

import pytest
from helpers.command_line import WORDS, fail, files_here, pa, run, write_json, write_parquet

from pdl_kernels import TokenCounts
from pdl_kernels.data import inputs, tables

tokenizers = pytest.importorskip("tokenizers")


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
        return "big.parquet", ["--column", "labels", "--causal", "--vocab-size", 8]
    write_json("big.jsonl", [{"text": text, "labels": ids} for text, ids in zip(texts, labels, strict=True)])
    if kind == "json labels":
        return "big.jsonl", ["--column", "labels", "--causal", "--vocab-size", 8]
    return "big.jsonl", ["--kind", "texts", "--tokenizer", "tokenizer.json"]


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
        ("--encoder-decoder", "holds counts of"),
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
    for position in (None, 0, 2_999_999, 1_500_000 // inputs.SAMPLE_BYTES):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        path.write_bytes(changed)
        seen.add(inputs.fingerprint([path]))
    path.write_bytes(content[:-1])
    seen.add(inputs.fingerprint([path]))
    assert len(seen) == 5
