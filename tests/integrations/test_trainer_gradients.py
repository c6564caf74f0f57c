"""transformers.Trainer with PDL: the gradient of a big batch however a step is cut, of encoder-decoder models, too."""

import pytest
import torch
import torch.nn.functional as F
from helpers.trainer_models import (
    DECODER,
    big_batch_gradients,
    collate,
    make_model,
    make_rows,
    relative_error,
    transformers,
)
from helpers.trainer_runs import W, Watch, by_compute_loss, by_linear_loss, cut, each_route, make_trainer, stock, train

from pdl_kernels.integrations.transformers import PDLCallback

# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@each_route
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_of_a_step(name, pieces, route, tmp_path):
    """Micro-batches of unequal numbers of targets, one of them without any."""
    rows = make_rows(8)
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    _, gradients = train(tmp_path, route, rows, name, settings=cut(8, pieces))
    assert len(gradients) == 1
    assert relative_error(gradients[0], big_batch_gradients(make_model(name), rows, W)) < 1e-5


def mean_of_micro_batches(rows, size):
    """The gradient that a mean over each micro-batch would give."""
    model = make_model("llama")
    parts = [big_batch_gradients(model, rows[i : i + size], W) for i in range(0, len(rows), size)]
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


def test_a_mean_over_micro_batches_would_be_told_apart():
    rows = make_rows(8)
    expected = big_batch_gradients(make_model("llama"), rows, W)
    for pieces in (2, 4, 8):
        assert relative_error(mean_of_micro_batches(rows, 8 // pieces), expected) > 1e-2


@each_route
def test_the_last_window_is_shorter(route, tmp_path):
    rows = make_rows(8)
    settings = cut(3, 3) | {"learning_rate": 0.0}
    _, gradients = train(tmp_path, route, rows, settings=settings)
    windows = [rows[:3], rows[3:6], rows[6:]]
    assert len(gradients) == 3
    for found, window in zip(gradients, windows, strict=True):
        assert relative_error(found, big_batch_gradients(make_model("llama"), window, W)) < 1e-5


@each_route
def test_the_first_label_of_a_row_is_no_target(route, tmp_path):
    """GPT-2, for which the Trainer counts the first label of each row as a target though none predicts it."""
    rows = make_rows(8)
    for row in rows:
        row["labels"][0] = -100
    _, gradients = train(tmp_path, route, rows, "gpt2", settings=cut(8, 4))
    assert relative_error(gradients[0], big_batch_gradients(make_model("gpt2"), rows, W)) < 1e-5


def make_seeing_model():
    """Qwen2.5-VL, whose class says that it takes no number of targets: `accepts_loss_kwargs` is False."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=DECODER | {"rope_parameters": rope}, vision_config=vision)
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).train()


@each_route
def test_a_model_that_is_not_given_the_number_of_targets(route, tmp_path):
    """The gradient is that of the big batch, or training does not begin."""
    rows = make_rows(8)
    model = make_seeing_model()
    assert model.accepts_loss_kwargs is False
    loss, more = route(model)
    watch = Watch()
    callbacks = [watch, PDLCallback(loss)]
    trainer = make_trainer(tmp_path, model, rows, settings=cut(8, 4), callbacks=callbacks, **more)
    refused = ""
    try:
        trainer.train()
    except ValueError as error:
        refused = str(error)
    if "accepts_loss_kwargs" not in refused:
        assert relative_error(watch.gradients[0], big_batch_gradients(make_seeing_model(), rows, W)) < 1e-5


@each_route
def test_without_weights_it_trains_as_the_stock_model(route, tmp_path):
    rows = make_rows(8)
    settings = cut(4, 2)
    ours, gradients = train(tmp_path / "ours", route, rows, weights=None, settings=settings)
    theirs, expected = train(tmp_path / "theirs", stock, rows, settings=settings)
    for found, wanted in zip(gradients, expected, strict=True):
        assert relative_error(found, wanted) < 1e-5
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 2


@each_route
def test_bfloat16(route, tmp_path):
    """Autocast, whose gradient is near; training, evaluating and training on work with accelerate's wrappers."""
    rows = make_rows(8)
    settings = cut(8, 4) | {"bf16": True, "learning_rate": 0.0}
    trainer, gradients = train(tmp_path, route, rows, settings=settings)
    expected = big_batch_gradients(make_model("llama"), rows, W)
    assert relative_error(gradients[0], expected) < 3e-2
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == first


# ---------------------------------------------------------------------------------------------------------------------
# Encoder-decoder models


class Tokenizer:
    padding_side = "right"

    def pad(self, features, **_):
        batch = collate([{**row, "labels": row["input_ids"]} for row in features])
        return {name: value for name, value in batch.items() if name != "labels"}


def pairs(number=8):
    """Rows whose labels are not as many as their inputs."""
    rows = make_rows(number)
    return [{**row, "labels": [label for label in row["labels"] if label != -100]} for row in rows]


def encoder_decoder_gradients(name, rows):
    model = make_model(name)
    batch = dict(transformers.DataCollatorForSeq2Seq(Tokenizer(), model=model)(rows))
    targets = batch.pop("labels")
    total = F.cross_entropy(model(**batch).logits.flatten(0, 1), targets.flatten(), weight=W, reduction="sum")
    (total / targets.ne(-100).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("route", [by_compute_loss, by_linear_loss])
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_seq2seq_trainer(pieces, name, route, tmp_path):
    rows = pairs()
    collator = transformers.DataCollatorForSeq2Seq(Tokenizer(), model=make_model(name))
    settings = cut(8, pieces) | {"predict_with_generate": True, "learning_rate": 0.0}
    trainer, gradients = train(
        tmp_path, route, rows, name, settings=settings, kind=transformers.Seq2SeqTrainer, seq2seq=True,
        data_collator=collator,
    )  # fmt: skip
    assert relative_error(gradients[0], encoder_decoder_gradients(name, rows)) < 1e-5
    plain = make_trainer(
        tmp_path, make_model(name), rows, transformers.Seq2SeqTrainer, settings, True, data_collator=collator
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert (trainer.predict(rows).predictions == plain.predict(rows).predictions).all()
