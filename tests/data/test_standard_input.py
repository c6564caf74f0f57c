"""Standard input, which comes once: it is counted as a file with the same content is, and errors name it."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tokenizers import ANT, BEE, CAT, DOG, EOS, make_tokenizer, make_transformers_tokenizer

from pdl_kernels import TokenCounts
from pdl_kernels.data.corpora import open_corpus

pa = pytest.importorskip("pyarrow")

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
)
ROWS = {
    "texts": [{"text": "ant bee"}, {"text": "dog"}, {"text": "cat cat bee"}] * 60,
    "completions": [{"prompt": "ant ", "completion": "bee cat"}, {"prompt": "bee ", "completion": "dog"}] * 60,
    "chats": [
        {"messages": [{"role": "user", "content": "ant"}, {"role": "assistant", "content": "bee cat"}]},
        {"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]},
    ]
    * 60,
    "labels": [{"labels": [ANT, BEE, -100, CAT]}, {"labels": []}, {"labels": [-100, DOG]}] * 60,
}
# By hand: the tokenizer puts <s> in front, so that all words of a text are targets; EOS follows completions.
EXPECTED = {
    "texts": {ANT: 60, BEE: 120, DOG: 60, CAT: 120},
    "completions": {BEE: 60, CAT: 60, DOG: 60, EOS: 120},
    "chats": {BEE: 60, CAT: 60, DOG: 60},
    "labels": {BEE: 60, CAT: 60, DOG: 60},
}


class Plain:
    """A stream that can only read, as a pipe does: as much as is there."""

    def __init__(self, content, at_once=2**20):
        self.stream, self.at_once = io.BytesIO(content), at_once

    def read(self, size):
        return self.stream.read(min(size, self.at_once))


class Pipe(Plain):
    def read1(self, size):
        return self.read(size)


SOURCES = {
    "bytes": io.BytesIO,
    "buffered": lambda content: io.BufferedReader(io.BytesIO(content)),
    "without read1": Plain,
    "three bytes at a time": lambda content: Pipe(content, 3),
    "three bytes without read1": lambda content: Plain(content, 3),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stdin(monkeypatch):
    """Puts these bytes into standard input."""

    def put(content, source="bytes"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SOURCES[source](content)))

    return put


def pack(rows, form):
    """The bytes of a file of this form."""
    if form.startswith(".txt"):
        content = "\n\n".join(row["text"] for row in rows).encode()
    elif form.startswith(".array"):
        content = json.dumps(rows, indent=1).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form.endswith(".gz"):
        return gzip.compress(content)
    return pa.compress(content, "zstd", asbytes=True) if form.endswith(".zst") else content


def count(corpus, **options):
    options = {"batch_size": 7, "progress": False, **options}
    tokenizer = make_transformers_tokenizer(chat_template=TEMPLATE)
    if corpus.kind == "labels":
        return TokenCounts.from_dataset(corpus.rows, len(tokenizer), corpus.reading.column, **options)
    if corpus.kind == "texts":
        return TokenCounts.from_texts(corpus.rows, tokenizer, **options)
    method = TokenCounts.from_chats if corpus.kind == "chats" else TokenCounts.from_completions
    return method(corpus.rows, tokenizer, **options)


def as_dict(counts):
    return {token: number for token, number in enumerate(counts.counts.tolist()) if number}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ROWS)
def test_it_is_counted_as_a_file_is(stdin, source, kind):
    content = pack(ROWS[kind], ".jsonl")
    Path("rows.jsonl").write_bytes(content)
    stdin(content, source)
    corpus = open_corpus(["-"], form=".jsonl")
    assert (corpus.kind, corpus.resumable) == (kind, False)
    found = count(corpus)
    assert as_dict(found) == EXPECTED[kind]
    assert found.sequences == len(ROWS[kind])
    assert found == count(open_corpus(["rows.jsonl"]))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", [".txt", ".json", ".array"])
def test_it_may_be_of_any_form_of_lines(stdin, source, form, end):
    stdin(pack(ROWS["texts"], form + end), source)
    corpus = open_corpus([Path("-")], form=form.replace("array", "json") + end)
    assert list(corpus.rows) == [row["text"] for row in ROWS["texts"]]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("before", [b"", b"\n", b" \r\n\r\n", b"\xef\xbb\xbf"])
def test_an_array_after_spaces_or_a_byte_order_mark(stdin, source, before):
    stdin(before + pack(ROWS["texts"], ".array"), source)
    assert list(open_corpus(["-"], form=".json").rows) == [row["text"] for row in ROWS["texts"]]


def test_large_input_is_counted_to_its_end(stdin):
    """More than any buffer on the way, and than the rows that are looked at."""
    rows = [{"text": f"ant {'bee ' * 50}"}] * 20_000
    stdin(pack(rows, ".jsonl"), "buffered")
    found = TokenCounts.from_texts(
        open_corpus(["-"], form=".jsonl").rows, lambda text: [0] * text.count("bee"), vocab_size=1, progress=False
    )
    assert (found.total, found.sequences) == (20_000 * 49, 20_000)


@pytest.mark.parametrize("kind", ["texts", "completions", "chats"])
def test_the_first_rows_may_be_null(stdin, kind):
    column = {"texts": "text", "completions": "completion", "chats": "messages"}[kind]
    rows = [ROWS[kind][0] | {column: None}] * 150 + ROWS[kind]
    stdin(pack(rows, ".jsonl"), "three bytes at a time")
    corpus = open_corpus(["-"], form=".jsonl")
    assert corpus.kind == kind
    found = count(corpus, skip_empty=True)
    assert as_dict(found) == EXPECTED[kind]
    assert (found.left_out, found.sequences) == (150, len(ROWS[kind]))
    stdin(pack(rows, ".jsonl"))
    with pytest.raises((TypeError, ValueError), match=r"^standard input, row 0\b.* (null|a NoneType);"):
        count(open_corpus(["-"], form=".jsonl"))


def test_what_is_missing_or_too_much(stdin):
    stdin(pack(ROWS["texts"], ".jsonl"))
    Path("rows.jsonl").write_bytes(pack(ROWS["texts"], ".jsonl"))
    with pytest.raises(
        ValueError, match=r"standard input has no suffix, and --format is missing; accepted are \.jsonl"
    ):
        open_corpus(["-"])
    for form in (".parquet", ".bin", ".csv", "jsonl", ""):
        with pytest.raises(ValueError, match=rf"--format is '{form}'; accepted are \.jsonl, \.json, \.txt"):
            open_corpus(["-"], form=form)
    for names in (["-", "rows.jsonl"], ["rows.jsonl", "-"], ["-", "-"]):
        with pytest.raises(ValueError, match=r"standard input \(-\) comes with other files; accepted is it alone"):
            open_corpus(names, form=".jsonl")


@pytest.mark.parametrize("options", [{"dtype": "uint16"}, {"separator": 0}])
def test_options_of_token_files_are_refused(stdin, options):
    stdin(pack(ROWS["texts"], ".jsonl"))
    with pytest.raises(ValueError, match=rf"--{next(iter(options))} is for \.bin files of token ids"):
        open_corpus(["-"], form=".jsonl", **options)


@pytest.mark.parametrize("good", [1, 300])
@pytest.mark.parametrize(
    ("form", "bad", "message"),
    [
        (".jsonl", b"\n{\n", "line LINE is no JSON"),
        (".jsonl", b"\n[]\n", "line LINE is a JSON list"),
        (".jsonl", b"\ncaf\xe9\n", "line LINE is no UTF-8"),
        (".jsonl", b'\n{"n": 1}\n', "line LINE has no column 'text'"),
        (".jsonl", b'\n{"text": null}\n', "row ROW.* is null; accepted"),
        (".jsonl", b'\n{"text": 5}\n', "row ROW.* int; accepted"),
        (".json", b'{"text": 5', "row ROW is no JSON"),
        (".txt", b"\ncaf\xe9\n", "line LINE is no UTF-8"),
    ],
)
@pytest.mark.parametrize("source", ["bytes", "three bytes at a time"])
def test_errors_name_row_or_line(stdin, good, form, bad, message, source):
    content = b"[" + b'{"text": "ant"},' * good if form == ".json" else b'{"text": "ant"}\n' * good
    stdin(content + bad, source)
    message = message.replace("LINE", str(good + 2)).replace("ROW", str(good))
    with pytest.raises((TypeError, ValueError), match=f"^standard input, {message}"):
        count(open_corpus(["-"], None if form == ".txt" else "text", form=form))


def test_ids_outside_the_vocabulary_and_cut_input(stdin):
    stdin(b'{"labels": [1, 2]}\n\n{"labels": [1, 2, 77]}\n')
    with pytest.raises(IndexError, match=r"^standard input, row 1: labels\[2\] is 77"):
        count(open_corpus(["-"], form=".jsonl"))
    rows = [{"text": f"{number * 7919 % 1000} {number}"} for number in range(20_000)]
    for end in (".gz", ".zst"):
        content = pack(rows, f".jsonl{end}")
        stdin(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"^standard input is damaged after line \d+ "):
            list(open_corpus(["-"], form=f".jsonl{end}").rows)


@pytest.mark.parametrize("form", [".jsonl", ".json", ".txt", ".jsonl.gz"])
def test_nothing_comes(stdin, form):
    stdin(gzip.compress(b"") if form.endswith("gz") else b"")
    with pytest.raises(ValueError, match=r"standard input: there is no text and no label in there"):
        open_corpus(["-"], form=form)


# ---------------------------------------------------------------------------------------------------------------------
# A pipe


def piped(name, *arguments):
    """`cat name | pdl-kernels count - ...`"""
    command = [sys.executable, "-m", "pdl_kernels.cli", "count", "-", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    with subprocess.Popen(["cat", name], stdout=subprocess.PIPE) as cat:
        return subprocess.run(command, stdin=cat.stdout, capture_output=True, text=True, check=False, env=environment)


def test_a_pipe_from_end_to_end():
    make_tokenizer().save("tokenizer.json")
    Path("rows.jsonl").write_bytes(pack(ROWS["texts"], ".jsonl"))
    options = ["--format", "jsonl", "--tokenizer", "tokenizer.json", "--output", "c.safetensors"]
    done = piped("rows.jsonl", *options)
    assert done.returncode == 0, done.stderr
    assert as_dict(TokenCounts.load("c.safetensors")) == EXPECTED["texts"]
    assert "180 sequences" in done.stdout
    assert not list(Path.cwd().glob("*.partial"))


def test_resume_is_refused():
    from helpers.command_line import app
    from typer.testing import CliRunner

    arguments = ["count", "-", "--format", "jsonl", "--vocab-size", "9", "--causal", "--output", "c.safetensors"]
    content = pack(ROWS["labels"], ".jsonl")
    done = CliRunner().invoke(app, [*arguments, "--resume"], input=content, env={"COLUMNS": "400"})
    assert done.exit_code == 2
    assert "standard input comes once, and nothing tells whether it is the same: accepted is no --resume" in done.output
    done = CliRunner().invoke(app, arguments, input=content, env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert as_dict(TokenCounts.load("c.safetensors")) == EXPECTED["labels"]


def test_it_is_read_once(monkeypatch):
    class Pipe:
        buffer = io.BytesIO(b"the cat\n" * 5000)

    monkeypatch.setattr(sys, "stdin", Pipe)
    rows = open_corpus(["-"], form=".txt").rows
    assert len(list(rows)) == 5000
    with pytest.raises(ValueError, match="standard input was read before, and comes once"):
        list(rows)
