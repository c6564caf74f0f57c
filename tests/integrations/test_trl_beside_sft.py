"""PDLSFTTrainer beside plain SFTTrainer: the same steps without weights, the same metrics and evaluation, and logs."""

import math

import pytest
import torch
from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.trl_trainers import (
    ASSISTANT,
    IGNORED,
    PACKED,
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
from helpers.trl_training import PAIRS, ROWS, WRITTEN, as_dataset, trl

from pdl_kernels import PowerLawWeighting, TokenCounts
from pdl_kernels.integrations.trl import PDLSFTTrainer

pytestmark = training_marks
PDL_LOGS = {"nll", "perplexity", "accuracy", "mean_weight", "effective_sample_share"}
TRL_LOGS = ("entropy", "mean_token_accuracy", "num_tokens")
LONG = {"max_length": 40}


# ---------------------------------------------------------------------------------------------------------------------
# Beside plain SFTTrainer


def train_both(folder, rows, pdl, **options):
    """What SFTTrainer and PDLSFTTrainer log, and the gradients of their steps."""
    return [
        train(folder, rows, kind, pdl=pdl, **options) for kind, pdl in ((trl.SFTTrainer, None), (PDLSFTTrainer, pdl))
    ]


@pytest.mark.parametrize(
    ("rows", "options"),
    [(WRITTEN, {}), (ROWS, ASSISTANT | PACKED), (TEXTS, {"gradient_checkpointing": True})],
    ids=["completions", "bfd", "checkpointing"],
)
def test_without_weights_it_is_sft(rows, options, tmp_path):
    """Bit by bit, over several steps that change the model."""
    several = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "num_train_epochs": 2}
    (plain, expected), (ours, found) = train_both(tmp_path, rows, {"weights": None}, **options | several)
    assert len(found) == len(expected) > 1
    for step, other in zip(found, expected, strict=True):
        assert step.keys() == other.keys()
        assert all(torch.equal(step[name], other[name]) for name in step)
    for entry, other in zip(logs_of(ours), logs_of(plain), strict=True):
        assert {name: value for name, value in entry.items() if name not in PDL_LOGS} == other
    assert not torch.equal(ours.model.lm_head.weight, sharp_model().lm_head.weight)


@pytest.mark.parametrize("options", [{}, PACKED, {"padding_free": True}], ids=["padded", "bfd", "padding-free"])
def test_the_metrics_of_trl_are_unweighted(options, tmp_path):
    rows = [*TEXTS, {"text": "it" + " it" * 12}]  # a model with tied embeddings says again what it read
    (plain, _), (ours, _) = (
        train(tmp_path, rows, kind, model=sharp_model("llama tied"), **options | {"gradient_accumulation_steps": 16})
        for kind in (trl.SFTTrainer, PDLSFTTrainer)
    )
    first, other = logs_of(ours)[0], logs_of(plain)[0]
    assert [first[name] for name in TRL_LOGS] == [other[name] for name in TRL_LOGS]
    assert 0 < first["mean_token_accuracy"] < 1
    assert first["loss"] != pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"eval_packing": True, "packing": True, "max_length": 20}], ids=str)
def test_evaluation_is_unweighted(options, tmp_path):
    losses = []
    for kind, pdl in ((trl.SFTTrainer, None), (PDLSFTTrainer, {"token_weights": "u"})):
        rows = [row | {"u": -2.0} for row in WRITTEN]
        more = {"eval_dataset": as_dataset(rows[:4])}
        found = make_trainer(tmp_path, rows, kind, pdl=pdl, more=more, **options).evaluate()
        losses.append({name: value for name, value in found.items() if "per_second" not in name and "time" not in name})
    assert losses[0] == losses[1]
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= losses[0].keys()


@pytest.mark.parametrize("token_weights", [None, "u"])
def test_weighted_evaluation(token_weights, tmp_path):
    rows = [row | {"u": 0.5 - number} for number, row in enumerate(WRITTEN)]
    pdl = {"weighted_evaluation": True, "token_weights": token_weights}
    more = {"eval_dataset": as_dataset(rows)}
    trainer = make_trainer(tmp_path, rows, pdl=pdl, more=more, per_device_eval_batch_size=8)
    found = trainer.evaluate()
    data = trainer.eval_dataset
    expected, _ = of_batches(trainer, [trainer.data_collator([data[row] for row in range(len(data))])])
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_between_steps(tmp_path):
    """It is not taken for training: neither logs nor checks see it."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 1}
    trainer, steps = train(tmp_path, TEXTS, more={"eval_dataset": as_dataset(TEXTS)}, **options)
    assert len(steps) == 4
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len({entry["eval_loss"] for entry in evaluated}) == 1
    assert len(logs_of(trainer)) == 4
    assert not evaluated[0].keys() & PDL_LOGS


def test_metrics_of_logits(tmp_path):
    """TRL makes logits for them in another call."""
    shapes = []

    def metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"one": 1.0}

    rows = [row | {"u": 2.0} for row in WRITTEN]
    more = {"eval_dataset": as_dataset(rows), "compute_metrics": metrics}
    found = make_trainer(tmp_path, rows, pdl={"token_weights": "u"}, more=more, per_device_eval_batch_size=8).evaluate()
    plain = make_trainer(tmp_path, rows, trl.SFTTrainer, more={"eval_dataset": as_dataset(rows)})
    assert found["eval_one"] == 1.0
    assert found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=0.2)
    ((logits, labels),) = shapes
    assert logits == (*labels, V)


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def test_logs(tmp_path):
    trainer, _ = train(tmp_path, WRITTEN, per_device_train_batch_size=6, gradient_accumulation_steps=1)
    (log,) = logs_of(trainer)
    nll, _ = of_batches(trainer, batches_of(trainer), weights=None)
    targets = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches_of(trainer)])
    w = W[targets[targets != IGNORED]]
    assert log["nll"] == pytest.approx(nll, rel=1e-5)
    assert log["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert log["accuracy"] == pytest.approx(log["mean_token_accuracy"], rel=1e-5)
    assert log["mean_weight"] == pytest.approx(w.mean().item(), rel=1e-5)
    assert log["effective_sample_share"] == pytest.approx((w.sum() ** 2 / (len(w) * w.square().sum())).item(), rel=1e-5)


def count_chats(rows, tokenizer, **options):
    return TokenCounts.from_chats(rows, tokenizer, progress=False, **options)


def count_completions(rows, tokenizer, **options):
    return TokenCounts.from_completions(rows, tokenizer, progress=False, **options)


@pytest.mark.parametrize(
    ("count", "rows", "options", "counted"),
    [
        (count_chats, ROWS, ASSISTANT, ASSISTANT),
        (count_chats, ROWS, {}, {"assistant_only_loss": False}),
        (count_completions, WRITTEN, {}, {}),
        (count_completions, PAIRS, {}, {}),
        (count_chats, ROWS, ASSISTANT | PACKED | LONG, ASSISTANT | {"packing": "bfd"} | LONG),
    ],
    ids=["chats, assistant", "chats", "completions", "completions of messages", "bfd"],
)
@pytest.mark.filterwarnings("error:.*never_counted.*|.*counts do not hold.*")
def test_counts_of_what_it_trains_on(count, rows, options, counted, tmp_path):
    """Weights of these counts have mean 1 over the targets of an epoch, and no target is of a type never counted."""
    counts = count(rows, make_chat_tokenizer(), **counted)
    weighting = PowerLawWeighting()
    pdl = {"weights": weighting.table(counts, V), "counts": counts, "weighting": weighting}
    trainer, _ = train(tmp_path, rows, pdl=pdl, **{"gradient_accumulation_steps": 16} | options)
    targets = sum(int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in batches_of(trainer))
    assert counts.total == targets
    assert logs_of(trainer)[0]["mean_weight"] == pytest.approx(1, abs=1e-5)
    assert len(set(pdl["weights"].tolist())) > 3


def test_counts_of_other_data_are_noticed(tmp_path):
    counts = count_completions(WRITTEN[:1], make_chat_tokenizer())
    pdl = {"weights": PowerLawWeighting().table(counts, V), "counts": counts}
    with pytest.warns(UserWarning, match="of the targets are of types that the counts do not hold"):
        train(tmp_path, TEXTS, pdl=pdl)
