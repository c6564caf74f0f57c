"""PDLSFTTrainer with another TRL, which computes its loss otherwise: an error, and never another loss."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.trainer_models import relative_error
from helpers.trl_token_weights import token_rows
from helpers.trl_trainers import (
    IGNORED,
    TEXTS,
    V,
    W,
    batches_of,
    logs_of,
    make_trainer,
    of_batches,
    sharp_model,
    train,
    training_marks,
)
from helpers.trl_training import as_dataset, trl
from trl.trainer import sft_trainer

from pdl_kernels.integrations.trl import PDLSFTTrainer

pytestmark = training_marks


def fails_with(folder, words, trainer=PDLSFTTrainer, **options):
    with pytest.raises(RuntimeError, match=words):
        train(folder, TEXTS, trainer, **options)


def targets_of(inputs):
    return inputs["labels"][:, 1:]


def from_the_models_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    return model(**inputs, num_items_in_batch=num_items_in_batch).loss


def from_logits(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """The fused layer is called for metrics alone."""
    with torch.no_grad():
        model(**inputs, fused_lm_head=True)
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1), targets_of(inputs).flatten(), reduction="sum")
    return total / num_items_in_batch


def without_the_denominator(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """A mean over the micro-batch, as TRL had it once."""
    outputs = model(**inputs, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()


def weighted_by_confidence(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs, fused_lm_head=True)
    return -(outputs.log_probs * outputs.log_probs.exp().detach()).sum() / num_items_in_batch


ROUTES = {
    from_the_models_loss: "TRL computed a loss without its fused output layer",
    from_logits: "PDL did not train the model in step 1",
    without_the_denominator: "TRL's loss is .* and the weighted log-probabilities give",
    weighted_by_confidence: "TRL's loss is .* and the weighted log-probabilities give",
}


@pytest.mark.parametrize(("route", "words"), ROUTES.items())
def test_trl_computes_its_loss_another_way(route, words, monkeypatch, tmp_path):
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", route)
    fails_with(tmp_path, words=words)


@pytest.mark.parametrize("pdl", [{"weights": None}, {"weights": torch.ones(V)}], ids=["none", "ones"])
def test_another_denominator_shows_without_weights_too(pdl, monkeypatch, tmp_path):
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", without_the_denominator)
    fails_with(tmp_path, words="TRL's loss is", pdl=pdl)


def test_trl_takes_the_loss_of_the_fused_layer(monkeypatch, tmp_path):
    """It is unweighted, and so it is not there."""

    def route(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, fused_lm_head=True, num_items_in_batch=num_items_in_batch)
        return 1.0 * outputs.loss

    trainer = make_trainer(tmp_path, TEXTS)
    assert trainer.model(**batches_of(trainer)[0], fused_lm_head=True).loss is None
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", route)
    with pytest.raises((RuntimeError, TypeError)):
        trainer.train()


def test_a_loss_that_is_not_a_number_is_not_blamed_on_trl(tmp_path):
    """A model that broke down is logged as in plain SFTTrainer."""
    model = sharp_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    trainer, _ = train(tmp_path, TEXTS, model=model, logging_nan_inf_filter=False)
    assert math.isnan(logs_of(trainer)[0]["loss"])


def test_a_loss_function_by_its_position(tmp_path):
    """It would take the place of PDL."""
    arguments = make_trainer(tmp_path, TEXTS).args
    data, tokenizer = as_dataset(TEXTS), make_chat_tokenizer()

    def loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    with pytest.raises(ValueError, match=r"compute_loss_func is given, .*; accepted is None"):
        PDLSFTTrainer(sharp_model(), arguments, None, data, None, tokenizer, loss, weights=W)


def test_an_evaluation_that_takes_another_way(monkeypatch, tmp_path):
    trainer = make_trainer(tmp_path, TEXTS, more={"eval_dataset": as_dataset(TEXTS)})
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", from_the_models_loss)
    with pytest.raises(RuntimeError, match="TRL computed a loss without its fused output layer"):
        trainer.evaluate()


def test_the_model_gets_no_fused_layer(monkeypatch, tmp_path):
    monkeypatch.setattr(sft_trainer, "add_fused_lm_head", lambda model, **options: None)
    with pytest.raises(RuntimeError, match="SFTTrainer did not give the model a fused output layer; accepted is TRL"):
        make_trainer(tmp_path, TEXTS)


def other_outputs(monkeypatch, change):
    """Have the fused layer return what `change` makes of its outputs."""
    add = sft_trainer.add_fused_lm_head

    def added(model, **options):
        add(model, **options)
        fused = model.forward

        def forward(self, *arguments, **named):
            outputs = fused(*arguments, **named)
            if named.get("fused_lm_head"):
                change(outputs)
            return outputs

        model.forward = types.MethodType(forward, model)

    monkeypatch.setattr(sft_trainer, "add_fused_lm_head", added)


def without(name):
    return lambda outputs: setattr(outputs, name, None)


def compact(outputs):
    """Only the targets, one after the other."""
    outputs.log_probs = outputs.log_probs[outputs.label_mask]


def as_long_as_the_inputs(outputs):
    outputs.log_probs = F.pad(outputs.log_probs, (1, 0))
    outputs.label_mask = F.pad(outputs.label_mask, (1, 0))


@pytest.mark.parametrize(
    "change",
    [without("log_probs"), without("label_mask"), compact, as_long_as_the_inputs],
    ids=["no log_probs", "no label_mask", "compact", "as long as the inputs"],
)
def test_the_fused_layer_returns_something_else(change, monkeypatch, tmp_path):
    other_outputs(monkeypatch, change)
    fails_with(tmp_path, words="TRL's fused output layer returned no log_probs and label_mask of its targets' shape")


def test_the_forward_is_replaced_afterwards(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS)
    del trainer.model.forward
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        trainer.train()


def test_the_fused_layer_is_added_once_more(tmp_path):
    """Over our forward, which then is not called with fused_lm_head=True."""
    trainer = make_trainer(tmp_path, TEXTS)
    sft_trainer.add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "is_top1"))
    with pytest.raises(RuntimeError, match="TRL computed a loss without its fused output layer"):
        trainer.train()


class Another(PDLSFTTrainer):
    """Drops the loss in the end."""

    def compute_loss(self, model, inputs, *arguments, **named):
        super().compute_loss(model, dict(inputs), *arguments, **named)
        return model(**inputs).loss


class Forgetful(PDLSFTTrainer):
    """Keeps token weights from the model."""

    def compute_loss(self, model, inputs, *arguments, **named):
        inputs = {name: value for name, value in inputs.items() if name != "token_weights"}
        return super().compute_loss(model, inputs, *arguments, **named)


def test_token_weights_that_do_not_reach_the_loss(tmp_path):
    with pytest.raises(RuntimeError, match="the batches have token weights that did not reach the loss"):
        train(tmp_path, token_rows(), Forgetful, pdl={"token_weights": "u"})


def test_a_subclass_trains_with_another_loss(tmp_path):
    fails_with(tmp_path, words="its gradient never came back: another loss trains the model", trainer=Another)


def test_the_weights_are_changed_behind_its_back(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS)
    trainer.pdl_loss.set_weights(torch.ones(V))
    with pytest.raises(RuntimeError, match="the loss had other weights in step 1 than it was given"):
        trainer.train()


def test_shifted_labels_need_shifted_token_weights(tmp_path):
    """Context parallelism shifts labels itself; token weights that stay unshifted would belong to other labels."""
    trainer = make_trainer(tmp_path, token_rows(), pdl={"token_weights": "u"})
    batch = batches_of(trainer)[0]
    shifted = F.pad(batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:]
    with pytest.raises(ValueError, match="token_weights"):
        trainer.model(**batch, shift_labels=shifted, fused_lm_head=True)


def test_shifted_labels(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS)
    batch = batches_of(trainer)[0]
    expected = trainer.model(**batch, fused_lm_head=True)
    shifted = F.pad(batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:]
    found = trainer.model(**batch, shift_labels=shifted, fused_lm_head=True)
    assert torch.allclose(found.log_probs[:, :-1], expected.log_probs)
    assert not found.log_probs[:, -1].any()


def test_calls_without_the_fused_layer_are_the_models_own(tmp_path):
    rows = token_rows()
    trainer = make_trainer(tmp_path, rows, pdl={"token_weights": "u"})
    batch = batches_of(trainer)[0]
    plain = sharp_model()
    found, expected = trainer.model(**batch), plain(**{k: v for k, v in batch.items() if k != "token_weights"})
    assert torch.equal(found.logits, expected.logits)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    made = trainer.model.eval().generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(made, plain.eval().generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False))


def test_a_model_that_was_trained_before(tmp_path):
    """Its weights do not come on top of the new ones."""
    model = sharp_model()
    train(tmp_path, TEXTS, model=model, pdl={"weights": torch.full((V,), 7.0)})
    trainer, (found,) = train(tmp_path, TEXTS, model=model)
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5
    _, (plain,) = train(tmp_path, TEXTS, trl.SFTTrainer, model=model)
    assert relative_error(plain, of_batches(trainer, batches_of(trainer), weights=None)[1]) < 1e-5
