"""What every recipe for weights has in common: which counts its formula gets, and what follows the formula."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pdl_kernels.weights.checks import check_counts, check_integer, check_number, first_false, is_number
from pdl_kernels.weights.counts import TokenCounts

NORMALIZATIONS = ("token_mean", "vocabulary_mean", "max", None)


class Frequencies(NamedTuple):
    """The counts that a formula may use, in float64."""

    tokens: Tensor  # (V,) targets per vocabulary entry
    documents: Tensor | None  # (V,) sequences that hold the entry
    sequences: int


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """From counts to a (V,) float32 table, in this order: formula, normalise, clip, unseen, neutral.

    A subclass gives the formula; the steps after it are the same for all. In the finished table, 1 means "as plain
    cross entropy".

    Args:
        normalize: divide by, over the types seen and not neutral: "token_mean" sum_t n(t) w(t) / sum_t n(t), so that
            the loss is on average as large as plain cross entropy's and one learning rate suits both;
            "vocabulary_mean" the mean over types; "max" the largest; None divides by nothing.
        unseen: the weight of types never counted: a number >= 0; "cap", the largest weight of a seen type; "formula",
            whatever the formula gives for a count of 0 (normalised and clipped with the others).
        neutral_ids: types of weight 1 whatever their count, such as `special_token_ids(tokenizer)`.
        clip: (low, high), applied after normalising; None clips nothing.
    """

    normalize: str | None = "token_mean"
    unseen: float | str = 1.0
    neutral_ids: tuple[int, ...] = ()
    clip: tuple[float, float] | None = None

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATIONS:
            accepted = ", ".join(map(repr, NORMALIZATIONS))
            raise ValueError(f"normalize is {self.normalize!r}; accepted are {accepted}")
        if not isinstance(self.unseen, str):
            check_number("unseen", self.unseen)
        elif self.unseen not in ("formula", "cap"):
            raise ValueError(f"unseen is {self.unseen!r}; accepted are a number >= 0, 'formula' and 'cap'")
        # A recipe must not change after it was saved with a table, so lists become tuples.
        object.__setattr__(self, "neutral_ids", _sorted_ids(self.neutral_ids))
        object.__setattr__(self, "clip", _bounds(self.clip))

    def formula(self, frequencies: Frequencies) -> Tensor:
        """(V,) float64 weights before the steps that follow; may be infinite where a count is 0."""
        raise NotImplementedError

    def table(self, counts: Tensor | TokenCounts, vocab_size: int | None = None) -> Tensor:
        """The weights.

        Args:
            counts: (n,) counts of training targets, >= 0, or `TokenCounts`.
            vocab_size: V, the width of the model's output layer; entries from n on were never counted. Default n.

        Returns:
            (V,) float32 on the CPU, computed in float64: the same counts and recipe give the same bits.

        Raises:
            ValueError: V < n; a neutral id outside [0, V); no type is both seen and not neutral where one is needed to
                normalise or to cap; weights that are not finite in float32, or that vanish where they are to be
                normalised; counts as in `power_law_weights`.
        """
        frequencies = _frequencies(counts, vocab_size)
        size = len(frequencies.tokens)
        if self.neutral_ids and self.neutral_ids[-1] >= size:
            raise ValueError(f"neutral_ids hold {self.neutral_ids[-1]}; accepted are ids from 0 to {size - 1}")
        neutral = torch.zeros(size, dtype=torch.bool)
        neutral[list(self.neutral_ids)] = True
        seen = frequencies.tokens > 0
        chosen = seen & ~neutral
        weights = self.formula(frequencies)
        if self.normalize is not None:
            weights = weights / self._divisor(weights[chosen], frequencies.tokens[chosen])
        if self.clip is not None:
            weights = weights.clamp(*self.clip)
        if self.unseen == "cap":
            if not chosen.any():
                raise ValueError("unseen is 'cap', and no type is seen and not neutral: there is no largest weight")
            weights = torch.where(seen, weights, weights[chosen].max())
        elif self.unseen != "formula":
            weights = torch.where(seen, weights, float(self.unseen))
        return finite_float32(torch.where(neutral, 1.0, weights), frequencies.tokens, repr(self))

    def _divisor(self, weights: Tensor, tokens: Tensor) -> float:
        """What the weights are divided by; `weights` and `tokens` are those of the types seen and not neutral."""
        if len(weights) == 0:
            raise ValueError(
                f"normalize is {self.normalize!r}, and no type is both seen and not neutral: count training targets "
                "first, or pass normalize=None"
            )
        if self.normalize == "token_mean":
            divisor = (weights * tokens).sum() / tokens.sum()
        else:
            divisor = weights.mean() if self.normalize == "vocabulary_mean" else weights.max()
        if not (divisor > 0 and divisor.isfinite()):
            raise ValueError(f"the weights cannot be normalised: their {self.normalize} is {divisor.item()} ({self!r})")
        return divisor.item()

    def recipe(self) -> dict[str, Any]:
        """Everything that makes the table, as JSON can hold it. `from_recipe` reads it."""
        return {"name": self.name, **asdict(self)}


def finite_float32(weights: Tensor, counts: Tensor, recipe: str) -> Tensor:
    """The (V,) weights in float32; ValueError names the first that float32 cannot hold."""
    rounded = weights.to(torch.float32)
    position = first_false(rounded.isfinite())
    if position is not None:
        raise ValueError(
            f"the weight of entry {position} (count {counts[position].item():g}, {recipe}) is not finite in float32; "
            "accepted are values that keep it finite, such as eps=1, or a number for unseen"
        )
    return rounded


def _sorted_ids(ids: Iterable[int]) -> tuple[int, ...]:
    given = tuple(ids)
    for position, index in enumerate(given):
        check_integer(f"neutral_ids[{position}]", index)
    return tuple(sorted(set(given)))


def _bounds(clip: Iterable[float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    bounds = tuple(clip)
    if len(bounds) != 2 or not all(map(is_number, bounds)):
        raise ValueError(f"clip is {clip!r}; accepted are two numbers (low, high), or None")
    low, high = map(float, bounds)
    if not 0 <= low <= high:
        raise ValueError(f"clip is {clip!r}; accepted are 0 <= low <= high")
    return low, high


def _frequencies(counts: Tensor | TokenCounts, vocab_size: int | None) -> Frequencies:
    tokens = check_counts(counts).cpu()
    documents, sequences = None, 0
    if isinstance(counts, TokenCounts):
        sequences = counts.sequences
        if counts.document_counts is not None:
            documents = counts.document_counts.double()
    if vocab_size is not None:
        check_integer("vocab_size", vocab_size, len(tokens), why=", the counts' length")
        missing = (0, vocab_size - len(tokens))
        tokens = torch.nn.functional.pad(tokens, missing)
        documents = None if documents is None else torch.nn.functional.pad(documents, missing)
    return Frequencies(tokens, documents, sequences)
