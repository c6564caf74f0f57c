"""transformers.Trainer with PDL: evaluation is plain cross entropy, logs are of all targets, resuming is as one go."""

import pytest
import torch
from helpers.trainer_models import V, collate, make_model, make_rows, relative_error
from helpers.trainer_runs import W, Watch, by_loss_function, cut, each_route, make_trainer, statistics_of

from pdl_kernels import WeightSchedule
from pdl_kernels.integrations.transformers import PDLCallback, use_pdl_linear_loss

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
