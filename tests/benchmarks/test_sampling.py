import json

import pytest
from helpers.tokenizers import make_transformers_tokenizer

from benchmarks import sampling


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer"
    make_transformers_tokenizer(bos=False).save_pretrained(path)
    return path


def run(tmp_path, tokenizer, lines, batch):
    corpus, output = tmp_path / "corpus.txt", tmp_path / "out" / "sampling.json"
    corpus.write_text("".join(f"{line}\n" for line in lines))
    arguments = [str(corpus), "--tokenizer", str(tokenizer), "--batch", str(batch), "--hidden", "8", "--rounds", "1"]
    return sampling.main([*arguments, "--share", "0.5", "--output", str(output)]), output


def test_heavier_weights_leave_out_more_rows(tmp_path, tokenizer, capsys):
    code, output = run(tmp_path, tokenizer, ["ant bee", *["ant cat cat cat cat cat cat cat"] * 60], 64)
    record = json.loads(output.read_text())
    left_out = {row["alpha"]: row["left_out"] for row in record["rows"]}
    assert code == 0
    assert record["targets"] == 2 + 60 * 8  # all but each line's first, and an end after each
    assert 0 <= left_out[0.4] <= left_out[0.75] < left_out[1.0] < 1
    assert "times as fast" in capsys.readouterr().out


def test_too_few_targets(tmp_path, tokenizer, capsys):
    code, output = run(tmp_path, tokenizer, ["ant bee"], 64)
    assert code == 2
    assert "has 2 targets; accepted are at least as many as --batch, 64" in capsys.readouterr().err
    assert not output.exists()
