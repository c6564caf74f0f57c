"""The power law: its bare formula, and the recommended preset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pdl_kernels.weights.checks import check_counts, check_number
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.weighting import Frequencies, Weighting, finite_float32


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
            would be infinite (eps=0 with a count of 0) or too large for float32.
        TypeError: counts that are not a real tensor.

    >>> power_law_weights(torch.tensor([100, 4, 0]), alpha=0.5, eps=1.0).tolist()  # doctest: +ELLIPSIS
    [0.0995..., 0.447..., 1.0]

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """
    check_number("alpha", alpha)
    check_number("eps", eps)
    frequencies = check_counts(counts)
    return finite_float32(1.0 / (frequencies + eps) ** alpha, frequencies, f"eps {eps}, alpha {alpha}")


@dataclass(frozen=True)
class PowerLawWeighting(Weighting):
    """w(t) = 1 / (freq(t) + eps) ** alpha, the weights of Power-Law Decay Loss; the defaults are our preset.

    Args:
        alpha: strength >= 0; 0 gives weights of 1. The larger it is, the further training moves the model away from
            natural text: its optimum is p(y|x) / freq(y)**alpha, normalised.
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
        check_number("alpha", self.alpha)
        check_number("eps", self.eps)

    @classmethod
    def paper(cls) -> PowerLawWeighting:
        """alpha=1, eps=1e-7, the formula for every entry and nothing else: what the paper's authors use.

        A type never counted weighs 1e7: one EOS that was left out of the counts can own a batch.
        """
        return cls(alpha=1.0, eps=1e-7, normalize=None, unseen="formula")

    def formula(self, frequencies: Frequencies) -> Tensor:
        return 1.0 / (frequencies.tokens + self.eps) ** self.alpha
