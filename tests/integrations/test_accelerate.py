"""The loop of docs/training_accelerate.md: the gradient of one big batch, and the traps that the page names."""

from itertools import islice
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.trainer_models import big_batch_gradients, collate, make_model, make_rows, relative_error
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")

from accelerate import Accelerator
from ranks.accelerate_ranks import BATCH, LOSSES, W, errors_of_steps, gradients_of_steps

ROWS = make_rows(11)  # six micro-batches, the last of one row


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_gradient_of_one_big_batch(micro_batches, loss):
    assert max(errors_of_steps(Accelerator(cpu=True), ROWS, micro_batches, loss)) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_without_targets(loss):
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in ROWS[: 2 * BATCH]]
    (gradients,) = gradients_of_steps(Accelerator(cpu=True), rows, 2, loss)[1]
    assert all(gradient.abs().sum() == 0 for gradient in gradients.values())


def test_backward_divides_by_the_accumulation_steps():
    """The trap: the gradient is a quarter of what it should be."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    (found,), _ = gradients_of_steps(accelerator, ROWS[:8], 4, "loss_on_logits")
    expected = big_batch_gradients(make_model("llama"), ROWS[:8], W)
    assert relative_error({name: 4 * gradient for name, gradient in found.items()}, expected) < 1e-5


def test_accumulate_synchronizes_early():
    """The trap: of a window that was fetched ahead, every micro-batch is said to end a step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, loader = accelerator.prepare(make_model("llama"), DataLoader(ROWS[:8], batch_size=2, collate_fn=collate))
    synchronized = []
    for _ in list(islice(loader, 4)):
        with accelerator.accumulate(model):
            synchronized.append(accelerator.sync_gradients)
    assert synchronized == [True] * 4


@pytest.mark.trainers
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes(processes):
    """Uneven data, and a process without a target, whose parameters DDP waits for."""
    said = run_ranks(processes, Path(__file__).parent / "ranks" / "accelerate_ranks.py")
    assert all(text.count("gradient") == 2 for text in said)
