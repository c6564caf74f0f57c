"""`pdl-kernels count` on files that other programs write: what is read of them is what they hold."""

import gzip
import json
from pathlib import Path

import pytest
import sample_data
from helpers.command_line import fail, files_here, pa, run, write_json, write_parquet

from pdl_kernels import TokenCounts
from pdl_kernels.data import sequences

datasets = pytest.importorskip("datasets")

PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }} {% else %}"
    "{% for part in m.content %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _samples(_in_a_folder_of_its_own):
    sample_data.write_tokenizer(Path())


def count(name, *options):
    run("count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors", "--overwrite", *options)
    return TokenCounts.load("c.safetensors").counts.tolist()


def refused(name, *options):
    message = fail(2, "count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors", *options)
    assert not [file for file in files_here() if file.startswith("c.")]
    return message


def test_contents_of_several_kinds_are_read_as_they_are(tmp_path):
    """`datasets` keeps them as JSON text, which is no text of a message."""
    contents = ("the cat", [{"type": "text", "text": "a dog"}])
    rows = [
        {"messages": [{"role": "user", "content": "who sat"}, {"role": "assistant", "content": c}]} for c in contents
    ]
    write_json("chats.jsonl", rows)
    Path("parts.jinja").write_text(PARTS)
    made = datasets.Dataset.from_json("chats.jsonl", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(made.features)
    made.to_parquet("chats.parquet")
    made.save_to_disk("saved")
    options = ["--whole-chats", "--chat-template", "parts.jinja"]
    expected = count("chats.jsonl", *options)
    assert sum(expected) == 6
    assert count("chats.parquet", *options) == count("saved", *options) == expected


def test_views_of_strings_are_strings():
    write_parquet("view.parquet", {"text": pa.array(["the cat", "a dog"], pa.string_view())})
    assert sum(count("view.parquet")) == 2


def test_a_csv_row_longer_than_its_header_shifts_no_column():
    for name, text in (("all.csv", "a,the cat,x\na,the cat,x\n"), ("one.csv", "a,the cat\na,the cat,x\n")):
        Path(name).write_text(f"prompt,completion\n{text}")
        assert f"error: {name} is damaged or no csv file (" in refused(name)
    assert "its header has 2 fields, and the row after it 3" in refused("all.csv")


def test_a_csv_that_was_cut_short_is_named():
    text = "text\n" + "the cat\n" * 9999
    Path("cut.csv.gz").write_bytes(gzip.compress(text.encode())[:-20])
    assert "error: cut.csv.gz is damaged" in refused("cut.csv.gz")


def test_an_empty_file_without_the_column():
    write_parquet("a.parquet", {"labels": [[5, 6]]})
    write_parquet("b.parquet", {"x": pa.array([], pa.int64())})
    run("count", "?.parquet", "--causal", "--vocab-size", 9, "--output", "c.safetensors")
    assert TokenCounts.load("c.safetensors").total == 1


@pytest.mark.parametrize("row", [{"text": "the \ud800"}, {"prompt": "a ", "completion": "the \ud800"}])
def test_half_a_character_is_named_with_its_place(row):
    good = dict.fromkeys(row, "the cat")
    Path("rows.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in (good, row)))
    assert "error: rows.jsonl, line 2: it holds a lone surrogate, which is no character" in refused("rows.jsonl")


@pytest.mark.parametrize("characters", [1, 2**21])
def test_wrapped_rows_are_wrapped_a_thousand_at_a_time_however_they_are_read(characters, monkeypatch):
    write_json("corpus.jsonl", [{"text": f"the {'cat sat ' * (row % 5)}"} for row in range(2100)])
    options = ["--packing", "wrapped", "--max-length", 7]
    expected = count("corpus.jsonl", *options)
    monkeypatch.setattr(sequences, "BATCH_CHARACTERS", characters)
    assert count("corpus.jsonl", *options) == expected
    rows = [["the", *["cat", "sat"] * (row % 5)] for row in range(2100)]
    targets = 0
    for first in range(0, 2100, 1000):
        length = sum(map(len, rows[first : first + 1000]))
        targets += length - -(-length // 7)  # the first of each sequence is none
    assert sum(expected) == targets
