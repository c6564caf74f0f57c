"""Options, adapters, data and token weights that PDLSFTTrainer refuses."""

import math

import pytest
import torch
from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.trainer_models import relative_error
from helpers.trl_token_weights import TURNS, stream, token_rows
from helpers.trl_trainers import (
    ASSISTANT,
    TEXTS,
    V,
    W,
    batches_of,
    make_trainer,
    of_batches,
    sharp_model,
    train,
    training_marks,
)
from helpers.trl_training import as_dataset, template

from pdl_kernels.integrations.trl import PDLSFTTrainer

pytestmark = training_marks
REFUSED = {
    "dft": ({"loss_type": "dft"}, {}, {}, "loss_type is 'dft'; accepted is 'nll'"),
    "compute_loss_func": ({}, {}, {"compute_loss_func": print}, "compute_loss_func is given, which would take the"),
    "smoothing": ({"label_smoothing_factor": 0.1}, {}, {}, "label_smoothing_factor is 0.1; accepted is 0"),
    "short": ({}, {"weights": W[:-1]}, {}, r"weights have shape \(364,\); accepted is \(365,\), one per row of the"),
    "long": ({}, {"weights": torch.ones(V + 1)}, {}, r"weights have shape \(366,\); accepted is \(365,\)"),
    "negative": ({}, {"weights": -W}, {}, "weights"),
    "column": ({}, {"token_weights": "weight"}, {}, "token_weights is 'weight', which is no column of the data; acc"),
}


@pytest.mark.parametrize(("options", "pdl", "more", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning")
def test_arguments_that_are_refused(options, pdl, more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, TEXTS, pdl=pdl, more=more, **options)


def test_the_columns_there_are(tmp_path):
    with pytest.raises(
        ValueError, match=r"accepted are text, score, .*input_ids, labels, and 'messages' for the weight"
    ):
        make_trainer(tmp_path, [row | {"score": 1.0} for row in TEXTS], pdl={"token_weights": "scores"})


def test_weights_are_asked_for(tmp_path):
    with pytest.raises(TypeError, match="weights"):
        PDLSFTTrainer(sharp_model(), train_dataset=as_dataset(TEXTS), processing_class=make_chat_tokenizer())


def test_lora_on_the_output_layer(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        make_trainer(tmp_path, TEXTS, more={"peft_config": config})


def test_an_output_layer_that_lora_saves(tmp_path):
    """A copy of it trains, in the place of the model's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    trainer, (found,) = train(tmp_path, TEXTS, more={"peft_config": config})
    assert any("lm_head" in name for name in found)
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


@pytest.mark.parametrize("data", ["rows", "stream"])
def test_token_weights_of_data_that_trl_does_not_prepare(data, tmp_path):
    rows = token_rows() if data == "rows" else stream(token_rows(), "of a data set")
    with pytest.raises(ValueError, match="token_weights are given for data that the trainer does not prepare"):
        make_trainer(
            tmp_path, rows, pdl={"token_weights": "u"}, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1
        )


def test_data_that_trl_does_not_prepare(tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in token_rows()]
    trainer, (found,) = train(tmp_path, rows, dataset_kwargs={"skip_prepare_dataset": True})
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0] * 3, "u of a row of train are 3 values; accepted are a number, or 31 numbers"),
        ([1.0] * 30 + [math.nan], "u of a row of train hold nan; accepted are finite numbers"),
    ],
    ids=["length", "nan"],
)
def test_numbers_that_are_refused(weights, words, tmp_path):
    rows = token_rows()
    rows[1]["u"] = weights
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, rows, pdl={"token_weights": "u"})


def test_messages_that_are_refused(tmp_path):
    of_user = [TURNS[1][0] | {"weight": 2.0}, TURNS[1][1]]
    with pytest.raises(
        ValueError, match=r"a message of 'user' has the weight 2\.0; accepted are weights on the assist"
    ):
        make_trainer(tmp_path, [{"messages": of_user}], pdl={"token_weights": "messages"})


def test_a_template_that_is_shown_otherwise_with_markers(tmp_path):
    """Whole chats by Qwen 3's template; TRL's template with markers keeps the thoughts that it leaves out."""
    more = {"processing_class": make_chat_tokenizer("qwen", template("qwen3"))}
    rows = [{"messages": chat} for chat in TURNS]
    with pytest.raises(ValueError, match="the template with generation markers makes other ids than the trainer's"):
        make_trainer(tmp_path, rows, pdl={"token_weights": "messages"}, more=more)
    make_trainer(tmp_path, rows, pdl={"token_weights": "messages"}, more=more, **ASSISTANT)
