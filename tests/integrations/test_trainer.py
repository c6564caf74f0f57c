"""transformers.Trainer with PDL: the gradient of a big batch however a step is cut, evaluation, logs, and resuming."""

import pytest
import torch
import torch.nn.functional as F
from helpers.trainer_models import (
    DECODER,
    V,
    big_batch_gradients,
    collate,
    make_model,
    make_rows,
    make_weights,
    next_labels,
    relative_error,
    transformers,
)

from pdl_kernels import WeightSchedule
from pdl_kernels.integrations.transformers import PDLCallback, pdl_compute_loss, pdl_loss_function, use_pdl_linear_loss

W = make_weights()


def by_loss_function(model, weights=W, **options):
    model.loss_function = pdl_loss_function(weights, **options)
    return model.loss_function, {}


def by_compute_loss(model, weights=W, **options):
    loss = pdl_compute_loss(weights, **options)
    return loss, {"compute_loss_func": loss}


def by_linear_loss(model, weights=W, **options):
    return use_pdl_linear_loss(model, weights, **options), {}


def stock(model, weights=None):
    return None, {}


ROUTES = [by_loss_function, by_compute_loss, by_linear_loss]
each_route = pytest.mark.parametrize("route", ROUTES)


class Watch(transformers.TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(found)


def make_trainer(folder, model, rows, kind=transformers.Trainer, settings=None, seq2seq=False, **arguments):
    """A Trainer that takes the rows in their order, does not clip, and logs every step."""
    settings = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 3,
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        **(settings or {}),
    }
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    made = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    return kind(
        model,
        args=made(output_dir=str(folder), **quiet, **settings),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=arguments.pop("data_collator", collate),
        **arguments,
    )


def train(folder, route, rows, name="llama", changes=None, weights=W, settings=None, **arguments):
    """Train a new model; (trainer, gradients of each step)."""
    model = make_model(name, **changes or {})
    loss, more = route(model, weights)
    watch = Watch()
    callbacks = [watch] if loss is None else [watch, PDLCallback(loss)]
    trainer = make_trainer(folder, model, rows, settings=settings, callbacks=callbacks, **more, **arguments)
    trainer.train()
    return trainer, watch.gradients


def cut(total, pieces):
    return {"per_device_train_batch_size": total // pieces, "gradient_accumulation_steps": pieces}


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


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and logs


@each_route
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_evaluation_is_that_of_plain_cross_entropy(name, route, tmp_path):
    rows = make_rows(8)
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    wanted = make_trainer(tmp_path, make_model(name), rows).evaluate()["eval_loss"]
    model = make_model(name)
    _, more = route(model, label_smoothing=0.1)
    trainer = make_trainer(tmp_path, model, rows, compute_metrics=metrics, **more)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert seen[0].shape[-1] == V
    weighted = make_model(name)
    _, more = route(weighted, weighted_evaluation=True)
    assert make_trainer(tmp_path, weighted, rows, **more).evaluate()["eval_loss"] != pytest.approx(wanted, rel=1e-2)


def test_evaluation_without_logits(tmp_path):
    rows = make_rows(8)
    wanted = make_trainer(tmp_path, make_model("llama"), rows).evaluate()["eval_loss"]
    model = make_model("llama")
    use_pdl_linear_loss(model, W, evaluation_logits=False)
    assert make_trainer(tmp_path, model, rows).evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)


def statistics_of(rows, model):
    """What the callback logs of these rows, from the logits."""
    batch = collate(rows)
    targets = next_labels(batch["labels"])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits, targets = logits[targets != -100].double(), targets[targets != -100]
    w = W[targets].double()
    nll = F.cross_entropy(logits, targets)
    return {
        "loss": F.cross_entropy(logits, targets, weight=W.double(), reduction="sum") / len(targets),
        "nll": nll,
        "perplexity": nll.exp(),
        "accuracy": (logits.argmax(-1) == targets).double().mean(),
        "mean_weight": w.mean(),
        "effective_sample_share": w.sum().square() / (len(w) * w.square().sum()),
    }


def sharpened(model):
    """Logits that are sometimes right: trained for a while on the rows."""
    rows = make_rows(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(6):
        model(**collate(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@each_route
@pytest.mark.parametrize("every", [1, 2])
def test_logs(every, route, tmp_path):
    """Over the targets of the steps since the last log, whatever the micro-batches."""
    rows = make_rows(8)
    model = sharpened(make_model("llama"))
    expected = [statistics_of(rows[i : i + 4 * every], model) for i in range(0, 8, 4 * every)]
    assert 0.05 < expected[0]["accuracy"] < 0.95
    loss, more = route(model)
    settings = cut(4, 2) | {"learning_rate": 0.0, "logging_steps": every}
    trainer = make_trainer(tmp_path, model, rows, settings=settings, callbacks=[PDLCallback(loss)], **more)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(expected)
    for found, wanted in zip(logs, expected, strict=True):
        if every > 1:  # the Trainer's is the mean over steps
            wanted.pop("loss")
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value.item(), rel=1e-4), name


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


SCHEDULES = {"constant": None, "scheduled": WeightSchedule(W, steps=5)}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def run_six_steps(folder, route, schedule, resume=None, weights=W, seed=5):
    torch.manual_seed(seed)
    loss, more = route(model := make_model("llama", seed=seed), weights)
    watch = Watch()
    settings = {
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
    }
    callbacks = [watch, PDLCallback(loss, schedule=schedule)]
    trainer = make_trainer(folder, model, make_rows(8), settings=settings, callbacks=callbacks, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch.gradients


@pytest.mark.trainers
@each_route
@each_schedule
def test_resuming(schedule, route, tmp_path):
    """Three steps, and three more with everything made anew, are six: gradients, parameters and logs."""
    whole, expected = run_six_steps(tmp_path, route, schedule)
    resumed, found = run_six_steps(tmp_path, route, schedule, str(tmp_path / "checkpoint-3"), seed=6)
    assert len(expected) == 6
    assert len(found) == 3
    for one, other in zip(found, expected[3:], strict=True):
        assert relative_error(one, other) < 1e-6
    for (name, one), other in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max(), name
    logs = [[entry for entry in trainer.state.log_history if "nll" in entry] for trainer in (whole, resumed)]
    assert len(logs[0]) == len(logs[1]) == 6
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "nll", "accuracy", "mean_weight", "effective_sample_share"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    if schedule is not None:
        assert logs[0][0]["mean_weight"] == 1
        assert len({entry["mean_weight"] for entry in logs[0]}) == 6, "the weights are other ones in every step"


@pytest.mark.trainers
@each_route
@each_schedule
def test_weights_of_a_checkpoint(schedule, route, tmp_path):
    """They are those of the end of the schedule, and training goes on with them, and with no others."""
    run_six_steps(tmp_path, route, schedule)
    halfway = tmp_path / "checkpoint-3"
    loss, _ = route(make_model("llama"), halfway)
    assert torch.equal(loss.table, W)
    run_six_steps(tmp_path, route, schedule, str(halfway), halfway)
    with pytest.raises(ValueError, match=r"goes on at step 3 with other weights than .*checkpoint-3"):
        run_six_steps(tmp_path, route, None, str(halfway), W.flip(0))


@pytest.mark.trainers
@pytest.mark.filterwarnings("error:training goes on at step")
def test_a_checkpoint_in_another_folder(tmp_path):
    """It is the one that is named, and its weights are held against those that are given."""
    run_six_steps(tmp_path, by_loss_function, None)
    halfway = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"goes on at step 3 with other weights than .*checkpoint-3"):
        run_six_steps(tmp_path / "other", by_loss_function, None, halfway, W.flip(0))
    run_six_steps(tmp_path / "other", by_loss_function, None, halfway)
