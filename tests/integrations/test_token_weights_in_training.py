"""Weights of examples and tokens, from a column of the data to the gradient of transformers' Trainer."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.chat_tokenizers import make_chat_tokenizer, tokenizer
from helpers.trainer_models import (
    Gradients,
    V,
    make_model,
    make_rows,
    make_weights,
    relative_error,
    sharp_model,
    transformers,
    without_weights,
)
from helpers.trl_training import CHATS, WEATHER, assistant, template, trl, user
from torch import nn

from pdl_kernels.integrations.token_weights import TokenWeightsCollator, chat_token_weights
from pdl_kernels.integrations.transformers import PDLCallback, pdl_compute_loss, pdl_loss_function, use_pdl_linear_loss

pytestmark = pytest.mark.usefixtures("quick")
IGNORED = -100
W = make_weights()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def weighted_rows(kind="tokens", number=8):
    generator = torch.Generator().manual_seed(7)
    rows = make_rows(number)
    for row in rows:
        drawn = torch.randn(len(row["labels"]), generator=generator)
        drawn[::4] = 0
        row["token_weights"] = drawn.tolist() if kind == "tokens" else drawn[1].item()
    assert any(row["token_weights"] < 0 for row in rows) if kind == "examples" else True
    return rows


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


def arguments_of(folder, **options):
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "max_grad_norm": 0.0,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            **options,
        }
    )


def make_trainer(folder, model, rows, collate=None, callbacks=(), compute_loss_func=None, evaluated=None, **options):
    if collate is None:
        seq2seq = model if model.config.is_encoder_decoder else None
        collate = TokenWeightsCollator(transformers.DataCollatorForSeq2Seq(tokenizer(), model=seq2seq))
    return transformers.Trainer(
        model,
        arguments_of(folder, **options),
        train_dataset=Rows(rows),
        eval_dataset=None if evaluated is None else Rows(evaluated),
        data_collator=collate,
        callbacks=list(callbacks),
        compute_loss_func=compute_loss_func,
    )


def expected_gradients(model, rows, weights=W):
    """Of sum_i w(y_i) u_i ce_i / n, row by row, without padding and without anything of the package."""
    number = total = 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        factors = torch.as_tensor(row["token_weights"]).expand(len(labels))
        if model.config.is_encoder_decoder:
            logits = model(input_ids=ids, labels=labels[None]).logits[0]
        else:
            logits = model(input_ids=ids).logits[0, :-1]
            labels, factors = labels[1:], factors[1:]
        per_token = F.cross_entropy(logits, labels, weight=weights, reduction="none")
        total = total + (per_token * factors).sum()
        number += int(labels.ne(IGNORED).sum())
    (total / number).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total.item() / number, found


def with_loss_function(model):
    model.loss_function = pdl_loss_function(W)
    return model.loss_function


def without_logits(model):
    return use_pdl_linear_loss(model, W)


ROUTES = {
    "loss function, llama": (with_loss_function, "llama"),
    "no logits, llama": (without_logits, "llama"),
    "no logits, t5": (without_logits, "t5"),
    "no logits, bart": (without_logits, "bart"),
}
each_route = pytest.mark.parametrize(("prepare", "name"), ROUTES.values(), ids=ROUTES)


@each_route
@pytest.mark.parametrize("kind", ["tokens", "examples"])
def test_the_gradient_of_a_step(prepare, name, kind, tmp_path):
    rows = weighted_rows(kind)
    loss, expected = expected_gradients(sharp_model(name), rows)
    ones = [row | {"token_weights": 1.0} for row in rows]
    assert relative_error(expected_gradients(sharp_model(name), ones)[1], expected) > 0.1, "they would not show"
    model, gradients = sharp_model(name), Gradients()
    pdl = prepare(model)
    trainer = make_trainer(tmp_path, model, rows, callbacks=[gradients, PDLCallback(pdl)])
    trainer.train()
    assert len(gradients.steps) == 1
    assert relative_error(gradients.steps[0], expected) < 1e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@each_route
def test_evaluation_is_without_them(prepare, name, tmp_path):
    rows = weighted_rows()
    plain = transformers.Trainer(
        sharp_model(name),
        arguments_of(tmp_path),
        eval_dataset=Rows(without_weights(rows)),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer()),
    ).evaluate()
    model = sharp_model(name)
    prepare(model)
    found = make_trainer(tmp_path, model, rows, evaluated=rows).evaluate()
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


def test_a_flattened_batch(tmp_path):
    rows = weighted_rows()
    _, expected = expected_gradients(sharp_model("llama"), rows)
    model, gradients = sharp_model("llama"), Gradients()
    pdl = without_logits(model)
    collate = TokenWeightsCollator(transformers.DataCollatorWithFlattening())
    make_trainer(tmp_path, model, rows, collate, callbacks=[gradients, PDLCallback(pdl)]).train()
    assert relative_error(gradients.steps[0], expected) < 1e-5


def test_rows_padded_on_the_left(tmp_path):
    rows = weighted_rows()
    _, expected = expected_gradients(sharp_model("llama"), rows)
    model, gradients = sharp_model("llama"), Gradients()
    with_loss_function(model)
    collate = TokenWeightsCollator(transformers.DataCollatorForSeq2Seq(tokenizer("left")))
    make_trainer(tmp_path, model, rows, collate, callbacks=[gradients]).train()
    assert relative_error(gradients.steps[0], expected) < 1e-5


def test_weights_that_do_not_reach_the_loss(tmp_path):
    """compute_loss_func gets labels alone."""
    pdl = pdl_compute_loss(W)
    trainer = make_trainer(
        tmp_path, sharp_model("llama"), weighted_rows(), callbacks=[PDLCallback(pdl)], compute_loss_func=pdl
    )
    with pytest.raises(RuntimeError, match="the batches have token weights that did not reach the loss"):
        trainer.train()


def test_weights_that_do_not_reach_the_loss_of_some_batches(tmp_path):
    """Also where another forward drops them now and then."""
    model = sharp_model("llama")
    pdl = with_loss_function(model)

    class Forgetful(transformers.Trainer):
        forgotten = 0

        def compute_loss(self, model, inputs, *arguments, **named):
            Forgetful.forgotten += 1
            if Forgetful.forgotten == 3:
                inputs = {name: value for name, value in inputs.items() if name != "token_weights"}
            return super().compute_loss(model, inputs, *arguments, **named)

    trainer = Forgetful(
        model,
        arguments_of(tmp_path),
        train_dataset=Rows(weighted_rows()),
        data_collator=TokenWeightsCollator(transformers.DataCollatorForSeq2Seq(tokenizer())),
        callbacks=[PDLCallback(pdl)],
    )
    with pytest.raises(RuntimeError, match="the batches have token weights that did not reach the loss"):
        trainer.train()


def test_the_trainer_dropped_the_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    model = sharp_model("llama")
    with_loss_function(model)
    trainer = make_trainer(tmp_path, model, [], remove_unused_columns=True)
    trainer.train_dataset = datasets.Dataset.from_list(weighted_rows())
    with pytest.raises(ValueError, match="set remove_unused_columns=False"):
        trainer.train()


def test_a_data_set_of_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = weighted_rows()
    _, expected = expected_gradients(sharp_model("llama"), rows)
    model, gradients = sharp_model("llama"), Gradients()
    pdl = with_loss_function(model)
    trainer = make_trainer(tmp_path, model, rows, callbacks=[gradients, PDLCallback(pdl)])
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    trainer.train()
    assert relative_error(gradients.steps[0], expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Chats


def test_weights_of_a_chat():
    chat = [WEATHER[0], WEATHER[1] | {"weight": -2.0}, user("And in the north?"), assistant("Whatever it is today.")]
    made = make_chat_tokenizer()
    weights = chat_token_weights(chat, made)
    encoded = made.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    assert len(weights) == len(encoded["input_ids"])
    first = encoded["assistant_masks"].index(1)
    length = encoded["assistant_masks"][first:].index(0)
    assert weights == [1.0] * first + [-2.0] * length + [1.0] * (len(weights) - first - length)


def test_a_chat_without_weights():
    made = make_chat_tokenizer()
    assert chat_token_weights(CHATS[1], made) == [1.0] * len(made.apply_chat_template(CHATS[1])["input_ids"])


def test_options_of_the_template():
    made = make_chat_tokenizer()
    chat = [WEATHER[0], WEATHER[1] | {"weight": 3.0}]
    weights = chat_token_weights(chat, made, chat_template_kwargs={"style": "brief"})
    assert len(weights) == len(made.apply_chat_template(chat, style="brief")["input_ids"])
    assert weights.count(3.0) == chat_token_weights(chat, made).count(3.0)


def test_a_template_that_training_replaces_by_another():
    """Qwen3's own makes fewer ids than the one with markers: the factors would belong to other tokens."""
    chat = [*WEATHER, user("And in the north?"), assistant("Whatever it is today.") | {"weight": 2.0}]
    with pytest.raises(ValueError, match="makes other ids"):
        chat_token_weights(chat, make_chat_tokenizer("llama", template("qwen3")))


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3_training"])
def test_as_many_as_the_tokenizer_makes_ids(name):
    made = make_chat_tokenizer("llama", template(name))
    chat = [*WEATHER, user("And in the north?"), assistant("Whatever it is today.") | {"weight": 2.0}]
    assert len(chat_token_weights(chat, made)) == len(made.apply_chat_template(chat)["input_ids"])


def test_chats_that_are_refused():
    made = make_chat_tokenizer()
    with pytest.raises(ValueError, match="a message of 'user' has the weight 2; accepted are weights on the"):
        chat_token_weights([WEATHER[0] | {"weight": 2}, WEATHER[1]], made)
    with pytest.raises(ValueError, match=r"has no \{% generation %\} markers"):
        chat_token_weights(WEATHER, make_chat_tokenizer(chat_template="{{ messages[0].content }}"))


def test_chats_train_with_their_weights(tmp_path):
    """`chat_token_weights` is as long as what a map over the data set makes of the chat."""
    made = make_chat_tokenizer()
    chats = [
        [chat[0], assistant("Yes.") | {"weight": weight}] for chat, weight in zip(CHATS[1:4], (2, -1, 0), strict=True)
    ]
    rows = []
    for chat in chats:
        ids = made.apply_chat_template(chat)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids, "token_weights": chat_token_weights(chat, made)})
    assert max(id for row in rows for id in row["input_ids"]) < len(made)
    assert {weight for row in rows for weight in row["token_weights"]} == {1.0, 2, -1, 0}
    model, gradients = make_model("llama", vocab_size=len(made)), Gradients()
    weights = 0.5 + torch.rand(len(made))
    _, expected = expected_gradients(model, rows, weights)
    model.loss_function = pdl_loss_function(weights)
    make_trainer(tmp_path, model, rows, callbacks=[gradients]).train()
    assert relative_error(gradients.steps[0], expected) < 1e-5


def test_what_these_tests_train_on():
    """Uneven numbers of targets in the micro-batches, and weights of both signs and 0 on targets."""
    rows = weighted_rows()
    assert len({sum(label != IGNORED for label in row["labels"]) for row in rows}) > 3
    pairs = [pair for row in rows for pair in zip(row["labels"][1:], row["token_weights"][1:], strict=True)]
    signs = {math.copysign(1, u) if u else 0 for label, u in pairs if label != IGNORED}
    assert signs == {-1, 0, 1}
    assert len(tokenizer()) >= V
    assert isinstance(make_model("t5").get_output_embeddings(), nn.Linear)
    assert trl is not None
