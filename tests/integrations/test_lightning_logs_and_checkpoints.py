"""PDLLightningMixin: logs and validation over all targets, and checkpoints that go on as training in one go."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_error
from helpers.lightning_training import BATCH, QUIET, ROWS, Model, W, fit, lightning, loader, nll_of, windows
from helpers.trainer_models import V, collate


class TestLogs:
    def test_of_each_step(self):
        model = Model()
        fit(model, accumulate_grad_batches=4)
        for found, rows in zip(model.logs, windows(ROWS, 4), strict=True):
            (total, n), (nll, _) = nll_of(rows, W), nll_of(rows)
            assert found["train_loss"] == pytest.approx(total / n, rel=1e-5)
            assert found["train_nll"] == pytest.approx(nll / n, rel=1e-5)
            targets = torch.tensor([label for row in rows for label in row["labels"][1:] if label != -100])
            assert found["train_mean_weight"] == pytest.approx(W[targets].mean().item(), rel=1e-5)
            assert found["train_perplexity"] == pytest.approx(math.exp(nll / n), rel=1e-5)
            share = W[targets].sum().square() / (n * W[targets].square().sum())
            assert found["train_effective_sample_share"] == pytest.approx(share.item(), rel=1e-5)
            assert share < 0.95

    @pytest.mark.parametrize("weights", [None, torch.full((V,), 0.3)], ids=["none", "equal"])
    def test_targets_that_weigh_the_same(self, weights):
        model = Model(weights)
        fit(model)
        for found in model.logs:
            assert found["train_effective_sample_share"] == pytest.approx(1, rel=1e-6)

    def test_the_share_of_token_weights(self):
        """One of the four weighs nothing and does not count; the others weigh 3, -1 and -1."""
        row = {"input_ids": [3, 7, 8, 9, 4], "labels": [3, 7, 8, 9, 4]}
        batch = collate([row]) | {"token_weights": torch.tensor([[1.0, 0.0, 3.0, -1.0, -1.0]])}
        model = Model(None)
        fit(model, batches=[batch])
        assert model.logs[0]["train_effective_sample_share"] == pytest.approx(25 / (3 * 11))

    def test_accuracy(self):
        model = Model()
        with torch.no_grad():  # logits that always choose class 7
            model.network.model.norm.weight.zero_()
        rows = [{"input_ids": [3, 7, 7, 9], "labels": [3, 7, 7, 9]}, {"input_ids": [3, 7], "labels": [-100, -100]}]
        model.logits_of = lambda batch: F.one_hot(torch.full(batch["labels"].shape, 7), V).float().requires_grad_()
        fit(model, rows)
        assert model.logs[0]["train_accuracy"] == pytest.approx(2 / 3)

    def test_the_record_is_of_all_steps_since_the_last(self):
        model = Model()
        fit(model, accumulate_grad_batches=2, log_every_n_steps=2)
        assert ["train_nll" in logged for logged in model.logs] == [False, True, True]
        nll, n = nll_of(ROWS[: 4 * BATCH])
        assert model.logs[1]["train_nll"] == pytest.approx(nll / n, rel=1e-5)
        assert "train_loss" in model.logs[0]

    def test_validation_is_the_unweighted_mean_over_targets(self):
        (nll, n), means = nll_of(ROWS), [nll_of(rows) for rows in windows(ROWS, 1)]
        trainer = fit(Model(label_smoothing=0.2), validation=loader(ROWS, BATCH))
        found = float(trainer.callback_metrics["val_loss"])
        assert found == pytest.approx(nll / n, rel=1e-6)
        assert abs(found / (sum(total / number for total, number in means) / len(means)) - 1) > 1e-4

    def test_validation_of_several_loaders(self):
        parts = ROWS[:3], ROWS[3:]
        trainer = fit(Model(), validation=[loader(part, BATCH) for part in parts])
        for number, part in enumerate(parts):
            nll, n = nll_of(part)
            found = trainer.callback_metrics[f"val_loss/dataloader_idx_{number}"]
            assert float(found) == pytest.approx(nll / n, rel=1e-6)

    def test_each_validation_begins_anew(self):
        trainer = fit(Model(), validation=loader(ROWS, BATCH), val_check_interval=2)
        nll, n = nll_of(ROWS)
        assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(nll / n, rel=1e-6)

    def test_weighted_evaluation(self):
        trainer = fit(Model(weighted_evaluation=True), validation=loader(ROWS, BATCH))
        total, n = nll_of(ROWS, W)
        assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(total / n, rel=1e-6)


class Turned(torch.utils.data.Sampler):
    """The other way round in each second epoch: training that goes on begins with other rows."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(ROWS)

    def __iter__(self):
        return reversed(range(len(ROWS))) if self.epoch % 2 else iter(range(len(ROWS)))


class TestCheckpoints:
    @staticmethod
    def trained(tmp_path, model, **options):
        trainer = fit(model, accumulate_grad_batches=2, default_root_dir=tmp_path, **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return trainer

    def test_training_that_goes_on_equals_training_in_one_go(self, tmp_path):
        class Adam(Model):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

            def train_dataloader(self):
                rows = sorted(ROWS, key=lambda row: sum(label != -100 for label in row["labels"]))
                return torch.utils.data.DataLoader(rows, BATCH, sampler=Turned(), collate_fn=collate)

        at_once, first, second = Adam(), Adam(), Adam()
        fit(at_once, None, accumulate_grad_batches=2, max_epochs=2)
        self.trained(tmp_path, first, rows=None)
        trainer = fit(second, None, accumulate_grad_batches=2, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
        assert trainer.global_step == 6
        assert len(second.gradients) == 3
        assert second._pdl_unit != at_once._pdl_unit  # and makes no difference
        begun, gone_on, once = (model.network.state_dict() for model in (first, second, at_once))
        assert all(torch.equal(gone_on[name], once[name]) for name in once)
        assert not torch.equal(begun["lm_head.weight"], once["lm_head.weight"])

    @pytest.mark.parametrize(("before", "after"), [(W, W + 1), (W, None), (None, W), (W, torch.ones(V + 1))])
    def test_other_weights_are_refused(self, before, after, tmp_path):
        self.trained(tmp_path, Model(before))
        words = ["no weights" if table is None else f"{len(table)} weights" for table in (before, after)]
        assert_error(
            ValueError, lambda: fit(Model(after), max_epochs=2, ckpt_path=tmp_path / "last.ckpt"), *words, "accepted"
        )

    def test_validation_and_loading_take_any_weights(self, tmp_path):
        self.trained(tmp_path, Model())
        path = tmp_path / "last.ckpt"
        trainer = lightning.Trainer(**QUIET)
        trainer.validate(Model(None), loader(ROWS, BATCH), ckpt_path=path, verbose=False)
        nll, n = nll_of(ROWS)
        assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(nll / n, rel=1e-6)
        assert Model.load_from_checkpoint(path, weights=None).pdl_loss.table is None

    def test_the_weights_are_in_the_checkpoint(self, tmp_path):
        self.trained(tmp_path, Model())
        assert torch.equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["pdl_weights"], W)

    def test_a_checkpoint_without_weights_warns(self, tmp_path):
        self.trained(tmp_path, Model())
        path = tmp_path / "last.ckpt"
        content = torch.load(path)
        del content["pdl_weights"]
        torch.save(content, path)
        with pytest.warns(UserWarning, match="the checkpoint does not say"):
            fit(Model(), accumulate_grad_batches=2, max_epochs=2, ckpt_path=path)
