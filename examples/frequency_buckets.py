"""Held-out scores by how often a token occurs in the training part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKETS = ("frequent", "medium", "rare")
# Upper limits of the first two buckets, as cumulative shares of the training tokens; the rest is rare.
FREQUENT_SHARE = 0.5
MEDIUM_SHARE = 0.9
BUCKET_DEFINITION = (
    "Token types are sorted by how often they are a target in the training part: frequent = the most common types up "
    f"to {FREQUENT_SHARE:.0%} of all training targets, medium = the next {MEDIUM_SHARE - FREQUENT_SHARE:.0%}, "
    f"rare = the last {1 - MEDIUM_SHARE:.0%} and every type never seen there."
)


class ShowsNothingError(Exception):
    """The run cannot show what it was started for."""


@dataclass(frozen=True)
class Score:
    """Unweighted: each held-out token counts once, whatever its weight in training."""

    nll: float
    accuracy: float
    tokens: int


def assign_buckets(counts: Tensor) -> Tensor:  # (V,) int64 -> (V,) int64, indices into BUCKETS
    """The bucket of every token type.

    A type belongs where the cumulative share *before* it lies: the type that crosses a limit is the last one below
    it, and every type never seen is rare. Ties go by token id.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("counts are all 0: there are no training targets to sort the types by")
    order = torch.argsort(counts, descending=True, stable=True)
    sorted_counts = counts[order]
    share_before = (sorted_counts.cumsum(0) - sorted_counts).double() / total
    limits = torch.tensor([FREQUENT_SHARE, MEDIUM_SHARE], dtype=torch.float64)
    in_order = torch.bucketize(share_before, limits, right=True)
    return torch.empty_like(order).scatter_(0, order, in_order)


def describe_buckets(
    counts: Tensor,  # (V,) int64
    weights: Tensor,  # (V,) float32
    bucket_of: Tensor,  # (V,) int64
    held_out_targets: Tensor,  # any shape, int64
) -> dict[str, dict[str, float]]:
    """Sizes of every bucket, and its mean weight over the training targets."""
    held_out_bucket = bucket_of[held_out_targets]
    described: dict[str, dict[str, float]] = {}
    for index, name in enumerate(BUCKETS):
        inside = bucket_of == index
        tokens = int(counts[inside].sum())
        described[name] = {
            "types": int(inside.sum()),
            "types_never_seen": int((inside & (counts == 0)).sum()),
            "training_tokens": tokens,
            "held_out_tokens": int((held_out_bucket == index).sum()),
            "mean_weight": (weights[inside].double() * counts[inside]).sum().item() / max(tokens, 1),
        }
    return described


def scores_by_bucket(
    nll: Tensor,  # (N,) float32, -log p(target)
    correct: Tensor,  # (N,) bool
    targets: Tensor,  # (N,) int64
    bucket_of: Tensor,  # (V,) int64
) -> dict[str, Score]:
    """Mean NLL and accuracy in each bucket and overall."""
    bucket = bucket_of[targets]
    rows = {name: bucket == index for index, name in enumerate(BUCKETS)} | {"overall": torch.ones_like(correct)}
    return {
        name: Score(nll[chosen].double().mean().item(), correct[chosen].double().mean().item(), int(chosen.sum()))
        for name, chosen in rows.items()
    }


def require_every_bucket(buckets: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a held-out part that leaves a bucket without a single token."""
    empty = [name for name in BUCKETS if buckets[name]["held_out_tokens"] == 0]
    if empty:
        raise ShowsNothingError(
            f"no held-out token in the bucket {' and '.join(empty)}: the comparison by frequency would show nothing; "
            "evaluate more held-out sequences"
        )


def require_telling_scores(scores: Mapping[str, Mapping[str, Score]]) -> None:
    """Refuse results of a run that diverged, or in which no model ever predicts a token of medium frequency."""
    for model, by_bucket in scores.items():
        if not all(math.isfinite(score.nll) for score in by_bucket.values()):
            raise ShowsNothingError(f"the held-out NLL of {model} is not finite: try a lower learning rate")
    if all(by_bucket["medium"].accuracy == 0 for by_bucket in scores.values()):
        raise ShowsNothingError(
            "the accuracy in the medium bucket is 0 for every model: not one such token is predicted"
        )
