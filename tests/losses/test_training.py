"""The loss inside training: the same curve as the reference, and gradients across two processes."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from pdl_kernels import pdl_cross_entropy, power_law_weights
from reference import reference_cross_entropy

V, HIDDEN, ROWS = 64, 16, 32


def corpus(rows, seed=0):
    """A bigram language with Zipf frequencies: contexts and the tokens that follow them."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    contexts = torch.multinomial(frequencies, rows, replacement=True, generator=generator)
    noise = torch.multinomial(frequencies, rows, replacement=True, generator=generator)
    follows = torch.where(torch.rand(rows, generator=generator) < 0.7, (contexts * 7 + 3) % V, noise)
    return contexts, follows


class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.nn.Parameter(torch.randn(V, HIDDEN, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(V, HIDDEN, generator=generator) * 0.1)

    def forward(self, contexts):
        return self.embedding[contexts] @ self.head.t()


def train(loss_function, device, rows_per_step, steps=200):
    model = Bigram().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2 / steps)
    contexts, targets = (t.to(device) for t in corpus(steps * rows_per_step))
    weights = power_law_weights(torch.bincount(targets, minlength=V), alpha=0.7, eps=1.0)
    curve = []
    for step in range(steps):
        rows = slice(step * rows_per_step, (step + 1) * rows_per_step)
        optimizer.zero_grad()
        loss = loss_function(model(contexts[rows]), targets[rows], weights)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve), model


def test_same_curve_as_the_reference(backend, device):
    interpreted = backend == "triton" and device.type == "cpu"
    rows, steps = (4, 80) if interpreted else (ROWS, 200)  # the interpreter takes some 30 ms a row
    ours, model = train(
        lambda z, y, w: pdl_cross_entropy(z, y, w, backend=backend, logit_scale=0.9), device, rows, steps
    )
    expected, reference_model = train(
        lambda z, y, w: reference_cross_entropy(z.cpu(), y.cpu(), w.cpu(), logit_scale=0.9)[0].float().to(device),
        device,
        rows,
        steps,
    )
    quarter = steps // 4
    assert expected[-quarter:].mean() < 0.8 * expected[:quarter].mean(), "nothing was learnt"
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(model.head.detach(), reference_model.head.detach(), rtol=2e-2, atol=2e-2)


def _worker(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    contexts, targets = corpus(ROWS)
    targets[: ROWS // 4] = -100  # the first rank counts fewer tokens than the second
    weights = power_law_weights(torch.bincount(targets[targets >= 0], minlength=V), alpha=0.7, eps=1.0)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    count = (targets[half] != -100).sum()
    dist.all_reduce(count)
    model = torch.nn.parallel.DistributedDataParallel(Bigram())
    # DDP averages gradients over ranks, so that the shared denominator enters divided by their number.
    loss = pdl_cross_entropy(model(contexts[half]), targets[half], weights, normalizer=count) * 2
    loss.backward()
    # A rank on which nothing is counted must take part in the reduction all the same, or the others wait forever.
    empty = targets[half] if rank else torch.full_like(targets[half], -100)
    pdl_cross_entropy(model(contexts[half]), empty, weights, normalizer=count).backward()
    if rank == 0:
        queue.put(model.module.head.grad.numpy().copy())
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_a_shared_normalizer():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_worker, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    gradient = torch.from_numpy(queue.get(timeout=120))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0

    contexts, targets = corpus(ROWS)
    targets[: ROWS // 4] = -100
    weights = power_law_weights(torch.bincount(targets[targets >= 0], minlength=V), alpha=0.7, eps=1.0)
    model, count = Bigram(), (targets != -100).sum()
    pdl_cross_entropy(model(contexts), targets, weights, normalizer=count).backward()
    # The second step of the workers adds what rank 1 alone saw, averaged over two ranks.
    second = slice(ROWS // 2, ROWS)
    (pdl_cross_entropy(model(contexts[second]), targets[second], weights, normalizer=count) / 2).backward()
    torch.testing.assert_close(gradient, model.head.grad, rtol=1e-4, atol=1e-6)
