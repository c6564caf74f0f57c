"""Training of the upper part, with a learning rate that validation chooses."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.arms import Arm, undoing_bias
from benchmarks.quality.decoding import Transform
from benchmarks.quality.encoding import IGNORED, States
from benchmarks.quality.language_model import LanguageModel
from benchmarks.quality.scoring import Targets
from pdl_kernels import TokenCounts

BATCHES_SORTED_TOGETHER = 16
GRADIENT_NORM = 1.0


def draw_batches(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """One shuffled epoch in batches of sequences of similar length, the batches in random order.

    A run of several batches is sorted by length and cut, so that little is padded and a batch is still random.
    """
    generator = random.Random(seed)
    rows = generator.sample(range(len(lengths)), len(lengths))
    batches = []
    window = batch_size * BATCHES_SORTED_TOGETHER
    for start in range(0, len(rows), window):
        together = sorted(rows[start : start + window], key=lambda row: lengths[row])
        batches += [together[at : at + batch_size] for at in range(0, len(together), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size]
    generator.shuffle(batches)
    return batches


def train(
    model: LanguageModel,
    arm: Arm,
    weights: Tensor | None,  # (V,)
    states: States,
    batches: list[list[int]],
    learning_rate: float,
    description: str,
) -> list[float]:
    """Train from the initial parameters; AdamW, the rate falls linearly to 0. Returns the loss of each step."""
    model.restore()
    optimiser = torch.optim.AdamW(model.parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / len(batches))
    losses: list[Tensor] = []
    with tqdm(batches, desc=description, unit="step", dynamic_ncols=True, leave=False) as progress:
        for rows in progress:
            inputs, labels = (part.to(model.device) for part in states.batch(rows))
            counted = labels != IGNORED
            with model.autocast():
                logits = model.training_logits(model.above(inputs)[counted])  # (N, V): only rows that have a target
            loss = arm.loss(logits, labels[counted], weights)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters, GRADIENT_NORM)
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


@dataclass(frozen=True)
class Validation:
    """Two ways to judge a learning rate; smaller is better for both."""

    calibrated_nll: float  # unweighted, of the logits with the shift undone: a model of natural text
    own_loss: float  # the loss that was trained, of targets whose types were seen in training


@torch.inference_mode()
def validate(
    model: LanguageModel, arm: Arm, weights: Tensor | None, targets: Targets, counts: TokenCounts
) -> Validation:
    undone = Transform(None if weights is None else undoing_bias(weights, counts))
    seen_types = counts.counts.to(model.device) > 0
    nll, own, count, seen_count = 0.0, 0.0, 0, 0
    for logits, labels in targets.logits(model):
        nll += float(F.cross_entropy(undone(logits), labels, reduction="sum"))
        count += len(labels)
        seen = seen_types[labels]
        if not seen.any():
            continue
        own += float(arm.loss(logits[seen], labels[seen], weights)) * int(seen.sum())
        seen_count += int(seen.sum())
    return Validation(nll / count, own / seen_count)
