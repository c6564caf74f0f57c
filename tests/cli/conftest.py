"""What the tests of the commands share: a folder of their own, a tokenizer, counts and weights."""

import os

import pytest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _a_wide_terminal(monkeypatch):
    """So that rich breaks no line, whatever ran before.

    `map(num_proc=...)` of datasets puts a copy in the place of `os.environ`, and rich keeps the first one that it saw,
    in which a COLUMNS that is set later does not show.
    """
    console = pytest.importorskip("rich.console")
    monkeypatch.setattr(console.Console, "_environ", os.environ)


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer.json that puts <bos> first, and, as some are saved, cuts and pads."""
    import tokenizers
    from helpers.command_line import WORDS

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
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer.from_file(tokenizer)
    made.no_padding()  # transformers would add a padding token for it
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained("folder")
    return "folder"


@pytest.fixture
def counts(tokenizer):
    from helpers.command_line import TEXTS, run, write_json

    write_json("corpus.jsonl", [{"text": text} for text in TEXTS])
    run("count", "corpus.jsonl", "--tokenizer", tokenizer, "--output", "counts.safetensors")
    return "counts.safetensors"


@pytest.fixture
def weights(counts):
    from helpers.command_line import run

    run("weights", counts, "--output", "weights.safetensors")
    return "weights.safetensors"
