"""Weights that grow during training, from plain cross entropy to a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdl_kernels.weights.checks import check_number, check_table


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
        check_number("steps", self.steps)
        check_number("start", self.start)

    def ratio_at(self, step: int) -> float:
        """r, from 0 to 1."""
        if step < self.start:
            return 0.0
        return 1.0 if self.steps == 0 else min((step - self.start) / self.steps, 1.0)

    def weights_at(self, step: int, out: Tensor | None = None) -> Tensor:
        """(V,) float32 weights of this step on the table's device; written to `out` where one is given.

        `out` may be the `weights` of a `PDLCrossEntropyLoss` on any device: `schedule.weights_at(step, loss.weights)`.
        """
        check_number("step", step)
        ratio = self.ratio_at(step)
        table = self.table.detach().float()
        # The end is the table itself: 1 + (w - 1) would round small weights away.
        weights = table if ratio == 1 else torch.lerp(torch.ones_like(table), table, ratio)
        return weights.clone() if out is None else out.copy_(weights)
