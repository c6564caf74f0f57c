"""Every command of the table in docs/weights.md runs as it stands there, on the files of tests/sample_data.py."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.command_line import fail, run

pytest.importorskip("datasets")

import sample_data
from sample_data import ANSWERS, QUESTIONS, STREAM, TEXTS, WORDS

from pdl_kernels import TokenCounts

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "weights.md").read_text()
COMMANDS = [
    line.replace("\\|", "|") for line in re.findall(r"^\|.*\| `(.*pdl-kernels count .*)` \|$", PAGE, re.MULTILINE)
]
EOS, USER, ASSISTANT, START = (WORDS.index(word) for word in ("<|im_end|>", "user", "assistant", "<|im_start|>"))


def ids(text):
    return [WORDS.index(word) if word in WORDS else 0 for word in text.split()]


ENDED = [[*ids(answer), EOS] for answer in ANSWERS]
WHOLE = [
    [START, USER, *ids(question), EOS, START, ASSISTANT, *answer]
    for question, answer in zip(QUESTIONS, ENDED, strict=True)
]
TEXT_TARGETS = [[*ids(text), EOS][1:] for text in TEXTS]
# The targets of each command, by hand; by the file and, where that is not enough, an option.
EXPECTED = {
    "chats.jsonl": ENDED,
    "--whole-chats": [chat[1:] for chat in WHOLE],
    "sharegpt.jsonl": ENDED,
    "pairs.jsonl": ENDED,
    "alpaca.json": ENDED,
    "questions.csv": ENDED,
    "summaries.jsonl": ENDED,
    "corpus.txt": TEXT_TARGETS,
    "corpus.jsonl.gz": TEXT_TARGETS,
    "corpus.jsonl.zst": TEXT_TARGETS,
    "nulls.jsonl": TEXT_TARGETS,
    "-": TEXT_TARGETS,
    "part-*.parquet": [[5, 7], [6, 8, 2]],
    "labels.parquet": [[5, 7], [6, 8, 2]],
    "saved": [[5, 7], [6, 8, 2]],
    "train.bin": [STREAM[1:]],
    "megatron.bin": [STREAM[1:]],
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    sample_data.write_all(folder)
    return folder


def key(words):
    return "--whole-chats" if "--whole-chats" in words else words[words.index("count") + 1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_counts_the_targets(command, samples, monkeypatch):
    monkeypatch.chdir(samples)
    words = shlex.split(command)
    options = [*words[words.index("count") + 1 :], "--output", "counts.safetensors", "--overwrite"]
    if "OWNER/NAME:SPLIT" in words:
        message = fail(2, "count", "someone/data:train", *options[1:])
        assert "the Hugging Face hub did not give a data set" in message
        return
    if "|" in words:
        command = command.replace("pdl-kernels", f"{shlex.quote(sys.executable)} -m pdl_kernels.cli")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            f"{command} --output counts.safetensors --overwrite",
            shell=True, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    else:
        assert run("count", *options).startswith("counting ")
    counts = TokenCounts.load("counts.safetensors")
    expected = Counter(token for row in EXPECTED[key(words)] for token in row)
    assert counts.counts.tolist() == [expected[token] for token in range(counts.vocab_size)]
    assert counts.sequences == 3 or "--causal" in words or "--encoder-decoder" in words
    assert counts.left_out == ("nulls.jsonl" in words)


def test_every_kind_of_sample_is_in_the_table():
    named = {key(shlex.split(command)) for command in COMMANDS}
    assert named == {*EXPECTED, "OWNER/NAME:SPLIT"}


def test_the_samples_are_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "sample_data.py", tmp_path / "new"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chats.jsonl" in done.stdout
