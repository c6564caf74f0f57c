"""One of two processes that run what docs/distributed.md shows."""

import re
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers.ranks import leave
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy
from reference.pdl import reference_cross_entropy

PAGE = Path(__file__).resolve().parents[3] / "docs" / "distributed.md"
B, S, V, H = 2, 6, 50, 8
SNIPPETS = {}
for snippet in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
    exec(snippet, SNIPPETS)
WEIGHTS = torch.rand(V, generator=torch.Generator().manual_seed(1)) * 3


class Model(nn.Module):
    def __init__(self, head=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H))
        self.lm_head = head(H, V, bias=False)
        self.double()

    def forward(self, inputs, *of_the_loss):
        return self.lm_head(self.body(inputs), *of_the_loss)


def batch(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (rows, S), generator=generator)
    targets[0, : S // 2] = -100
    return torch.randint(V, (rows, S), generator=generator), targets


def gradients_of_one_process(inputs, targets):
    model = Model()
    loss, _ = reference_cross_entropy(model(inputs), targets, WEIGHTS, normalizer=(targets != -100).sum())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_gradients(model, expected):
    for name, parameter in model.named_parameters():
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def check_step(rank, world):
    """Unequal numbers of tokens and micro-batches; gradients are averaged, as DistributedDataParallel does."""
    inputs, targets = batch(4)
    mine = [(0, 1)] if rank == 0 else [(1, 2), (2, 4)]
    model = Model()
    parts = [(inputs[begin:end], targets[begin:end]) for begin, end in mine]
    SNIPPETS["step"](model, parts, WEIGHTS, world)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world
    check_gradients(model, gradients_of_one_process(inputs, targets))


def check_megatron(rank):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(S, B, V, dtype=torch.float64, generator=generator)
    _, labels = batch(B)
    own = slice(0, 30) if rank == 0 else slice(30, V)
    part = logits[..., own].clone().requires_grad_()
    losses = SNIPPETS["language_model_loss"](labels, part, WEIGHTS, dist.group.WORLD)
    whole = logits.clone().requires_grad_()
    expected, _ = reference_cross_entropy(whole, labels.t(), WEIGHTS, reduction="none")
    torch.testing.assert_close(losses, expected.detach().t(), rtol=1e-12, atol=1e-12)
    upstream = torch.rand(B, S, dtype=torch.float64, generator=generator)
    losses.backward(upstream), expected.backward(upstream.t())
    torch.testing.assert_close(part.grad, whole.grad[..., own], rtol=1e-10, atol=1e-14)


def check_dtensor(world):
    inputs, targets = batch(B)
    model = SNIPPETS["with_split_head"](Model(), init_device_mesh("cpu", (world,)))
    logits = model(inputs)
    assert isinstance(logits, DTensor)
    assert logits.to_local().shape[-1] == V // world
    loss = pdl_cross_entropy(logits, targets, WEIGHTS, normalizer=(targets != -100).sum())
    loss.backward()
    check_gradients(model, gradients_of_one_process(inputs, targets))


def check_fsdp(rank, world):
    """Gathered once for the step, the output layer among it, though the loss takes its tokens in chunks."""
    inputs, targets = batch(4)
    part = slice(rank * 2, rank * 2 + 2)
    head = SNIPPETS["LossHead"]
    model = SNIPPETS["sharded"](Model(head))
    assert isinstance(model.lm_head.weight, DTensor)
    n = SNIPPETS["global_normalizer"](targets[part])
    chunked = lambda *arguments, **options: pdl_linear_cross_entropy(*arguments, chunk_size=2, **options)  # noqa: E731
    gathers = Counter()
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real = getattr(distributed_c10d, name)

    def counted(output, *arguments, **options):
        gathers[output.numel() >= V * H] += 1
        return real(output, *arguments, **options)

    with mock.patch.dict(SNIPPETS, pdl_linear_cross_entropy=chunked), mock.patch.object(dist, name, counted):
        loss = model(inputs[part], targets[part], WEIGHTS, n)
        (loss * world).backward()
    assert sum(gathers.values()) == 2, gathers  # of the output layer, and of all other parameters
    check_gradients(model, gradients_of_one_process(inputs, targets))

    weight = model.lm_head.weight
    hidden = torch.randn(2, H, dtype=torch.float64)
    for placements, summed in ((None, False), ([Partial()], True)):
        weight.grad = None
        gathered = weight.full_tensor(grad_placements=placements)
        pdl_linear_cross_entropy(hidden, gathered, torch.tensor([rank, 3]), reduction="sum").backward()
        alone = gathered.detach().requires_grad_()
        pdl_linear_cross_entropy(hidden, alone, torch.tensor([rank, 3]), reduction="sum").backward()
        dist.all_reduce(alone.grad)
        off = (weight.grad.full_tensor() - alone.grad).abs().max()
        assert (off < 1e-12) == summed, "what the page says of full_tensor"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    check_step(rank, world)
    check_megatron(rank)
    check_dtensor(world)
    check_fsdp(rank, world)
    print("as on the page")
    leave()
