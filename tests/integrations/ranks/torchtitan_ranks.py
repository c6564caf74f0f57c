"""One of several processes that torchtitan's Trainer trains together, or the only one.

    torchtitan_ranks.py FOLDER BACKEND data | pipeline | checked | checked_tensor | tensor LOSS...

With tensor parallelism, one of these may be "shards", after the others: the losses without the Trainer.

Every process holds gradients and logs of each step against one model with the whole batch in plain torch, and fails
where they differ.
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.ranks import leave
from helpers.torchtitan_on_cpu import make_config, make_trainer  # before anything else of torchtitan
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan_shards import check_shards

from pdl_kernels import save_weights
from pdl_kernels.integrations.torchtitan import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss

WORLD = int(os.environ["WORLD_SIZE"])
V, ROWS, LENGTH, STEPS, VALIDATION_STEPS = 2048, 2, 32, 2, 2
PIECES = 4  # micro-batches of a step, over all processes
W = 0.1 + 2.9 * torch.rand(V, generator=torch.Generator().manual_seed(0))


def batches_of(rank):
    """Without end; unequal numbers of targets for each process and micro-batch, and none at all in the third."""
    generator = torch.Generator().manual_seed(rank)
    for number in itertools.count():
        tokens = torch.randint(V, (ROWS, LENGTH + 1), generator=generator)
        inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.2 + 0.5 * ((rank + number) % 2)] = -100
        if number == 2:
            labels[:] = -100
        yield {"input": inputs, "positions": torch.arange(LENGTH).expand(ROWS, -1)}, labels


class Batches(BaseDataLoader):
    """Those of this process."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True  # the validator sets it

    def __init__(self, config, *, dp_rank, local_batch_size, **unused):
        self.rank, self.rows = dp_rank, local_batch_size

    def __iter__(self):
        for inputs, labels in batches_of(self.rank):  # pipeline parallelism asks for a row at a time
            for start in range(0, ROWS, self.rows):
                rows = slice(start, start + self.rows)
                yield {name: value[rows] for name, value in inputs.items()}, labels[rows]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Plain torch


def whole_of(tensors):
    """The tensors of all processes, by name, each with all of its shards."""
    mine = {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: tensor for found in everyone for name, tensor in found.items()}


def loss_of(config, parameters, batches, weights):
    """A model with these parameters, and the loss of these batches, float64."""
    model = config.model_spec.model.build()
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    total = torch.zeros((), dtype=torch.float64)
    for inputs, labels in batches:
        logits = model(inputs["input"], inputs["positions"]).double().flatten(0, 1)
        total = total + F.cross_entropy(logits, labels.flatten(), weight=weights, reduction="sum")
    return model, total / sum(labels.ne(-100).sum() for _, labels in batches)


def relative_difference(found, expected):
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------------------------
# The Trainer


class Watched:
    """A training run whose steps and validation are compared with plain torch while they happen."""

    def __init__(self, config, data_parallel, tolerance):
        self.config, self.tolerance = config, tolerance
        self.data = [batches_of(rank) for rank in range(data_parallel)]
        self.pieces = PIECES // data_parallel
        self.losses = []  # of each step
        self.trainer = make_trainer(config)
        self.parts = self.trainer.model_parts
        self.has_loss = getattr(self.trainer, "pp_has_last_stage", True)
        self.step, self.trainer.optimizers.step = self.trainer.optimizers.step, self.compare_gradients
        self.trainer.metrics_processor.log = self.compare_loss
        self.trainer.metrics_processor.log_validation = self.compare_validation

    def train(self):
        try:
            self.trainer.train()
        finally:
            self.trainer.close()
        assert self.losses == [], "a step was not logged"

    def parameters(self):
        found = {name: parameter for part in self.parts for name, parameter in part.named_parameters()}
        return {name.replace("_checkpoint_wrapped_module.", ""): parameter for name, parameter in found.items()}

    def compare_gradients(self):
        parameters = self.parameters()
        gradients = whole_of({name: parameter.grad for name, parameter in parameters.items()})
        batches = [next(data) for data in self.data for _ in range(self.pieces)]
        model, loss = loss_of(self.config, whole_of(parameters), batches, W.double())
        loss.backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert gradients.keys() == expected.keys()
        errors = {name: relative_difference(gradients[name], expected[name]) for name in expected}
        worst = max(errors, key=errors.get)
        print(f"  relative error of the gradient {errors[worst]:.1e}, {worst}")
        assert errors[worst] < self.tolerance, errors
        self.losses.append(float(loss.detach()))
        self.step()

    def compare_loss(self, step, loss, *others, **more):
        expected = self.losses.pop()
        if self.has_loss:
            assert abs(loss / expected - 1) < self.tolerance, (loss, expected)

    @torch.no_grad()
    def compare_validation(self, loss, step):
        """Unweighted; and the output layer, which `PDLLinearCrossEntropyLoss` gathers, is sharded again."""
        batches = [
            batch for rank in range(len(self.data)) for batch in itertools.islice(batches_of(rank), VALIDATION_STEPS)
        ]
        _, expected = loss_of(self.config, whole_of(self.parameters()), batches, None)
        if self.has_loss:
            print(f"  validation {loss:.6f}, {expected:.6f} in plain torch")
            assert abs(loss / float(expected) - 1) < self.tolerance
            if isinstance(self.trainer.loss_fn, PDLLinearCrossEntropyLoss):
                assert isinstance(self.trainer.loss_fn.lm_head.weight, DTensor)


def configure(folder, loss, backend, **parallelism):
    config = make_config(folder)
    config.loss = loss
    config.dataloader = config.validator.dataloader = Batches.Config()
    config.validator.enable, config.validator.steps = True, VALIDATION_STEPS
    config.validator.freq = 1000  # only after the first step
    config.training.local_batch_size, config.training.seq_len, config.training.steps = ROWS, LENGTH, STEPS
    config.training.global_batch_size = PIECES * ROWS
    for name, value in {"spmd_backend": backend, **parallelism}.items():
        setattr(config.parallelism, name, value)
    return config


def losses_of(file):
    on_logits = PDLCrossEntropyLoss.Config(weights=file)
    linear = PDLLinearCrossEntropyLoss.Config(weights=file, chunk_size=17)
    return {
        "logits": on_logits,
        "chunks": ChunkedLossWrapper.Config(loss_fn=on_logits, num_chunks=4),
        "linear": linear,
        "linear tied": linear,  # the weight of the output layer is that of the embedding
        "linear bfloat16": linear,
    }


def data(folder, backend, name, losses):
    config = configure(folder, losses[name], backend)
    tolerance = 1e-5
    if name == "linear":  # the output layer is sharded when the loss is called; otherwise it happens to be whole
        config.parallelism.fsdp_reshard_after_forward = "always"
    if name == "linear tied":
        config.model_spec.model.enable_weight_tying = True
    if name == "linear bfloat16":
        config.training.mixed_precision_param = "bfloat16"
        tolerance = 0.03
    Watched(config, WORLD, tolerance).train()


def pipeline(folder, backend, name, losses):
    degrees = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "1F1B"}
    Watched(configure(folder, losses[name], backend, **degrees), 1, 1e-5).train()


def checked(folder, backend, name, losses):
    """Under debug.spmd_typechecking, which the stock validation does not pass."""
    train_checked(configure(folder, losses[name], backend), WORLD)


def checked_tensor(folder, backend, name, losses):
    train_checked(configure(folder, losses[name], backend, tensor_parallel_degree=2), WORLD // 2)


def train_checked(config, data_parallel):
    config.debug.spmd_typechecking = True
    config.validator.enable = False
    Watched(config, data_parallel, 1e-5).train()


def tensor(folder, backend, name, losses):
    """Each process has half of the output layer's rows; of four processes, each pair has data of its own."""
    if name == "shards":
        check_shards(folder)
        return
    config = configure(folder, losses[name], backend, tensor_parallel_degree=2)
    config.parallelism.fsdp_reshard_after_forward = "always"  # for `whole_of`, and see `data`
    Watched(config, WORLD // 2, 1e-5).train()


if __name__ == "__main__":
    folder, backend, kind, *names = sys.argv[1:]
    file = str(Path(folder) / "weights.safetensors")
    save_weights(file, W)  # each process writes the same
    for name in names:
        print(name)
        globals()[kind](folder, backend, name, losses_of(file))
    leave()
