"""What is compared: losses that a model is trained with, and what can be had from a trained model for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.decoding import Transform
from pdl_kernels import (
    PowerLawWeighting,
    SquareRootInverseFrequencyWeighting,
    TokenCounts,
    calibration_bias,
    pdl_cross_entropy,
)
from pdl_kernels.weights.weighting import Weighting

ALPHAS = (0.25, 0.4, 0.75, 1.0)
TEMPERATURES = (0.7, 1.15, 1.3, 1.6)  # 1 is the model as it is
FOCAL_GAMMA = 2.0
NATURAL = "natural"  # logits as the model has them


@dataclass(frozen=True)
class Arm:
    """One way to train. Without a weighting every token weighs 1."""

    name: str
    title: str
    weighting: Weighting | None = None
    focal_gamma: float = 0.0
    trained: bool = True

    def table(self, counts: TokenCounts) -> Tensor | None:  # (V,) float32
        return None if self.weighting is None else self.weighting.table(counts)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:  # (N, V), (N,), (V,)
        """The mean over the targets of w(y) ce, or of the focal loss (1 - p)**gamma ce (Lin et al., 2017)."""
        if self.focal_gamma == 0:
            return pdl_cross_entropy(logits, targets, weights, reduction="token_mean")
        nll = F.cross_entropy(logits.float(), targets, reduction="none")  # (N,)
        return (-torch.expm1(-nll)).pow(self.focal_gamma).mul(nll).mean()


@dataclass(frozen=True)
class Variant:
    """One way to read a trained model's logits; which texts are written with it."""

    name: str
    title: str
    transform: Callable[[TokenCounts, Tensor | None], Transform]  # of the counts and of the arm's weights
    greedy: bool = True
    sampled: bool = True


UNTOUCHED = Arm("untouched", "untouched", trained=False)
CROSS_ENTROPY = Arm("cross-entropy", "cross entropy")
ARMS = {
    arm.name: arm
    for arm in (
        UNTOUCHED,
        CROSS_ENTROPY,
        *(Arm(f"pdl-{alpha:g}", f"PDL alpha {alpha:g}", PowerLawWeighting(alpha=alpha)) for alpha in ALPHAS),
        Arm("pdl-paper", "PDL, the paper's raw weights", PowerLawWeighting.paper()),
        Arm("inverse-square-root", "inverse square root of the frequency", SquareRootInverseFrequencyWeighting()),
        Arm("focal", f"focal loss, gamma {FOCAL_GAMMA:g}", focal_gamma=FOCAL_GAMMA),
    )
}
MAIN_ARMS = ("untouched", "cross-entropy", "pdl-0.4", "pdl-1", "pdl-0.25")  # trained before the others
TEXTS_WITHOUT_SHIFT = ("pdl-0.4", "pdl-1")  # whose (half) undone models also write; of the others NLL is measured


def variants_of(arm: Arm) -> list[Variant]:
    """As it is; cross entropy with the shift of PDL added or at another temperature; PDL with its shift taken away."""
    variants = [Variant(NATURAL, arm.title, lambda counts, weights: Transform())]
    if arm == CROSS_ENTROPY:
        variants += [adjusted(tau) for tau in ALPHAS] + [at_temperature(value) for value in TEMPERATURES]
        variants.append(adjusted_without_unseen(0.4))
    if arm.name.startswith("pdl-"):
        texts = arm.name in TEXTS_WITHOUT_SHIFT
        for name, strength in (("half-undone", 0.5), ("undone", 1.0)):
            variants.append(
                Variant(
                    name,
                    f"{arm.title}, shift {name.replace('-', ' ')}",
                    lambda counts, weights, strength=strength: Transform(strength * undoing_bias(weights, counts)),
                    greedy=texts,
                    sampled=texts,
                )
            )
    return variants


def undoing_bias(weights: Tensor, counts: TokenCounts) -> Tensor:  # (V,) -> (V,) float32
    """-log w, and 0 for types that training never saw as targets: their weight has shifted nothing.

    The presets give such types the weight 1, whose logarithm is 0 anyway. The paper's formula gives them 1e7.
    """
    return torch.where(counts.counts.to(weights.device) > 0, calibration_bias(weights), 0.0)


def adjusted(tau: float) -> Variant:
    """log w of the preset with alpha = tau is added: what PDL's optimum is to cross entropy's, without training."""

    def transform(counts: TokenCounts, weights: Tensor | None) -> Transform:
        return Transform(PowerLawWeighting(alpha=tau).table(counts).log())

    return Variant(f"adjusted-{tau:g}", f"cross entropy, logits adjusted by {tau:g}", transform)


def adjusted_without_unseen(tau: float) -> Variant:
    """As `adjusted`, but types that training never saw get the most frequent type's bias, not a weight of 1's.

    PDL raises no type that it never sees, and the adjustment need not.
    """

    def transform(counts: TokenCounts, weights: Tensor | None) -> Transform:
        bias = PowerLawWeighting(alpha=tau).table(counts).log()
        seen = counts.counts > 0
        return Transform(torch.where(seen, bias, bias[seen].min()))

    title = f"cross entropy, logits adjusted by {tau:g}, types never seen not raised"
    return Variant(f"adjusted-{tau:g}-seen", title, transform)


def at_temperature(temperature: float) -> Variant:
    """Greedy texts do not depend on the temperature, so only samples are drawn."""
    return Variant(
        f"temperature-{temperature:g}",
        f"cross entropy, temperature {temperature:g}",
        lambda counts, weights: Transform(temperature=temperature),
        greedy=False,
    )
