"""PDL in a loop of plain PyTorch: one denominator for all micro-batches of a step, however unequal they are."""

import argparse
import random
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from pdl_kernels import PowerLawWeighting, TokenCounts, global_normalizer, pdl_cross_entropy

STEPS, MICRO_BATCHES, ROWS = 100, 4, 8
torch.manual_seed(0), random.seed(0)


def batch_of(lines):  # bytes are the tokens; -100 where there is no loss
    rows = [torch.tensor(list(line)) for line in lines]
    inputs, labels = pad_sequence(rows, True, 0), pad_sequence(rows, True, -100)
    return inputs[:, :-1], labels[:, 1:]  # (B, L) each: position i predicts token i + 1


lines = [line for line in Path(argparse.__file__).read_bytes().splitlines() if len(line) > 1]  # your texts
counts = TokenCounts(vocab_size=256).update(batch_of(lines)[1], shift=False)  # of all targets
weights = PowerLawWeighting(alpha=0.4).table(counts)  # (V,), mean 1 over the counted targets
model = torch.nn.Sequential(torch.nn.Embedding(256, 64), torch.nn.Linear(64, 256))  # yours
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(1, STEPS + 1):
    micro_batches = [batch_of(random.sample(lines, ROWS)) for _ in range(MICRO_BATCHES)]
    targets_of_step = global_normalizer([targets for _, targets in micro_batches])  # of all processes, if there are
    loss = nll = 0.0
    for inputs, targets in micro_batches:
        # The parts add up to the loss of one big batch, and their gradients to its gradient.
        options = {"normalizer": targets_of_step, "return_stats": True}
        part, stats = pdl_cross_entropy(model(inputs), targets, weights, **options)
        part.backward()
        loss, nll = loss + part.item(), nll + (stats.nll * stats.token_count / targets_of_step).item()
    optimizer.step(), optimizer.zero_grad()
    if step == 1 or step % 10 == 0:
        print(f"step {step:3}: loss {loss:.3f}, unweighted NLL {nll:.3f} nats per target")
