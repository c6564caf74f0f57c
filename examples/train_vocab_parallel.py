"""The output layer split over processes: each has some of the vocabulary, and all of them the loss of the whole.

    torchrun --nproc-per-node 2 examples/train_vocab_parallel.py     # or python examples/train_vocab_parallel.py

Any number of processes prints the same losses. On machines with several GPUs each process takes one.
"""

import argparse
import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from pdl_kernels import PowerLawWeighting, TokenCounts, pdl_linear_cross_entropy

STEPS, ROWS, V, H = 100, 32, 256, 64
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
gpus = torch.cuda.device_count() >= world  # of this machine
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
group = None
if world > 1:
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    group = dist.group.WORLD  # in a larger job, the group of tensor parallelism: mesh.get_group("tp")
torch.manual_seed(0), random.seed(0)  # every process makes the same model and draws the same lines


def batch_of(lines):  # bytes are the tokens; -100 where there is no loss
    rows = [torch.tensor(list(line)) for line in lines]
    inputs, labels = pad_sequence(rows, True, 0), pad_sequence(rows, True, -100)
    return inputs[:, :-1].to(device), labels[:, 1:].to(device)  # (B, L) each: position i predicts token i + 1


lines = [line for line in Path(argparse.__file__).read_bytes().splitlines() if len(line) > 1]  # your texts
counts = TokenCounts(vocab_size=V).update(batch_of(lines)[1], shift=False)  # of all targets
weights = PowerLawWeighting(alpha=0.4).table(counts).to(device)  # (V,), the whole table on every process
body = torch.nn.Embedding(V, H).to(device)  # yours, the same on every process
whole = torch.nn.Linear(H, V, bias=False).weight
head = torch.nn.Parameter(whole.detach().tensor_split(world)[rank].clone().to(device))  # (about V / world, H)
optimizer = torch.optim.AdamW([*body.parameters(), head], lr=3e-3)
for step in range(1, STEPS + 1):
    inputs, targets = batch_of(random.sample(lines, ROWS))
    # The gradient of the hidden states is summed over the group, so that the bodies stay the same.
    loss, stats = pdl_linear_cross_entropy(
        body(inputs), head, targets, weights, reduction="token_mean", group=group, return_stats=True
    )
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
    if rank == 0 and (step == 1 or step % 10 == 0):
        print(f"step {step:3}: loss {loss.item():.4f}, unweighted NLL {stats.nll.item():.4f} nats per target")
if world > 1:
    dist.barrier(), dist.destroy_process_group()
