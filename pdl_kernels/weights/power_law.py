"""The power law: its bare formula, what a recipe adds to a formula, the recommended preset, and a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pdl_kernels.weights.checks import check_counts, check_finite, check_number, check_table
from pdl_kernels.weights.counts import TokenCounts

NORMALIZATIONS = ("token_mean", "vocabulary_mean", "max", None)


def power_law_weights(counts: Tensor | TokenCounts, alpha: float = 1.0, eps: float = 1e-7) -> Tensor:
    """The paper's weights: w(t) = 1 / (freq(t) + eps) ** alpha.

    Args:
        counts: (V,) how often each vocabulary entry occurs among the training targets; any real dtype, >= 0. As long
            as the model's output layer, not as the tokenizer. Or `TokenCounts`.
        alpha: strength >= 0; 0 gives weights of 1.
        eps: added to every count, in tokens, >= 0. The paper's defaults are alpha=1 and eps=1e-7: an entry never
            counted then weighs 1e7 and can own a whole batch, so count what is trained on, EOS included.

    Returns:
        (V,) float32 on the device of `counts`, computed in float64.

    Raises:
        ValueError: counts that are not 1-D, negative or not finite; alpha or eps negative or not finite; a weight that
            would be infinite (eps=0 with a count of 0) or beyond float32.
        TypeError: counts that are no real tensor.

    >>> power_law_weights(torch.tensor([100, 4, 0]), alpha=0.5, eps=1.0).tolist()  # doctest: +ELLIPSIS
    [0.0995..., 0.447..., 1.0]

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """
    check_number("alpha", alpha, 0, math.inf)
    check_number("eps", eps, 0, math.inf)
    frequencies = check_counts(counts)
    weights = (1.0 / (frequencies + eps) ** alpha).to(torch.float32)
    check_finite(weights, frequencies, f"eps {eps}, alpha {alpha}")
    return weights


class Frequencies(NamedTuple):
    """What a formula may use, in float64."""

    tokens: Tensor  # (V,) targets per vocabulary entry
    documents: Tensor | None  # (V,) sequences that hold it
    sequences: int


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """From counts to a (V,) float32 table, in this order: formula, normalise, clip, unseen, neutral.

    A subclass gives the formula; what follows it is the same for all. After it, 1 means "as plain cross entropy".

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
        if isinstance(self.unseen, str):
            if self.unseen not in ("formula", "cap"):
                raise ValueError(f"unseen is {self.unseen!r}; accepted are a number >= 0, 'formula' and 'cap'")
        else:
            check_number("unseen", self.unseen, 0, math.inf)
        # Frozen, so that a recipe on file stays true: lists from a user or from JSON become tuples here.
        object.__setattr__(self, "neutral_ids", _check_ids(self.neutral_ids))
        object.__setattr__(self, "clip", _check_clip(self.clip))

    def formula(self, frequencies: Frequencies) -> Tensor:
        """(V,) float64 weights before anything else is done; may be infinite where a count is 0."""
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
        weights = torch.where(neutral, 1.0, weights).to(torch.float32)
        check_finite(weights, frequencies.tokens, repr(self))
        return weights

    def _divisor(self, weights: Tensor, tokens: Tensor) -> float:
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


@dataclass(frozen=True)
class PowerLawWeighting(Weighting):
    """w(t) = 1 / (freq(t) + eps) ** alpha, the weights of Power-Law Decay Loss; the defaults are our preset.

    Args:
        alpha: strength >= 0; 0 gives weights of 1. With it rises how far the model is moved from natural text: its
            optimum is p(y|x) / freq(y)**alpha, normalised.
        eps: tokens added to each count, >= 0.
        normalize, unseen, neutral_ids, clip: see `Weighting`.

    >>> PowerLawWeighting(alpha=0.5, eps=0.0).table(torch.tensor([16, 4, 0])).tolist()  # doctest: +ELLIPSIS
    [0.833..., 1.666..., 1.0]

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900; the preset is this package's.
    """

    alpha: float = 0.4
    eps: float = 1.0

    name: ClassVar[str] = "power_law"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0, math.inf)
        check_number("eps", self.eps, 0, math.inf)

    @classmethod
    def paper(cls) -> PowerLawWeighting:
        """alpha=1, eps=1e-7, the formula for every entry and nothing else: what the paper's authors use.

        A type never counted weighs 1e7: one EOS that was left out of the counts can own a batch.
        """
        return cls(alpha=1.0, eps=1e-7, normalize=None, unseen="formula")

    def formula(self, frequencies: Frequencies) -> Tensor:
        return 1.0 / (frequencies.tokens + self.eps) ** self.alpha


@dataclass(frozen=True)
class WeightSchedule:
    """From plain cross entropy to the table: w_eff(step) = 1 + r (w - 1), r = (step - start) / steps, within 0 and 1.

    Args:
        table: (V,) weights at the end.
        steps: length of the ramp, in steps, >= 0; 0 jumps at `start`.
        start: steps of plain cross entropy before it, >= 0.

    >>> WeightSchedule(torch.tensor([3.0, 0.5]), steps=4).weights_at(1).tolist()
    [1.5, 0.875]
    """

    table: Tensor
    steps: int
    start: int = 0

    def __post_init__(self) -> None:
        check_table(self.table)
        check_number("steps", self.steps, 0, math.inf)
        check_number("start", self.start, 0, math.inf)

    def ratio_at(self, step: int) -> float:
        """r, from 0 to 1."""
        if step < self.start:
            return 0.0
        return 1.0 if self.steps == 0 else min((step - self.start) / self.steps, 1.0)

    def weights_at(self, step: int, out: Tensor | None = None) -> Tensor:
        """(V,) float32 weights of this step on the table's device; written to `out` where one is given.

        `out` may be the `weights` of a `PDLCrossEntropyLoss` on any device: `schedule.weights_at(step, loss.weights)`.
        """
        check_number("step", step, 0, math.inf)
        ratio = self.ratio_at(step)
        # At the end the table itself, not 1 + (w - 1), which would round small weights away.
        table = self.table.detach().float()
        weights = table if ratio == 1 else torch.lerp(torch.ones_like(table), table, ratio)
        return weights.clone() if out is None else out.copy_(weights)


def _check_ids(ids: Iterable[int]) -> tuple[int, ...]:
    checked = tuple(sorted(set(ids)))
    for index in checked:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"neutral_ids hold a {type(index).__name__}; accepted are integer ids")
        if index < 0:
            raise ValueError(f"neutral_ids hold {index}; accepted are ids >= 0")
    return checked


def _check_clip(clip: Iterable[float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    bounds = tuple(clip)
    if len(bounds) != 2 or not all(isinstance(b, (int, float)) and not isinstance(b, bool) for b in bounds):
        raise ValueError(f"clip is {clip!r}; accepted are two numbers (low, high), or None")
    low, high = float(bounds[0]), float(bounds[1])
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
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size is a {type(vocab_size).__name__}; accepted is an integer")
        missing = vocab_size - len(tokens)
        if missing < 0:
            raise ValueError(f"vocab_size is {vocab_size}; accepted are integers >= {len(tokens)}, the counts' length")
        pad = torch.nn.functional.pad
        tokens = pad(tokens, (0, missing))
        documents = None if documents is None else pad(documents, (0, missing))
    return Frequencies(tokens, documents, sequences)
