"""pdl-kernels weights."""

from pathlib import Path

import pytest
import torch
from helpers.command_line import fail, run

from pdl_kernels import TokenCounts, load_weights
from pdl_kernels.cli import weights as weights_command
from pdl_kernels.weights.recipes import weightings


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
        (["--recipe", "class_balanced", "--beta", 1], "--beta is 1.0; accepted are numbers >= 0 and < 1"),
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
