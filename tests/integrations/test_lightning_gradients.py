"""PDLLightningMixin: the gradient of one big batch, whatever Lightning accumulates, clips and schedules."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.lightning_training import (
    BATCH,
    EAGER,
    ROWS,
    LinearModel,
    Model,
    W,
    fit,
    gradients_of,
    lightning,
    reference,
    windows,
    without_targets,
)
from helpers.ranks import run_ranks
from helpers.trainer_models import collate, make_model, make_weights, next_labels, relative_error, take_gradients
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision

from pdl_kernels.integrations.transformers import use_pdl_linear_loss
from pdl_kernels.weights.saved import save_weights


class TestGradients:
    @pytest.mark.parametrize("accumulate", [1, 2, 4])
    @pytest.mark.parametrize("model_type", [Model, LinearModel])
    def test_are_those_of_one_big_batch(self, model_type, accumulate):
        model = model_type()
        fit(model, accumulate_grad_batches=accumulate)
        steps = windows(ROWS, accumulate)
        assert len(model.gradients) == len(steps)
        for found, rows in zip(model.gradients, steps, strict=True):
            assert relative_error(found, reference(rows)) < 1e-5
        assert model.upstream == [1.0] * 6  # what the loss expects, so that no gradient is scaled once more

    def test_the_rows_tell_it_from_an_average_of_micro_batches(self):
        rows = windows(ROWS, 4)[0]
        means = [reference(rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)]
        averaged = {name: sum(mean[name] for mean in means) / len(means) for name in means[0]}
        assert relative_error(averaged, reference(rows)) > 0.1

    def test_a_micro_batch_and_a_step_without_targets(self):
        rows = without_targets(ROWS[:BATCH]) + ROWS[BATCH : 2 * BATCH] + without_targets(ROWS[: 2 * BATCH])
        model = Model()
        fit(model, rows, accumulate_grad_batches=2)
        assert relative_error(model.gradients[0], reference(rows[: 2 * BATCH])) < 1e-5
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in model.gradients[1].values())
        assert model.logs[1]["train_loss"] == 0

    def test_the_number_of_micro_batches_may_change(self):
        model = Model()
        fit(model, max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 3, 1: 2})])
        steps = windows(ROWS, 3) + windows(ROWS, 2)
        for found, rows in zip(model.gradients, steps, strict=True):
            assert relative_error(found, reference(rows)) < 1e-5

    def test_after_training_that_ended_within_a_step(self):
        class Interrupted(Model):
            calls = 0

            def logits_of(self, batch):
                self.calls += 1
                if self.calls == 2:
                    raise ZeroDivisionError
                return super().logits_of(batch)

        model = Interrupted()
        with pytest.raises(ZeroDivisionError):
            fit(model, accumulate_grad_batches=2)
        fit(model, accumulate_grad_batches=2)
        assert relative_error(model.gradients[0], reference(ROWS[: 2 * BATCH])) < 1e-5

    def test_none_is_plain_cross_entropy(self):
        model = Model(None)
        fit(model, accumulate_grad_batches=6)
        assert relative_error(model.gradients[0], reference(ROWS, None)) < 1e-5

    def test_weights_of_a_file(self, tmp_path):
        other = make_weights(seed=5)
        save_weights(tmp_path / "weights.safetensors", other)
        model = Model(tmp_path / "weights.safetensors")
        fit(model, accumulate_grad_batches=6)
        assert relative_error(model.gradients[0], reference(ROWS, other)) < 1e-5

    def test_options_reach_the_loss(self):
        model = Model(label_smoothing=0.3)
        fit(model, accumulate_grad_batches=6)
        network = make_model("llama")
        batch = collate(ROWS)
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        targets = next_labels(batch["labels"]).flatten()
        total = F.cross_entropy(logits, targets, weight=W, reduction="sum", label_smoothing=0.3)
        (total / targets.ne(-100).sum()).backward()
        assert relative_error(model.gradients[0], take_gradients(network)) < 1e-5


class TestBatches:
    """What a batch may hold."""

    def expected(self, batches, targets, token_weights):
        """Gradients of sum_i w(y_i) u_i ce_i / n over these batches."""
        network = make_model("llama")
        total = n = 0
        for batch, target, factors in zip(batches, targets, token_weights, strict=True):
            logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=W, reduction="none")
            total = total + (losses * factors.flatten()).sum()
            n = n + target.ne(-100).sum()
        (total / n).backward()
        return take_gradients(network)

    def batches(self):
        return [collate(ROWS[first : first + BATCH]) for first in range(0, 6, BATCH)]

    @pytest.mark.parametrize("model_type", [Model, LinearModel])
    def test_token_weights_of_any_sign(self, model_type):
        batches, shifted = self.batches(), []
        for batch in batches:
            batch["token_weights"] = torch.randn(batch["labels"].shape)
            shifted.append(F.pad(batch["token_weights"], (0, 1))[:, 1:])
        assert min(factors.min() for factors in shifted) < -0.5
        model = model_type()
        fit(model, batches=batches, accumulate_grad_batches=3)
        targets = [next_labels(batch["labels"]) for batch in batches]
        assert relative_error(model.gradients[0], self.expected(batches, targets, shifted)) < 1e-5

    @pytest.mark.parametrize("key", ["labels", "shift_labels"])
    def test_labels_that_are_targets_already(self, key):
        batches = self.batches()
        targets = [next_labels(batch.pop("labels")) for batch in batches]
        for batch, target in zip(batches, targets, strict=True):
            batch[key] = target
        model = Model(**{"shift": False} if key == "labels" else {})
        fit(model, batches=batches, accumulate_grad_batches=3)
        ones = [torch.ones(target.shape) for target in targets]
        assert relative_error(model.gradients[0], self.expected(batches, targets, ones)) < 1e-5

    def test_other_batches_and_a_model_of_its_own(self):
        """As the docstrings of `targets_of` and `loss_of` have it."""

        class OfHidden(Model):
            def targets_of(self, batch):
                return next_labels(batch[1]), None

            def loss_of(self, batch, count):
                targets, token_weights = self.targets_of(batch)
                hidden = self.network.model(input_ids=batch[0]).last_hidden_state
                return self.pdl_loss.of_hidden(hidden, self.network.lm_head.weight, targets, token_weights, count)

        model = OfHidden(chunk_size=8, linear=True)
        batches = [(batch["input_ids"], batch["labels"]) for batch in self.batches()]
        fit(model, batches=batches, accumulate_grad_batches=3)
        assert relative_error(model.gradients[0], reference(ROWS[:6])) < 1e-5

    def test_an_encoder_decoder_is_not_shifted(self):
        class Translator(LinearModel):
            def __init__(self):
                lightning.LightningModule.__init__(self)
                self.network = make_model("t5")
                self.configure_pdl(use_pdl_linear_loss(self.network, W, **EAGER))
                self.lr, self.gradients, self.logs, self.upstream = 0.0, [], [], []

        model, network, batches = Translator(), make_model("t5"), self.batches()
        trainer = fit(model, batches=batches, validation=torch.utils.data.DataLoader(batches, batch_size=None))
        for batch, found in zip(batches, model.gradients, strict=True):
            logits, labels = network(**batch).logits, batch["labels"]
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=W, reduction="sum")
            (total / labels.ne(-100).sum()).backward()
            assert relative_error(found, take_gradients(network)) < 1e-5
        nll = sum(float(network(**batch).loss.detach()) * batch["labels"].ne(-100).sum() for batch in batches)
        n = sum(batch["labels"].ne(-100).sum() for batch in batches)
        assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(nll / n), rel=1e-5)


class TestTheLoopIsLightnings:
    @pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
    def test_clipping_comes_after_the_division(self, precision):
        """The norm of the step's own gradient decides, neither that of sums nor one that is scaled for float16."""
        expected = reference(ROWS[4 * BATCH :])  # of the last step
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
        for limit in (0.5 * norm, 1.5 * norm):
            model = Model()
            precise = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {}
            fit(model, accumulate_grad_batches=4, gradient_clip_val=limit, **precise)
            found = gradients_of(model.network)
            wanted = {name: gradient * min(limit / norm, 1) for name, gradient in expected.items()}
            assert relative_error(found, wanted) < (1e-5 if precision == "32-true" else 1e-2)

    @pytest.mark.parametrize(("interval", "expected"), [("step", 4), ("epoch", 2)])
    def test_schedulers(self, interval, expected):
        class Scheduled(Model):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": interval}}

        model = Scheduled()
        trainer = fit(model, accumulate_grad_batches=4, max_epochs=2)
        assert trainer.global_step == 4
        assert model.scheduler.last_epoch == expected

    def test_bfloat16(self):
        dtypes = set()

        class Watched(Model):
            def logits_of(self, batch):
                logits = super().logits_of(batch)
                dtypes.add(logits.dtype)
                return logits

        model, exact = Watched(), Model()
        fit(model, accumulate_grad_batches=6, precision="bf16-mixed")
        fit(exact, accumulate_grad_batches=6)
        assert dtypes == {torch.bfloat16}
        assert model.logs[0]["train_loss"] == pytest.approx(exact.logs[0]["train_loss"], rel=2e-3)
        assert model.logs[0]["train_loss"] != exact.logs[0]["train_loss"]
        assert relative_error(model.gradients[0], reference(ROWS)) < 3e-2

    def test_float16_is_scaled_back(self):
        model = Model()
        fit(model, accumulate_grad_batches=6, plugins=[MixedPrecision("16-mixed", "cpu")])
        assert set(model.upstream) == {2.0**16}  # the scaler's
        assert relative_error(model.gradients[0], reference(ROWS)) < 1e-2


@pytest.mark.trainers
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes(processes):
    """Gradients, logs and validation of uneven data; a process without a target; uneven numbers of batches."""
    said = run_ranks(processes, Path(__file__).parent / "ranks" / "lightning_ranks.py")
    assert all(text.count("gradient") == 4 for text in said)
