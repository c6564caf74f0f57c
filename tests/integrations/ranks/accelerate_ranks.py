"""One of several processes that the loop of docs/training_accelerate.md trains; accelerate splits the loader."""

import os
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers.ranks import leave
from helpers.trainer_models import big_batch_gradients, collate, make_model, make_rows, make_weights, relative_error
from torch.utils.data import DataLoader

from pdl_kernels.integrations.transformers import use_pdl_linear_loss

PAGE = Path(__file__).resolve().parents[3] / "docs" / "training_accelerate.md"
W = make_weights()
BATCH = 2
LOSSES = ("loss_on_logits", "loss_without_logits")
EAGER = {"backend": "eager"}  # pytest has the kernels interpreted, which takes long


def recipe():
    """The names that the page defines."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    exec(snippet, names)
    return names


def gradients_of_steps(accelerator, rows, micro_batches, loss):
    """[{name: gradient}] of the recipe's loop before it clips, and as the optimizer gets them.

    The parameters stay as they are.
    """
    names = recipe()
    model = make_model("llama")
    if loss == "loss_without_logits":
        use_pdl_linear_loss(model, W, **EAGER)
        loss_of = names[loss]
    else:
        loss_of = names[loss](W, **EAGER)
    whole, final = [], []
    clip = accelerator.clip_grad_norm_

    def keep(gradients):
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    accelerator.clip_grad_norm_ = lambda *arguments: (keep(whole), clip(*arguments))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: keep(final))
    loader = DataLoader(rows, batch_size=BATCH, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    names["train"](accelerator, prepared, optimizer, loader, loss_of, micro_batches)
    del accelerator.clip_grad_norm_
    return whole, final


def clipped(gradients):
    """To a norm of 1, as the recipe does."""
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return {name: gradient / norm.clamp(min=1) for name, gradient in gradients.items()}


def errors_of_steps(accelerator, rows, micro_batches, loss):
    """How far each step is from the gradient of one big batch, which accelerate cut in turn into the processes'."""
    size = BATCH * micro_batches * accelerator.num_processes
    steps = [rows[first : first + size] for first in range(0, len(rows), size)]
    whole, final = gradients_of_steps(accelerator, rows, micro_batches, loss)
    assert len(whole) == len(final) == len(steps)
    expected = [big_batch_gradients(make_model("llama"), step, W) for step in steps]
    return [
        *map(relative_error, whole, expected),
        *(relative_error(found, clipped(wanted)) for found, wanted in zip(final, expected, strict=True)),
    ]


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    world = int(os.environ["WORLD_SIZE"])
    assert accelerator.num_processes == world
    # Five micro-batches for each process: two steps of two, and one of one.
    rows = make_rows(5 * BATCH * world, seed=3, longest=30)
    for number, row in enumerate(rows):
        if number // BATCH % world == 1 and number < 2 * BATCH * world:  # the second process, in the first step
            row["labels"] = [-100] * len(row["labels"])
    for loss in LOSSES:
        errors = errors_of_steps(accelerator, rows, 2, loss)
        print(loss, "gradient", *(f"{error:.1e}" for error in errors))
        assert max(errors) < 1e-5
    leave()
