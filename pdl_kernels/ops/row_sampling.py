"""Leaving light rows out of the backward products without bias."""

from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN_RATIO = 0.6180339887498949  # of consecutive seeds it makes evenly spread offsets


class RowSample(NamedTuple):
    """Which rows enter the backward products, and what their factor is multiplied by."""

    kept: Tensor  # (N,) bool
    scale: Tensor  # (N,) float32, >= 1; 1 for rows that always enter


def sample_rows(factors: Tensor, share: float, seed: Tensor) -> RowSample:
    """Systematic sampling of the rows that together hold `share` of the sum of |factors|.

    With tau the largest magnitude such that the rows lighter than it hold at most `share` of the sum, a row lighter
    than tau is kept with probability |factor| / tau and then carries tau, so that its expected factor is its own.
    Heavier rows are kept as they are. One uniform number decides for all rows, by the prefix sum of their
    probabilities; no number of rows is drawn that differs from the expected one by 1 or more.

    Args:
        factors: (N,) what each row's gradient is multiplied by, any sign.
        share: in [0, 1).
        seed: () number; the same seed keeps the same rows.
    """
    magnitudes = factors.abs().double()
    ascending, _ = magnitudes.sort()
    below = ascending.cumsum(0) - ascending  # (N,) sum of the rows lighter than this one, ties by position
    # The heaviest magnitude whose lighter rows hold at most the share; the first row always qualifies.
    within = below <= share * ascending.sum()
    tau = torch.where(within, ascending, 0).amax() if len(ascending) else magnitudes.sum()
    light = magnitudes < tau
    probability = torch.where(light, magnitudes / torch.where(tau > 0, tau, 1), 0)
    offset = torch.frac((seed.double() + 0.5) * GOLDEN_RATIO)
    reached = (probability.cumsum(0) + offset).floor()
    drawn = reached > torch.nn.functional.pad(reached, (1, 0))[:-1]
    kept = ~light | drawn
    scale = torch.where(light & drawn, tau / torch.where(magnitudes > 0, magnitudes, 1), 1)
    return RowSample(kept, scale.float())
