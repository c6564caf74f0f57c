"""PDLCallback over several trainings: checkpoints, reporters, callbacks given twice, evaluation between steps."""

import warnings

import pytest
import torch
from helpers.trainer_callbacks import EAGER, ROWS, logs_of, watched, without_hook
from helpers.trainer_models import big_batch_gradients, make_model, relative_error, transformers
from helpers.trainer_runs import W, Watch, by_linear_loss, by_loss_function, each_route, make_trainer

from pdl_kernels import WeightSchedule
from pdl_kernels.integrations.transformers import PDLCallback
from pdl_kernels.weights.saved import load_weights

pytestmark = pytest.mark.usefixtures("quick")
NUMBERS = ("nll", "perplexity", "accuracy", "mean_weight", "effective_sample_share")
SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 1}


def trained(folder, route=by_loss_function, resume=None, **options):
    trainer, *_ = watched(folder, route, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def numbers_of(trainer):
    return [[entry[name] for name in ("loss", *NUMBERS)] for entry in logs_of(trainer)]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@each_route
def test_a_checkpoint_without_the_callback(route, tmp_path):
    """Training goes on, with a warning: nobody knows the weights it began with."""
    model = make_model("llama", num_hidden_layers=1)
    _, more = route(model, W, **EAGER)
    make_trainer(tmp_path, model, ROWS, settings=SAVING | {"max_steps": 2}, **more).train()
    halfway = str(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match="training goes on at step 2, and its checkpoint was not written with PDLCall"):
        trainer = trained(tmp_path, route, halfway, settings={"max_steps": 4})
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(("before", "after"), [(W, W.flip(0)), (W, None), (None, W)], ids=["other", "none", "some"])
def test_a_checkpoint_with_other_weights(before, after, tmp_path):
    trained(tmp_path, weights=before, settings=SAVING | {"max_steps": 2})
    halfway = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="goes on at step 2 with other weights than its checkpoint-2 was written with"):
        trained(tmp_path, resume=halfway, weights=after, settings={"max_steps": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert trained(tmp_path, resume=halfway, weights=before, settings={"max_steps": 4}).state.global_step == 4


def test_a_checkpoint_that_restores_the_states_of_callbacks(tmp_path):
    """The weights of the callback are among them, and stay what they are."""
    settings = SAVING | {"restore_callback_states_from_checkpoint": True, "logging_steps": 1}
    trained(tmp_path, settings=settings | {"max_steps": 2})
    halfway = str(tmp_path / "checkpoint-2")
    trainer = trained(tmp_path, resume=halfway, settings=settings | {"max_steps": 4})
    assert [entry["step"] for entry in logs_of(trainer) if "nll" in entry] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="goes on at step 2 with other weights"):
        trained(tmp_path, resume=halfway, weights=W.flip(0), settings=settings | {"max_steps": 4})


@each_route
def test_training_that_goes_on_is_checked_from_its_first_step(route, tmp_path):
    trained(tmp_path, route, settings=SAVING | {"max_steps": 6})
    trainer, loss, _ = watched(tmp_path, route, settings={"max_steps": 12})
    without_hook(route, trainer, loss)()
    with pytest.raises(RuntimeError, match="PDL did not train the model in step 7: "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("weights", [W, torch.ones(len(W))], ids=["its last weights", "its first weights"])
def test_what_a_checkpoint_holds(weights, tmp_path):
    """The weights of the end of a schedule, whatever the loss began with; of a loss without weights, nothing."""
    schedule = WeightSchedule(W, steps=5)
    trained(tmp_path / "with", weights=weights, settings=SAVING | {"max_steps": 2}, pdl={"schedule": schedule})
    assert torch.equal(load_weights(tmp_path / "with" / "checkpoint-2" / "pdl_weights.safetensors").table, W)
    trained(tmp_path / "without", weights=None, settings=SAVING | {"max_steps": 2})
    assert not list((tmp_path / "without").glob("checkpoint-2/pdl_*"))


@each_route
def test_the_best_model_is_loaded_at_the_end(route, tmp_path):
    settings = SAVING | EVALUATING | {"eval_steps": 2, "load_best_model_at_end": True, "max_steps": 6}
    trainer = trained(tmp_path, route, settings=settings)
    best = trainer.state.best_model_checkpoint
    assert best is not None
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(trainer.state.best_metric, rel=1e-6)
    plain = make_model("llama", num_hidden_layers=1)
    plain.load_state_dict(transformers.LlamaForCausalLM.from_pretrained(best).state_dict())
    assert make_trainer(tmp_path, plain, ROWS).evaluate()["eval_loss"] == pytest.approx(found, rel=1e-6)
    trainer.train()
    assert trainer.state.global_step == 6


# ---------------------------------------------------------------------------------------------------------------------
# Reporters, and callbacks that are given twice


def test_tensorboard_has_the_numbers(tmp_path):
    """Its own files, read back; it joined the callbacks first."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    reporter = transformers.integrations.TensorBoardCallback(SummaryWriter(tmp_path / "events"))
    settings = {"logging_steps": 2, "max_steps": 4}
    trainer, *_ = watched(tmp_path, by_linear_loss, callbacks=[reporter], settings=settings)
    trainer.train()
    found = events.EventAccumulator(str(tmp_path / "events")).Reload()
    for name in ("loss", *NUMBERS):
        logged = [entry[name] for entry in logs_of(trainer)]
        assert [event.value for event in found.Scalars(f"train/{name}")] == pytest.approx(logged, rel=1e-6), name
        assert len(logged) == 2


class Reporter(transformers.TrainerCallback):
    """Keeps the logs that it is shown, as TensorBoard's would."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def with_reporter(monkeypatch, folder, attach):
    """The warnings, and the logs that a reporter saw that the Trainer made itself."""
    reporter = Reporter()
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda names: [reporter])
    model = make_model("llama", num_hidden_layers=1)
    loss, _ = by_loss_function(model, W, **EAGER)
    callback = PDLCallback(loss)
    trainer = make_trainer(folder, model, ROWS, settings={"max_steps": 2}, callbacks=[] if attach else [callback])
    trainer.args.report_to = ["tensorboard"]
    if attach:
        assert callback.attach(trainer) is callback
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(one.message) for one in caught if "report before this callback" in str(one.message)]
    return texts, [logs for logs in reporter.seen if "loss" in logs], trainer


def test_reporters_before_the_callback(monkeypatch, tmp_path):
    texts, seen, trainer = with_reporter(monkeypatch, tmp_path, attach=False)
    assert len(texts) == 1
    assert "tensorboard report before this callback and miss its numbers" in texts[0]
    assert len(seen) == 2
    assert not any(name in logs for logs in seen for name in NUMBERS)
    assert all(name in logs for logs in logs_of(trainer) for name in NUMBERS), "the Trainer's own log has them"


def test_reporters_after_the_callback(monkeypatch, tmp_path):
    texts, seen, _ = with_reporter(monkeypatch, tmp_path, attach=True)
    assert not texts
    assert len(seen) == 2
    assert all(name in logs for logs in seen for name in NUMBERS)


TWICE = {
    "attached twice": (False, 2),
    "in the list, and attached": (True, 1),
    "in the list, and attached twice": (True, 2),
}


@pytest.mark.parametrize(("in_list", "attached"), TWICE.values(), ids=TWICE)
def test_the_same_callback_twice(in_list, attached, tmp_path):
    """It is one callback, and logs each target once."""
    expected = trained(tmp_path, settings={"logging_steps": 1})
    model = make_model("llama", num_hidden_layers=1)
    loss, _ = by_loss_function(model, W, **EAGER)
    callback = PDLCallback(loss)
    settings = {"max_steps": 10, "learning_rate": 0.01}
    trainer = make_trainer(tmp_path, model, ROWS, settings=settings, callbacks=[callback] if in_list else [])
    for _ in range(attached):
        callback.attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert numbers_of(trainer) == numbers_of(expected)


# ---------------------------------------------------------------------------------------------------------------------
# More than one training, and evaluation between steps


@each_route
def test_two_trainings_in_a_row(route, tmp_path):
    """The second one is checked and logged as the first."""
    settings = {"logging_steps": 1, "learning_rate": 0.0, "gradient_accumulation_steps": 2, "max_steps": 7}
    trainer, loss, gradients = watched(tmp_path, route, settings=settings)
    trainer.train()
    first = numbers_of(trainer)
    trainer.train()
    assert len(gradients) == 14
    assert numbers_of(trainer) == first
    loss.set_weights(W.flip(0))
    with pytest.raises(RuntimeError, match="the loss had other weights in step 1 than it was given"):
        trainer.train()


class FallsShort(transformers.Trainer):
    """Runs out of memory on micro-batches of four and more rows, in the second step."""

    failed = 0

    def training_step(self, model, inputs, *arguments):
        if len(inputs["input_ids"]) >= 4 and self.state.global_step == 1:
            self.failed += 1
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *arguments)


@each_route
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_run_that_begins_anew_with_smaller_batches(logging_steps, route, tmp_path):
    """The batches of the run before do not count."""
    settings = {"per_device_train_batch_size": 4, "auto_find_batch_size": True, "gradient_accumulation_steps": 1}
    settings |= {"logging_steps": logging_steps, "learning_rate": 0.0, "max_steps": 6}
    trainer, _, gradients = watched(tmp_path, route, kind=FallsShort, settings=settings)
    trainer.train()
    assert trainer.failed == 1
    assert trainer.state.global_step == 6
    size = trainer._train_batch_size
    assert size < 4
    expected = big_batch_gradients(make_model("llama", num_hidden_layers=1), ROWS[:size], W)
    assert relative_error(gradients[-6], expected) < 1e-5


@each_route
@pytest.mark.parametrize("accumulate", [1, 2])
def test_evaluation_between_steps(accumulate, route, tmp_path):
    """It is in none of the numbers, and in the way of no check."""
    settings = {"gradient_accumulation_steps": accumulate, "logging_steps": 2}
    expected = trained(tmp_path, route, settings=settings)
    found = trained(tmp_path, route, settings=settings | EVALUATING)
    assert numbers_of(found) == numbers_of(expected)
    assert len(numbers_of(found)) == 5
    assert len([entry for entry in found.state.log_history if "eval_loss" in entry]) == 10
    assert not any(name in entry for entry in found.state.log_history if "eval_loss" in entry for name in NUMBERS)


def test_a_hook_that_evaluation_removes(tmp_path):
    """What a metric does to the model shows in the steps after it."""
    trainer, loss, _ = watched(tmp_path, by_linear_loss, settings=EVALUATING | {"eval_steps": 4, "max_steps": 20})
    trainer.compute_metrics = lambda prediction: loss.undo() and {}
    with pytest.raises(RuntimeError, match="PDL trained 1 of 2 micro-batches up to step 5"):
        trainer.train()


def test_evaluation_alone_needs_no_training(tmp_path):
    trainer, loss, _ = watched(tmp_path, by_loss_function)
    wanted = make_trainer(tmp_path, make_model("llama", num_hidden_layers=1), ROWS).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert loss.forwards == 0


def test_a_callback_of_one_trainer_after_another(tmp_path):
    """It begins its counting anew."""
    model = make_model("llama", num_hidden_layers=1)
    loss, _ = by_loss_function(model, W, **EAGER)
    callback = PDLCallback(loss)
    for _ in range(2):
        watch = Watch()
        trainer = make_trainer(tmp_path, model, ROWS, settings={"max_steps": 6}, callbacks=[watch])
        callback.attach(trainer)
        trainer.train()
        assert len(watch.gradients) == 6
