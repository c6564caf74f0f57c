"""Unweighted NLL and accuracy of references, by how often a token is a target in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.decoding import Transform
from benchmarks.quality.encoding import IGNORED, States, batches_of_similar_length
from benchmarks.quality.language_model import LanguageModel

BUCKETS = ("frequent", "medium", "rare")
LIMITS = (0.5, 0.9)  # of all training targets: up to where types are frequent, and up to where they are medium
ROWS_AT_A_TIME = 1024


def assign_buckets(counts: Tensor) -> Tensor:  # (V,) int64 -> (V,) int64, indices into BUCKETS
    """A type belongs where the share of the targets *before* it lies, by falling count; unseen types are rare."""
    order = torch.argsort(counts, descending=True, stable=True)
    sorted_counts = counts[order]
    share_before = (sorted_counts.cumsum(0) - sorted_counts).double() / counts.sum()
    buckets = torch.bucketize(share_before, torch.tensor(LIMITS, dtype=torch.float64), right=True)
    return torch.empty_like(order).scatter_(0, order, buckets)


@dataclass(frozen=True)
class Targets:
    """The references' tokens: what the output layer is given for each, whose they are."""

    states: Tensor  # (N, H)
    labels: Tensor  # (N,)
    prompts: Tensor  # (N,) the number of the prompt

    def logits(self, model: LanguageModel) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the logits, (at most `ROWS_AT_A_TIME`, V), with their labels, on the model's device."""
        for states, labels in zip(self.states.split(ROWS_AT_A_TIME), self.labels.split(ROWS_AT_A_TIME), strict=True):
            yield model.logits(states), labels


@torch.inference_mode()
def find_targets(model: LanguageModel, states: States) -> Targets:
    """The upper part's states where a reference's token is predicted."""
    found, labels_found, prompts = [], [], []
    for rows in batches_of_similar_length([len(one.inputs) for one in states.encoded]):
        inputs, labels = (part.to(model.device) for part in states.batch(rows))
        counted = labels != IGNORED
        with model.autocast():
            found.append(model.above(inputs)[counted].float())
        labels_found.append(labels[counted])
        prompts.append(torch.tensor(rows)[:, None].expand(labels.shape)[counted.cpu()])
    return Targets(torch.cat(found), torch.cat(labels_found), torch.cat(prompts))


@dataclass(frozen=True)
class Score:
    """Sums over the tokens of each reference in each bucket: (P, 3)."""

    nll: np.ndarray  # float64
    correct: np.ndarray  # int64


@torch.inference_mode()
def score(
    model: LanguageModel, targets: Targets, transforms: Mapping[str, Transform], bucket_of: Tensor, prompts: int
) -> tuple[dict[str, Score], np.ndarray]:
    """A score for each way to read the logits, and the number of tokens (P, 3)."""
    place = (targets.prompts * len(BUCKETS) + bucket_of[targets.labels.cpu()]).numpy()
    nll: dict[str, list[Tensor]] = {name: [] for name in transforms}
    correct: dict[str, list[Tensor]] = {name: [] for name in transforms}
    for logits, labels in targets.logits(model):
        for name, transform in transforms.items():
            changed = transform(logits)
            at_target = changed.gather(1, labels[:, None])[:, 0]
            nll[name].append((changed.logsumexp(-1) - at_target).cpu())
            correct[name].append((changed.argmax(-1) == labels).cpu())

    def by_prompt(values: np.ndarray | None) -> np.ndarray:
        return np.bincount(place, values, minlength=prompts * len(BUCKETS)).reshape(prompts, len(BUCKETS))

    scores = {
        name: Score(
            by_prompt(torch.cat(nll[name]).double().numpy()),
            by_prompt(torch.cat(correct[name]).double().numpy()).astype(np.int64),
        )
        for name in transforms
    }
    return scores, by_prompt(None)
