"""One of several processes that Lightning trains together."""

import os

from helpers.lightning_training import BATCH, QUIET, LinearModel, Model, W, lightning, loader, nll_of, without_targets
from helpers.ranks import leave
from helpers.trainer_models import big_batch_gradients, make_model, make_rows, relative_error

ACCUMULATE = 3
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
    leave()
