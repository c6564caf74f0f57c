"""pdl-kernels inspect."""

import json
from pathlib import Path

from helpers.command_line import TEXTS, fail, run, write_json

from pdl_kernels import TokenCounts
from pdl_kernels.weights.recipes import weightings


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
    (warning,) = found["warnings"]
    assert warning.startswith("special tokens are among the heaviest types: '<unk>', id 0, counted 3 times, weighs")


def test_inspect_shows_tokens_as_they_are(tokenizer):
    import tokenizers

    # In a table of rich, [red] would be a colour and a line end would break the row.
    made = tokenizers.Tokenizer.from_file(tokenizer)
    made.add_tokens(["[red]", "a\nb"])
    made.save("markup.json")
    write_json("labels.jsonl", [{"labels": [8, 9, 9]}])
    options = ["--column", "labels", "--vocab-size", 10, "--encoder-decoder"]
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
    run("count", "labels.jsonl", "--column", "labels", "--causal", "--vocab-size", 20, "--output", "long.safetensors")
    assert "counts have 20 entries; accepted are at most 8" in fail(2, "inspect", weights, "long.safetensors")
    assert "long.safetensors" in fail(2, "inspect", weights, "long.safetensors", "--tokenizer", "long.safetensors")
