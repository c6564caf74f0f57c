"""What a weight table does to a corpus, in numbers and in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pdl_kernels.data.tokenizers import special_token_ids, token_text
from pdl_kernels.weights.checks import check_table_and_counts
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.data_warnings import eos_warnings, mixture_warnings, special_token_warnings

MOST_FREQUENT_TYPES = 100
LISTED_TYPES = 10
# Beyond these numbers there is a warning. They are rules of thumb, not results of measurements.
SMALL_SAMPLE = 0.1  # effective share of the targets
LARGE_SHARE = 0.25  # of the weight, in one type
FAR_FROM_ONE = 2.0  # mean weight of a target, or its inverse
HEAVY_UNSEEN = 100.0  # times the mean weight of a target


@dataclass(frozen=True)
class WeightedType:
    """One vocabulary entry."""

    id: int
    text: str | None  # None without a tokenizer
    count: int | float
    weight: float
    share: float  # of the weight of all targets: count * weight / sum


@dataclass(frozen=True)
class Description:
    """What `describe` finds. Shares are fractions of 1; a type's share of the weight is count * weight / their sum.

    If every token were equally hard, the share of the weight would be the share of the loss. So it is a model of the
    loss before training, not a measurement of it.
    """

    vocab_size: int
    types_seen: int
    targets: int | float
    effective_sample: float  # (sum w)^2 / (n sum w^2) over the n targets: 1 if all weigh the same
    mean_weight: float  # of a target
    frequent_share: float  # of the weight, in the 100 most frequent types
    frequent_share_unweighted: float  # the same under plain cross entropy
    lightest: float  # weight among the types seen
    heaviest: float
    unseen_heaviest: float | None  # weight among the types never counted
    heaviest_types: tuple[WeightedType, ...]  # of all types, ten, by weight
    lightest_types: tuple[WeightedType, ...]  # of the types seen
    largest_types: tuple[WeightedType, ...]  # of the types seen, by share of the weight
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.targets:,} targets, {self.types_seen:,} of {self.vocab_size:,} types seen",
            f"effective sample size    {self.effective_sample:.1%} of the targets",
            f"mean weight of a target  {self.mean_weight:.4g}",
            f"weights of seen types    {self.lightest:.4g} to {self.heaviest:.4g}",
            f"weight in the {MOST_FREQUENT_TYPES} most frequent types  {self.frequent_share:.1%} "
            f"(plain cross entropy: {self.frequent_share_unweighted:.1%})",
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def describe(table: Tensor, counts: Tensor | TokenCounts, tokenizer: Any = None) -> Description:
    """What training with these weights on this corpus would mean.

    Args:
        table: (V,) weights.
        counts: (n,) counts of training targets, n <= V, or `TokenCounts`.
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`, to show tokens as text.

    Returns:
        Numbers, the heaviest and lightest types, and warnings in plain words; `print` shows the short form.

    Raises:
        ValueError: negative or non-finite weights or counts; more counts than weights; counts that are all 0.

    >>> print(describe(torch.tensor([0.5, 2.0]), torch.tensor([8, 2])))
    10 targets, 2 of 2 types seen
    effective sample size    64.0% of the targets
    mean weight of a target  0.8
    weights of seen types    0.5 to 2
    weight in the 100 most frequent types  100.0% (plain cross entropy: 100.0%)
    """
    weights, tokens = check_table_and_counts(table, counts)
    mass = weights * tokens  # (V,) weight of each type over the corpus
    total = mass.sum()
    seen = tokens > 0
    frequent = tokens.argsort(descending=True, stable=True)[:MOST_FREQUENT_TYPES]
    shares = mass / total if total > 0 else torch.zeros_like(mass)

    def listed(order: Tensor) -> tuple[WeightedType, ...]:
        return tuple(
            WeightedType(i, _text(tokenizer, i), _count(tokens[i]), weights[i].item(), shares[i].item())
            for i in order[:LISTED_TYPES].tolist()
        )

    by_weight = weights.argsort(descending=True, stable=True)
    by_lightness = weights.argsort(stable=True)
    by_share = shares.argsort(descending=True, stable=True)
    squares = (mass * weights).sum()
    found = Description(
        vocab_size=len(table),
        types_seen=int(seen.sum()),
        targets=_count(tokens.sum()),
        effective_sample=(total**2 / (tokens.sum() * squares)).item() if squares > 0 else 0.0,
        mean_weight=(total / tokens.sum()).item(),
        frequent_share=shares[frequent].sum().item(),
        frequent_share_unweighted=(tokens[frequent].sum() / tokens.sum()).item(),
        lightest=weights[seen].min().item(),
        heaviest=weights[seen].max().item(),
        unseen_heaviest=None if seen.all() else weights[~seen].max().item(),
        heaviest_types=listed(by_weight),
        lightest_types=listed(by_lightness[seen[by_lightness]]),
        largest_types=listed(by_share[seen[by_share]]),
        warnings=(),
    )
    warnings = [*_warnings(found), *_data_warnings(found, weights, tokens, counts, tokenizer)]
    return replace(found, warnings=tuple(warnings))


def _warnings(found: Description) -> Sequence[str]:
    warnings = []
    if found.mean_weight == 0:
        return ["every target weighs 0: nothing would be learned"]
    largest = found.largest_types[0]
    if largest.share > LARGE_SHARE and found.types_seen > 1:
        # A type that has such a share under plain cross entropy too does not owe it to the weights.
        plain = largest.count / found.targets
        if largest.share > 2 * plain:
            warnings.append(
                f"one token type holds {largest.share:.0%} of the weight: {_named(largest)}, counted "
                f"{largest.count:,} times (plain cross entropy gives it {plain:.2%})"
            )
    if found.effective_sample < SMALL_SAMPLE:
        warnings.append(
            f"the effective sample size is {found.effective_sample:.1%}: training is as noisy as on that share of the "
            "targets; a smaller alpha or a clip raises it"
        )
    if not 1 / FAR_FROM_ONE <= found.mean_weight <= FAR_FROM_ONE:
        warnings.append(
            f"a target weighs {found.mean_weight:.3g} on average: unless the loss divides by the weights, the learning "
            "rate would have to change by as much; normalize='token_mean' makes it 1"
        )
    if found.unseen_heaviest is not None and found.unseen_heaviest > HEAVY_UNSEEN * found.mean_weight:
        unseen = found.vocab_size - found.types_seen
        warnings.append(
            f"{unseen:,} token types were never counted and weigh up to {found.unseen_heaviest:.3g}: one occurrence "
            f"counts as much as {found.unseen_heaviest / found.mean_weight:,.0f} average targets; unseen=1.0 avoids it"
        )
    return warnings


def _data_warnings(
    found: Description, weights: Tensor, tokens: Tensor, counts: Tensor | TokenCounts, tokenizer: Any
) -> Sequence[str]:
    """What the counts themselves tell; which tokens are special, the tokenizer knows, or the counts remember."""
    known = counts if isinstance(counts, TokenCounts) else None
    special: Sequence[int] = known.special_ids if known else ()
    eos = known.eos_id if known else None
    if tokenizer is not None:
        special = special_token_ids(tokenizer)
        eos = getattr(tokenizer, "eos_token_id", None)

    def named(index: int) -> str:
        text = _text(tokenizer, index)
        return f"id {index}" if text is None else f"{text!r}, id {index}"

    mean = found.mean_weight
    return [
        *eos_warnings(eos, weights, tokens, known.sequences if known else 0, mean, named),
        *special_token_warnings(special, weights, tokens, mean, named),
        *(mixture_warnings(known) if known else ()),
    ]


def _named(entry: WeightedType) -> str:
    return f"id {entry.id}" if entry.text is None else f"{entry.text!r} (id {entry.id})"


def _text(tokenizer: Any, index: int) -> str | None:
    if tokenizer is None:
        return None
    try:
        return token_text(tokenizer, index)
    except (IndexError, KeyError, OverflowError):
        return None  # the output layer is longer than the tokenizer


def _count(value: Tensor) -> int | float:
    """An integer wherever it is one: counts may also be fractions."""
    return int(value) if value == value.round() else value.item()
