"""Other recipes from the literature, for comparison, and every recipe by its name."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pdl_kernels.weights.checks import check_number
from pdl_kernels.weights.power_law import PowerLawWeighting
from pdl_kernels.weights.weighting import Frequencies, Weighting


@dataclass(frozen=True)
class InverseFrequencyWeighting(Weighting):
    """w(t) = 1 / freq(t): every type seen gets the same share of the weight. PDL with alpha=1 and eps=0.

    Args: see `Weighting`. unseen="formula" is refused when the table is made: it would be 1 / 0.

    >>> InverseFrequencyWeighting().table(torch.tensor([8, 2])).tolist()
    [0.625, 2.5]

    Source: inverse class frequency, as compared against in Cui et al., Class-Balanced Loss Based on Effective Number of
    Samples, CVPR 2019, arXiv 1901.05555; for tokens, the inverse token frequency loss of Nakamura et al., arXiv
    1811.08100.
    """

    name: ClassVar[str] = "inverse"

    def formula(self, frequencies: Frequencies) -> Tensor:
        return 1.0 / frequencies.tokens


@dataclass(frozen=True)
class SquareRootInverseFrequencyWeighting(Weighting):
    """w(t) = 1 / sqrt(freq(t)). PDL with alpha=0.5 and eps=0.

    Args: see `Weighting`. unseen="formula" is refused when the table is made: it would be 1 / 0.

    >>> SquareRootInverseFrequencyWeighting(normalize=None).table(torch.tensor([16, 4])).tolist()
    [0.25, 0.5]

    Source: square-root sampling, Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, ECCV 2018,
    arXiv 1805.00932.
    """

    name: ClassVar[str] = "square_root_inverse"

    def formula(self, frequencies: Frequencies) -> Tensor:
        return frequencies.tokens.rsqrt()


@dataclass(frozen=True)
class ClassBalancedWeighting(Weighting):
    """w(t) = (1 - beta) / (1 - beta ** freq(t)), the inverse of the effective number of samples.

    beta=0 gives weights of 1; beta towards 1 gives 1 / freq(t), which is InverseFrequencyWeighting. At counts well
    above 1 / (1 - beta) a type's weight stops falling.

    Args:
        beta: >= 0 and < 1.
        normalize, unseen, neutral_ids, clip: see `Weighting`. unseen="formula" is refused when the table is made.

    >>> ClassBalancedWeighting(beta=0.5, normalize=None).table(torch.tensor([1, 2])).tolist()  # doctest: +ELLIPSIS
    [1.0, 0.666...]

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, arXiv 1901.05555.
    """

    beta: float = 0.9999

    name: ClassVar[str] = "class_balanced"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, 0, 1, ends="[)", why="; its limit at 1 is InverseFrequencyWeighting")

    def formula(self, frequencies: Frequencies) -> Tensor:
        if self.beta == 0:
            return torch.where(frequencies.tokens > 0, 1.0, torch.inf).double()
        # 1 - beta ** n would cancel where beta is near 1; expm1 does not.
        return (1 - self.beta) / -torch.expm1(frequencies.tokens * math.log(self.beta))


@dataclass(frozen=True)
class SmoothedInverseWeighting(Weighting):
    """w(t) = a / (a + p(t)), p(t) = freq(t) / sum of all counts: near 1 for rare types, falling once p(t) exceeds a.

    Args:
        a: > 0, a probability; 1e-3 to 1e-4 in the source.
        normalize, unseen, neutral_ids, clip: see `Weighting`.

    >>> SmoothedInverseWeighting(a=0.25, normalize=None).table(torch.tensor([3, 1])).tolist()
    [0.25, 0.5]

    Source: smooth inverse frequency, Arora, Liang and Ma, A Simple but Tough-to-Beat Baseline for Sentence Embeddings,
    ICLR 2017.
    """

    a: float = 1e-3

    name: ClassVar[str] = "smoothed_inverse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("a", self.a, 0, 1, ends="(]")

    def formula(self, frequencies: Frequencies) -> Tensor:
        total = frequencies.tokens.sum()
        if total == 0:
            raise ValueError("counts are all 0; accepted are counts of at least one target")
        return self.a / (self.a + frequencies.tokens / total)


@dataclass(frozen=True)
class IDFWeighting(Weighting):
    """w(t) = ln((1 + D) / (1 + d(t))) + 1, d(t): sequences that hold t as a target, D: all sequences.

    The ones are added, as in common implementations, so that weights are finite and above 0; a type in every sequence
    weighs 1 before normalising. The counts must be `TokenCounts(..., documents=True)`, since a token's count does not
    tell in how many sequences it occurs.

    Args: see `Weighting`.

    >>> counts = TokenCounts(3, documents=True).update([[0, 0, 1], [0, 2, 2], [0, 1, 1]], shift=False)
    >>> IDFWeighting(normalize=None).table(counts).tolist()  # doctest: +ELLIPSIS
    [1.0, 1.287..., 1.693...]

    Source: Sparck Jones, A statistical interpretation of term specificity and its application in retrieval, 1972.
    """

    name: ClassVar[str] = "idf"

    def formula(self, frequencies: Frequencies) -> Tensor:
        if frequencies.documents is None:
            raise ValueError("counts hold no documents; accepted are TokenCounts made with documents=True")
        return ((1 + frequencies.sequences) / (1 + frequencies.documents)).log() + 1


def weightings() -> dict[str, type[Weighting]]:
    """Every weighting of the package by its name."""
    return {
        kind.name: kind
        for kind in (
            PowerLawWeighting,
            InverseFrequencyWeighting,
            SquareRootInverseFrequencyWeighting,
            ClassBalancedWeighting,
            SmoothedInverseWeighting,
            IDFWeighting,
        )
    }


def from_recipe(recipe: dict[str, Any]) -> Weighting:
    """The weighting that `recipe()` described. ValueError: an unknown name or argument."""
    arguments = dict(recipe)
    kinds = weightings()
    name = arguments.pop("name", None)
    if name not in kinds:
        raise ValueError(f"the recipe's name is {name!r}; accepted are {', '.join(map(repr, kinds))}")
    try:
        return kinds[name](**arguments)
    except TypeError as error:
        raise ValueError(f"the recipe {json.dumps(recipe)} does not fit {kinds[name].__name__}: {error}") from None
