"""A LightningModule with PDL that keeps its gradients and logs, its training, and what they are compared with."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from helpers.trainer_models import big_batch_gradients, collate, make_model, make_rows, make_weights, next_labels

pytest.importorskip("lightning")

import lightning

from pdl_kernels.integrations.lightning import PDLLightningMixin
from pdl_kernels.integrations.training_loss import TrainingLoss

W = make_weights()
EAGER = {"backend": "eager"}  # pytest has the kernels interpreted, which takes long
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "max_epochs": 1,
}
BATCH = 2
ROWS = make_rows(11)  # six micro-batches, the last of one row
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Model(PDLLightningMixin, lightning.LightningModule):
    """Keeps gradients and logs of each step, and what comes back to each loss; `lr` 0 leaves the parameters alone."""

    def __init__(self, weights=W, lr=0.0, **options):
        super().__init__()
        self.network = make_model("llama")
        self.configure_pdl(weights, **{} if isinstance(weights, TrainingLoss) else EAGER, **options)
        self.lr = lr
        self.gradients = []
        self.logs = []
        self.upstream = []

    def logits_of(self, batch):
        return self.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def loss_of(self, batch, count):
        loss = super().loss_of(batch, count)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self.upstream.append(float(gradient)))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients.append(gradients_of(self.network))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.logs) < len(self.gradients):
            self.logs.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


class LinearModel(Model):
    """Trains without logits."""

    def __init__(self, **options):
        from pdl_kernels.integrations.transformers import use_pdl_linear_loss

        super().__init__()
        self.configure_pdl(use_pdl_linear_loss(self.network, W, **EAGER, **options))

    logits_of = PDLLightningMixin.logits_of


def gradients_of(network):
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def loader(rows, batch_size):
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate)


def without_targets(rows):
    return [row | {"labels": [-100] * len(row["labels"])} for row in rows]


@torch.no_grad()
def nll_of(rows, weights=None):
    """Sum of the losses of torch's cross entropy, and the number of targets."""
    batch = collate(rows)
    network = make_model("llama")
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = next_labels(batch["labels"])
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weights, reduction="sum")
    return float(total), int(targets.ne(-100).sum())


def fit(model, rows=ROWS, validation=None, batches=None, ckpt_path=None, **options):
    trainer = lightning.Trainer(**QUIET | options)
    data = None if rows is None else loader(rows, BATCH)  # None: the model has a loader of its own
    if batches is not None:
        data = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(model, data, validation, ckpt_path=ckpt_path)
    return trainer


def windows(rows, accumulate):
    """The rows of each optimizer step of an epoch."""
    size = BATCH * accumulate
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def reference(rows, weights=W):
    return big_batch_gradients(make_model("llama"), rows, weights)
