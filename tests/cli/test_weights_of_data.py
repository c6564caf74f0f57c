"""What `pdl-kernels weights` says of counts that cannot be those of training."""

import json
from pathlib import Path

import pytest
from helpers.command_line import TEXTS, fail, run, write_json

from pdl_kernels import TokenCounts, load_weights

PAIRS = [{"prompt": "the cat", "completion": text} for text in TEXTS]


def count(name, tokenizer, *options):
    run("count", name, "--tokenizer", tokenizer, "--output", "c.safetensors", "--overwrite", *options)


def weights(*options):
    return run("weights", "c.safetensors", "--output", "w.safetensors", "--overwrite", *options)


def model(vocab_size, name="model", **more):
    Path(name).mkdir(exist_ok=True)
    Path(name, "config.json").write_text(json.dumps({"vocab_size": vocab_size, **more}))
    return name


def test_eos_that_was_never_counted_is_named(folder, tokenizer):
    write_json("corpus.jsonl", [{"text": text} for text in TEXTS])
    count("corpus.jsonl", folder)
    assert "warning: EOS (id 2) was never counted: if training ends texts with it" in weights()
    assert "warning: EOS (id 2) was never counted" in weights("--tokenizer", folder)
    assert "EOS" not in weights("--tokenizer", folder, "--neutral-special"), "weight 1 was asked for"
    heavy = weights("--unseen", "cap")
    assert heavy.count("was never counted") == 1, "describe tells what it would weigh, and that is enough"
    assert "once per sequence it would hold" in heavy
    count("corpus.jsonl", folder, "--append-eos")
    assert "EOS" not in weights()
    count("corpus.jsonl", tokenizer)  # a tokenizer.json names no EOS
    assert "EOS" not in weights()


def test_labels_remember_the_tokenizer_that_was_given(folder):
    write_json("labels.jsonl", [{"labels": [3, 4, 5]}])
    count("labels.jsonl", folder, "--causal")
    assert "warning: EOS (id 2) was never counted" in weights()
    write_json("labels.jsonl", [{"labels": [3, 4, 2]}])
    count("labels.jsonl", folder, "--causal")
    assert "EOS" not in weights()


def test_special_tokens_among_the_heaviest_are_named(folder):
    write_json("corpus.jsonl", [{"text": "the the the the cat cat cat"}, {"text": "cat cat <eos> the"}])
    count("corpus.jsonl", folder)
    message = weights("--tokenizer", folder)
    assert "special tokens are among the heaviest types: '<eos>', id 2, counted 1 times, weighs" in message
    assert "special tokens are among the heaviest types: id 2, counted 1 times" in weights(), "the counts remember"
    assert "special tokens" not in weights("--tokenizer", folder, "--neutral-special")
    assert "special tokens" not in weights("--alpha", 0), "all weigh the same"
    write_json("corpus.jsonl", [{"text": "the <eos> <eos> <eos> the the mat"}])
    count("corpus.jsonl", folder)
    assert "special tokens" not in weights(), "a frequent one is light"


def test_prompts_and_answers_together_are_named(folder):
    write_json("pairs.jsonl", PAIRS)
    count("pairs.jsonl", folder)
    assert "answers together" not in weights()
    count("pairs.jsonl", folder, "--with-prompts")
    assert "warning: these are counts of prompts and answers together: right where training has a loss on both" in (
        weights()
    )


def test_answers_merged_with_texts_are_named(folder):
    write_json("pairs.jsonl", PAIRS)
    count("pairs.jsonl", folder)
    answers = TokenCounts.load("c.safetensors")
    write_json("corpus.jsonl", [{"text": text} for text in TEXTS])
    count("corpus.jsonl", folder)
    answers.merge(TokenCounts.load("c.safetensors")).save("c.safetensors")
    assert "these are counts of texts and answers together" in weights()


@pytest.mark.parametrize("nested", [False, True])
def test_the_table_becomes_as_long_as_the_output_layer(counts, nested):
    model(8, text_config={"vocab_size": 10}) if nested else model(10)
    output = run("weights", counts, "--model", "model", "--output", "w.safetensors")
    assert len(load_weights("w.safetensors").table) == 10
    assert "warning: the counts end at 8, and the output layer of model has 10 entries" in output


def test_a_table_that_does_not_fit_the_model_is_named(counts):
    model(10)
    smaller = run("weights", counts, "--model", "model", "--vocab-size", 9, "--output", "w.safetensors")
    assert "warning: --vocab-size is 9, smaller than the output layer of model, 10: the loss would refuse" in smaller
    larger = run("weights", counts, "--model", "model", "--vocab-size", 11, "--output", "w.safetensors", "--overwrite")
    assert "--vocab-size is 11, larger than the output layer of model, 10" in larger
    model(8)
    output = run("weights", counts, "--model", "model/config.json", "--output", "w.safetensors", "--overwrite")
    assert "output layer" not in output, "it fits"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--model is model, and there is no file model/config.json"),
        ("{", "model/config.json is no config.json (Expecting property name"),
        ("[]", "model/config.json is no config.json"),
        ("{}", "model/config.json says vocab_size None; accepted is an integer >= 1"),
        ('{"vocab_size": "8"}', "says vocab_size '8'"),
        ('{"vocab_size": 7}', "--model model has an output layer of 7 entries, and the counts are of 8"),
    ],
)
def test_models_that_do_not_tell(counts, content, message):
    Path("model").mkdir()
    if content is not None:
        Path("model/config.json").write_text(content)
    assert message in fail(2, "weights", counts, "--model", "model", "--output", "w.safetensors")
    assert not Path("w.safetensors").exists()
