"""One of several processes that Lightning trains together, and the model that the tests of one process train, too."""

import logging
import os
import warnings

import lightning
import torch
import torch.nn.functional as F
from helpers.trainer_models import (
    big_batch_gradients,
    collate,
    make_model,
    make_rows,
    make_weights,
    next_labels,
    relative_error,
)
from torch.utils.data import DataLoader

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


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

ACCUMULATE, BATCH = 3, 2
LONGEST = (16, 40, 6)  # tokens of a row, for each process


def training_rows(rank):
    """Five micro-batches: a window of three and one of two. The second process has no target in the first window, and
    none has any in the second batch of the other."""
    rows = make_rows(5 * BATCH, seed=10 + rank, longest=LONGEST[rank])
    first, second = rows[: 3 * BATCH], rows[3 * BATCH :]
    if rank == 1:
        first = without_targets(first)
    return first, second[:BATCH] + without_targets(second[BATCH:])


def train(model, world, rows, validation=None):
    trainer = lightning.Trainer(
        **QUIET,
        devices=world,
        strategy="ddp",
        accumulate_grad_batches=ACCUMULATE,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, loader(rows, BATCH), validation)
    return trainer


def check_exact(rank, world, model_type):
    windows = [training_rows(other) for other in range(world)]
    model = model_type()
    # As many batches for each process, of other sizes.
    mine = [make_rows(4 * (1 + other), seed=20 + other, longest=LONGEST[other]) for other in range(world)]
    trainer = train(model, world, [*windows[rank][0], *windows[rank][1]], loader(mine[rank], 2 * (1 + rank)))

    assert len(model.gradients) == len(model.logs) == 2
    for step in range(2):
        rows = [row for window in windows for row in window[step]]
        expected = big_batch_gradients(make_model("llama"), rows, W)
        error = relative_error(model.gradients[step], expected)
        total, n = nll_of(rows, W)
        logged = model.logs[step]
        print(f"step {step}: gradient {error:.1e}, loss {logged['train_loss'] / (total / n) - 1:.1e}")
        assert error < 1e-5
        assert abs(logged["train_loss"] / (total / n) - 1) < 1e-5
        assert abs(logged["train_nll"] / (nll_of(rows)[0] / n) - 1) < 1e-5
    assert model.upstream == [world] * 5  # what the losses expect, so that no gradient is scaled once more
    total, n = nll_of([row for rows in mine for row in rows])
    found = float(trainer.callback_metrics["val_loss"])
    print(f"validation {found / (total / n) - 1:.1e}")
    assert abs(found / (total / n) - 1) < 1e-6


def check_uneven(rank, world):
    """Lightning waits for ever where a process has more batches."""
    try:
        train(Model(), world, make_rows(2 * (2 + rank)))
    except ValueError as error:
        message = str(error)
        assert "[2.0, 3.0" in message, message
        assert "batches" in message, message
    else:
        raise AssertionError("training went on")


if __name__ == "__main__":
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_exact(rank, world, Model)
    check_exact(rank, world, LinearModel)
    check_uneven(rank, world)
