"""One of several processes that train together: with transformers.Trainer, or with a model that FSDP shards.

    trainer_ranks.py trainer FOLDER | fsdp

Every process holds what it finds against one process with the whole batch, and fails where they differ.
"""

import itertools
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from helpers.ranks import leave
from helpers.trainer_models import (
    big_batch_gradients,
    collate,
    make_model,
    make_rows,
    make_weights,
    relative_error,
)
from helpers.trainer_runs import Watch, by_compute_loss, by_linear_loss, by_loss_function, make_trainer, statistics_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pdl_kernels.integrations.transformers import PDLCallback

W = make_weights()
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ---------------------------------------------------------------------------------------------------------------------
# transformers.Trainer


def train(folder, route, rows, pieces, name="llama", **settings):
    """One epoch in which nothing moves; (gradients of each step, logs of each step, loss of an evaluation)."""
    model = make_model(name)
    loss, more = route(model)
    watch = Watch()
    settings = {"learning_rate": 0.0, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": pieces} | settings
    trainer = make_trainer(folder, model, rows, settings=settings, callbacks=[watch, PDLCallback(loss)], **more)
    assert trainer.args.world_size == WORLD
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(watch.gradients)
    return watch.gradients, logs, trainer.evaluate()["eval_loss"]


def assert_is_one_process(found, rows, windows):
    """Gradients and logs of each step are those of its window of rows, the evaluation that of the stock model."""
    gradients, logs, evaluation = found
    assert len(gradients) == len(logs) == len(windows), (len(gradients), len(logs), len(windows))
    for number, (gradient, log, window) in enumerate(zip(gradients, logs, windows, strict=True)):
        error = relative_error(gradient, big_batch_gradients(make_model("llama"), window, W))
        print(f"  step {number}: relative error of the gradient {error:.1e}")
        assert error < 1e-5, error
        for what, expected in statistics_of(window, make_model("llama")).items():
            assert abs(log[what] - expected) < 1e-4 * max(abs(expected), 0.01), (what, log[what], expected)
    settings = {"per_device_eval_batch_size": 1}
    stock = make_trainer(tempfile.mkdtemp(), make_model("llama"), rows, settings=settings).evaluate()["eval_loss"]
    assert abs(evaluation / stock - 1) < 1e-6, (evaluation, stock)


def with_unequal_targets(folder, route):
    """Three micro-batches a step, and fewer in the last one."""
    rows = make_rows(5 * WORLD)
    windows = [rows[: 3 * WORLD], rows[3 * WORLD :]]
    targets = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    for window in (targets[: 3 * WORLD], targets[3 * WORLD :]):
        assert len({sum(window[rank::WORLD]) for rank in range(WORLD)}) > 1, "processes have as many targets"
    assert_is_one_process(train(folder, route, rows, 3), rows, windows)


def with_a_rank_without_targets(folder, route):
    """The last process never has a target. DDP does not look for unused parameters: each needs a gradient."""
    rows = make_rows(4 * WORLD)
    for row in rows[WORLD - 1 :: WORLD]:
        row["labels"] = [-100] * len(row["labels"])
    windows = [rows[: 2 * WORLD], rows[2 * WORLD :]]
    assert_is_one_process(train(folder, route, rows, 2, ddp_find_unused_parameters=False), rows, windows)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def with_shards(route, own_output_layer, targets_everywhere):
    """Two steps of two micro-batches; the layers, and perhaps the output layer, are groups of their own."""
    model = make_model("llama")
    route(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_output_layer:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = make_rows(4 * WORLD)
    if not targets_everywhere:
        for row in rows[WORLD - 1 :: WORLD]:
            row["labels"] = [-100] * len(row["labels"])
    count = torch.tensor(sum(label != -100 for row in rows for label in row["labels"][1:]))
    expected = big_batch_gradients(make_model("llama"), rows, W)
    for number in range(2):
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            loss = model(**collate(rows[RANK::WORLD][micro::2]), num_items_in_batch=count).loss
            (loss * WORLD).backward()
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        model.zero_grad()
        error = relative_error(gradients, expected)
        print(f"  step {number}: relative error of the gradient {error:.1e}")
        assert error < 1e-5, error
    batch = collate(rows)
    with torch.no_grad():
        assert model(**batch).logits.shape[:-1] == batch["labels"].shape


if __name__ == "__main__":
    kind, *folder = sys.argv[1:]
    if kind == "trainer":
        for route in (by_loss_function, by_compute_loss, by_linear_loss):
            print(route.__name__)
            with_unequal_targets(folder[0], route)
            with_a_rank_without_targets(folder[0], route)
    else:
        dist.init_process_group("gloo")
        for route, own_output_layer, targets_everywhere in itertools.product(
            (by_loss_function, by_linear_loss), (False, True), (True, False)
        ):
            print(f"{route.__name__}, own output layer {own_output_layer}, targets everywhere {targets_everywhere}")
            with_shards(route, own_output_layer, targets_everywhere)
    leave()
