"""PDLLightningMixin: what it refuses, by an error that names it, and versions that nobody has tested."""

import torch
from helpers import assert_error
from helpers.lightning_training import BATCH, EAGER, ROWS, Model, W, fit, lightning, loader
from helpers.trainer_models import V, big_batch_gradients, collate, make_model, relative_error

from pdl_kernels.integrations import lightning as integration
from pdl_kernels.integrations.lightning import PDLLightningMixin
from pdl_kernels.integrations.transformers import use_pdl_linear_loss


class TestErrors:
    def test_the_mixin_comes_second(self):
        class Wrong(lightning.LightningModule, PDLLightningMixin):
            pass

        class Alone(PDLLightningMixin):
            pass

        for kind in (Wrong, Alone):
            assert_error(TypeError, lambda kind=kind: kind().configure_pdl(W), kind.__name__, "accepted", "before")

    def test_no_loss_is_configured(self):
        class Forgotten(PDLLightningMixin, lightning.LightningModule):
            def configure_optimizers(self):
                return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)

        assert_error(RuntimeError, lambda: fit(Forgotten()), "configure_pdl")

    def test_no_logits(self):
        class Forgotten(Model):
            logits_of = PDLLightningMixin.logits_of

        assert_error(NotImplementedError, lambda: fit(Forgotten()), "logits_of", "Forgotten", "accepted")

    def test_logits_of_another_shape(self):
        class Shifted(Model):
            def logits_of(self, batch):
                return super().logits_of(batch)[:, :-1]

        assert_error(ValueError, lambda: fit(Shifted()), "targets have shape")

    def test_manual_optimization(self):
        model = Model()
        model.automatic_optimization = False
        assert_error(ValueError, lambda: fit(model), "automatic_optimization is False", "accepted")

    def test_a_strategy_that_accumulates_by_itself(self, monkeypatch):
        strategy = lightning.pytorch.strategies.SingleDeviceStrategy
        monkeypatch.setattr(strategy, "handles_gradient_accumulation", True, raising=False)
        assert_error(ValueError, lambda: fit(Model()), "SingleDeviceStrategy", "accepted")

    def test_hooks_without_super(self):
        class Starts(Model):
            def on_train_start(self):
                pass

        class Steps(Model):
            def on_before_optimizer_step(self, optimizer):
                pass

        assert_error(RuntimeError, lambda: fit(Starts()), "on_train_start", "super")
        assert_error(RuntimeError, lambda: fit(Steps(), accumulate_grad_batches=2), "on_before_optimizer_step", "super")

    def test_options(self):
        loss = use_pdl_linear_loss(make_model("llama"), W)
        assert_error(ValueError, lambda: Model(loss, label_smoothing=0.1), "label_smoothing", "accepted")
        assert_error(ValueError, lambda: Model(loss, shift=False), "shift", "accepted")
        assert_error(ValueError, lambda: Model(reduction="sum"), "reduction")
        assert_error(TypeError, lambda: Model([1.0]), "list")

    def test_a_router_loss(self):
        """It is no sum over targets, and divided by their number it would be another for each cut."""

        class Experts(Model):
            logits_of = PDLLightningMixin.logits_of

            def __init__(self, **options):
                super().__init__()
                self.network = make_model("mixtral", **options)
                self.configure_pdl(use_pdl_linear_loss(self.network, W, **EAGER))

        assert_error(ValueError, lambda: fit(Experts()), "MixtralForCausalLM", "router loss", "accepted")
        validation = loader(ROWS, BATCH)
        assert_error(ValueError, lambda: fit(Experts(), validation=validation), "MixtralForCausalLM", "router loss")
        model = Experts(output_router_logits=False)
        fit(model)
        plain = make_model("mixtral", output_router_logits=False)
        assert relative_error(model.gradients[0], big_batch_gradients(plain, ROWS[:BATCH], W)) < 1e-5

    def test_weights_of_another_length(self):
        assert_error(ValueError, lambda: fit(Model(torch.ones(V + 1))), str(V), str(V + 1))

    def test_batches_without_labels(self):
        batch = collate(ROWS[:2])
        del batch["labels"]
        assert_error(ValueError, lambda: fit(Model(), batches=[batch]), "labels are missing")


def test_untested_versions_are_named(monkeypatch):
    asked = []
    monkeypatch.setattr(integration, "warn_if_untested", asked.append)
    Model()
    assert asked == ["lightning"]
