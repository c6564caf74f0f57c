"""What `pdl-kernels count` says of files, rows, options and tokenizers that it cannot take."""

from pathlib import Path

import pytest
from helpers.command_line import fail, files_here, run, write_json, write_parquet

from pdl_kernels import TokenCounts

transformers = pytest.importorskip("transformers")


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
        ('{"text": null}', "corpus.jsonl, line 3: the text is null; accepted is a string; --skip-empty leaves out"),
        ('{"text": 5}', "corpus.jsonl, line 3: the text is of type int; accepted is a string"),
        ('{"text": [3, 4]}', "corpus.jsonl, line 3: the text is of type list; accepted is a string"),
    ],
)
def test_errors_in_json_lines_name_file_and_line(tokenizer, line, message):
    Path("corpus.jsonl").write_text(f'{{"text": "the cat"}}\n\n{line}\n{{"text": "the cat"}}\n')
    found = fail(2, "count", "corpus.jsonl", "--tokenizer", tokenizer, "--output", "c.safetensors")
    assert message in found
    if "no column" in message:
        assert "'txt', 'n'" in found
    assert not [name for name in files_here() if name.startswith("c.")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "corpus.jsonl, line 2 is no JSON (Expecting ',' delimiter)"),
        ('["the cat"]', "corpus.jsonl, line 2 is a JSON list; accepted is one JSON object a line"),
        ('{"txt": "a", "n": 1}', "corpus.jsonl, line 2 has no column 'text'; accepted by --column are those it has"),
        ('{"text": null}', "corpus.jsonl, line 2: the text is null"),
        ('{"text": 5}', "corpus.jsonl has the columns 'text' (int), which cannot be read"),
        ('{"text": [3, 4]}', "column 'text' holds labels, and nothing says whether position 0 of each is a target"),
    ],
)
def test_errors_in_the_first_row(tokenizer, line, message):
    Path("corpus.jsonl").write_text(f'\n{line}\n{{"text": "the cat"}}\n')
    assert message in fail(2, "count", "corpus.jsonl", "--tokenizer", tokenizer, "--output", "c.safetensors")
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
    options = ["--column", "labels", "--causal", "--vocab-size", 8, "--output", "c.safetensors"]
    assert message in fail(2, "count", "labels.jsonl", *options)


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        ({"a": ["x"], "b": [1]}, "text", "has no column 'text'; accepted by --column are those it has: 'a', 'b'"),
        ({"text": [1]}, "text", "column 'text' holds int64; accepted are strings, lists of integers and messages"),
        ({"text": [[0.5]]}, "text", "column 'text' holds list<"),
        (
            {"text": ["the", None]},
            "text",
            "corpus.parquet, row 1: the text is null; accepted is a string; --skip-empty leaves out",
        ),
        ({"text": [[3, None]]}, "text", "corpus.parquet, row 0: text[1] is null inside a list"),
        ({"text": [[0, 8]]}, "text", "corpus.parquet, row 0: text[1] is 8"),
    ],
)
def test_errors_in_parquet(tokenizer, columns, column, message):
    write_parquet("corpus.parquet", columns)
    options = ["--column", column, "--tokenizer", tokenizer, "--output", "c.safetensors"]
    if isinstance(next(iter(columns.values()))[0], list) and columns != {"text": [[0.5]]}:
        options.append("--causal")
    assert message in fail(2, "count", "corpus.parquet", *options)
    assert not [name for name in files_here() if name.startswith("c.")]


def test_columns_that_hold_different_things(tokenizer):
    write_json("a.jsonl", [{"text": "the cat"}])
    write_json("b.jsonl", [{"text": []}, {"text": [3]}])
    message = fail(2, "count", "a.jsonl", "b.jsonl", "--tokenizer", tokenizer, "--output", "c.safetensors")
    assert "column 'text' holds strings in a.jsonl and lists of ids in b.jsonl" in message


def test_errors_of_options_of_count(tokenizer, folder):
    write_json("corpus.jsonl", [{"text": "the cat", "labels": [3, 4]}])
    Path("corpus.txt").write_text("the cat\n")
    Path("taken.safetensors").write_text("precious")
    labels = ("corpus.jsonl", "--column", "labels", "--causal")
    texts = ("corpus.jsonl", "--column", "text")

    def message(*arguments, output="c.safetensors"):
        return fail(2, "count", *arguments, "--output", output)

    assert "corpus.jsonl can be read as texts (`text`) and as labels (`labels`); --kind" in message("corpus.jsonl")
    assert "column 'text' holds texts, and --tokenizer is missing" in message(*texts)
    assert "text holds texts, and --tokenizer is missing" in message("corpus.txt")
    assert "column 'labels' holds labels, and nothing says whether position 0" in message(*labels[:-1])
    assert "column 'labels' holds label ids, and --vocab-size is missing" in message(*labels)
    assert "--append-eos is for texts and completions, and column 'labels' holds labels" in message(
        *labels, "--vocab-size", 8, "--append-eos"
    )
    assert "--special-tokens is for texts" in message(*labels, "--vocab-size", 8, "--no-special-tokens")
    ignored = message(*texts, "--tokenizer", tokenizer, "--ignore-index", 3)
    assert "--ignore-index is for labels, and column 'text' holds texts" in ignored
    assert "--column is 'text', and text files have no columns" in message("corpus.txt", "--column", "text")
    assert f"{tokenizer} names no end-of-text token" in message(*texts, "--tokenizer", tokenizer, "--append-eos")
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
