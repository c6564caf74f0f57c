"""TokenWeightsCollator: weights follow their labels through the collators of transformers and TRL, or are refused."""

import math

import pytest
import torch
from helpers.chat_tokenizers import tokenizer
from helpers.trainer_models import make_model, transformers, without_weights

from pdl_kernels.integrations.token_weights import TokenWeightsCollator

IGNORED = -100


def unique_rows(lengths=(5, 8, 3)):
    """Rows whose labels are all different, so that each tells which weight belongs to it."""
    rows, weights_of = [], {}
    for number, length in enumerate(lengths):
        ids = [10 + 20 * number + position for position in range(length)]
        weights = [(-1) ** position * (number + position / 8) for position in range(length)]
        masked = min(number, length - 1)
        rows.append(
            {
                "input_ids": ids,
                "labels": [IGNORED] * masked + ids[masked:],
                "attention_mask": [1] * length,
                "token_weights": weights,
            }
        )
        weights_of |= dict(zip(ids, weights, strict=True))
    return rows, weights_of


def assert_weights_on_their_labels(batch, weights_of):
    """Also where padding, separators and masks are."""
    assert batch["token_weights"].dtype == torch.float32
    assert batch["token_weights"].shape == batch["labels"].shape
    expected = [0.0 if label == IGNORED else weights_of[label] for label in batch["labels"].flatten().tolist()]
    assert batch["token_weights"].flatten().tolist() == expected


def assert_nothing_else_changed(batch, plain):
    assert batch.keys() - plain.keys() == {"token_weights"}
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name
        assert torch.as_tensor(batch[name]).dtype == torch.as_tensor(value).dtype, name


def of_trl(**options):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=0, **options)


COLLATORS = {
    "seq2seq": lambda: transformers.DataCollatorForSeq2Seq(tokenizer()),
    "seq2seq, left": lambda: transformers.DataCollatorForSeq2Seq(tokenizer("left")),
    "seq2seq, to 8": lambda: transformers.DataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=8),
    "seq2seq, causal model": lambda: transformers.DataCollatorForSeq2Seq(tokenizer(), model=make_model("llama")),
    "seq2seq, t5": lambda: transformers.DataCollatorForSeq2Seq(tokenizer(), model=make_model("t5")),
    "seq2seq, bart": lambda: transformers.DataCollatorForSeq2Seq(tokenizer(), model=make_model("bart")),
    "seq2seq, bart, left": lambda: transformers.DataCollatorForSeq2Seq(tokenizer("left"), model=make_model("bart")),
    "token classification": lambda: transformers.DataCollatorForTokenClassification(tokenizer()),
    "flattening": lambda: transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "trl": of_trl,
    "trl, padding-free": lambda: of_trl(padding_free=True),
    "trl, to 8": lambda: of_trl(pad_to_multiple_of=8),
}


# ---------------------------------------------------------------------------------------------------------------------
# The collator


@pytest.mark.parametrize("make", COLLATORS.values(), ids=COLLATORS)
def test_weights_follow_their_labels(make):
    rows, weights_of = unique_rows()
    plain = make()(without_weights(rows))
    batch = TokenWeightsCollator(make())(rows)
    assert_weights_on_their_labels(batch, weights_of)
    assert_nothing_else_changed(batch, plain)
    assert batch["labels"].ne(IGNORED).any()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_decoders_inputs_are_those_without_weights(name):
    model = make_model(name)
    rows, _ = unique_rows()
    collate = transformers.DataCollatorForSeq2Seq(tokenizer(), model=model)
    batch = TokenWeightsCollator(collate)(rows)
    expected = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], expected)
    assert batch["decoder_input_ids"].dtype == torch.int64


def test_rows_of_one_length():
    rows, weights_of = unique_rows((6, 6, 6))
    batch = TokenWeightsCollator(transformers.default_data_collator)(rows)
    assert_weights_on_their_labels(batch, weights_of)
    assert_nothing_else_changed(batch, transformers.default_data_collator(without_weights(rows)))


def test_packed_rows_of_trl():
    rows, weights_of = unique_rows((6, 8))
    lengths = [{"seq_lengths": [2, 4]}, {"seq_lengths": [5, 3]}]
    rows = [row | more for row, more in zip(rows, lengths, strict=True)]
    batch = TokenWeightsCollator(of_trl(padding_free=True))(rows)
    assert_weights_on_their_labels(batch, weights_of)
    assert batch["labels"][0, [0, 2, 6, 11]].tolist() == [IGNORED] * 4, "the first token of each sequence"
    assert_nothing_else_changed(batch, of_trl(padding_free=True)(without_weights(rows)))


def test_one_weight_for_an_example():
    rows, weights_of = unique_rows()
    for row, weight in zip(rows, (2, -0.5, 0), strict=True):
        row["token_weights"] = weight
        weights_of |= dict.fromkeys(row["input_ids"], float(weight))
    batch = TokenWeightsCollator(transformers.DataCollatorForSeq2Seq(tokenizer()))(rows)
    assert_weights_on_their_labels(batch, weights_of)


@pytest.mark.parametrize("kind", [torch.tensor, lambda values: torch.tensor(values).numpy()], ids=["torch", "numpy"])
def test_columns_of_tensors(kind):
    rows, weights_of = unique_rows()
    given = [row | {"labels": kind(row["labels"]), "token_weights": kind(row["token_weights"])} for row in rows]
    batch = TokenWeightsCollator(transformers.DataCollatorForSeq2Seq(tokenizer()))(given)
    assert_weights_on_their_labels(batch, weights_of)


def test_examples_without_labels_are_their_own():
    rows, weights_of = unique_rows()
    for row in rows:
        del row["labels"]
    batch = TokenWeightsCollator(of_trl())(rows)
    assert torch.equal(batch["labels"], of_trl()(without_weights(rows))["labels"])
    assert_weights_on_their_labels(batch, weights_of)


def test_another_name_of_the_column():
    rows, weights_of = unique_rows()
    rows = [{name.replace("token_weights", "advantage"): value for name, value in row.items()} for row in rows]
    batch = TokenWeightsCollator(of_trl(), column="advantage")(rows)
    assert "advantage" not in batch
    assert_weights_on_their_labels(batch, weights_of)


def test_the_examples_are_left_alone():
    rows, _ = unique_rows()
    before = [dict(row) for row in rows]
    TokenWeightsCollator(of_trl())(rows)
    assert rows == before


def test_a_batch_without_targets():
    rows, _ = unique_rows()
    for row in rows:
        row["labels"] = [IGNORED] * len(row["labels"])
    batch = TokenWeightsCollator(of_trl())(rows)
    assert batch["labels"].eq(IGNORED).all()
    assert not batch["token_weights"].any()


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses


def collator_of_language_modelling(**options):
    made = tokenizer()
    made.mask_token = "<|im_start|>"
    return transformers.DataCollatorForLanguageModeling(made, **options)


@pytest.mark.parametrize("options", [{"mlm": False}, {"mlm": True, "mlm_probability": 1.0}], ids=["causal", "masked"])
def test_a_collator_that_replaces_labels(options):
    rows, _ = unique_rows((6, 6, 6))
    with pytest.raises(ValueError, match="DataCollatorForLanguageModeling replaces labels by its own, and the token"):
        TokenWeightsCollator(collator_of_language_modelling(**options))(rows)


def test_a_collator_that_changes_the_dtype_of_labels():
    def halve(rows):
        return {"labels": torch.tensor([row["labels"] for row in rows]).float()}

    with pytest.raises(ValueError, match="function replaces labels by its own"):
        TokenWeightsCollator(halve)(unique_rows((6, 6))[0])


def test_a_missing_column():
    rows, _ = unique_rows()
    expected = (
        "example 1 of the batch has no 'token_weights', its columns are input_ids, labels, attention_mask; the Trainer "
        "drops columns that the model does not name: set remove_unused_columns=False"
    )
    with pytest.raises(ValueError, match=expected):
        TokenWeightsCollator(of_trl())([rows[0], *without_weights(rows[1:])])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0] * 7, "are 7 values; accepted are a number, or 8 numbers, one for each label"),
        ([], "are 0 values; accepted are a number, or 8 numbers"),
        ([1.0] * 7 + [math.nan], "hold nan; accepted are finite numbers"),
        (math.inf, "hold inf; accepted are finite numbers"),
        (None, "hold nan; accepted"),
        ("heavy", "are 'heavy'; accepted are numbers"),
        (["x"] * 8, "are .*; accepted are numbers"),
    ],
    ids=str,
)
def test_weights_that_are_refused(weights, words):
    rows, _ = unique_rows()
    rows[1]["token_weights"] = weights
    with pytest.raises(ValueError, match=f"token_weights of example 1 of the batch {words}"):
        TokenWeightsCollator(of_trl())(rows)
