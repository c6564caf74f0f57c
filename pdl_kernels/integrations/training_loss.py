"""The loss as training frameworks call it: its weights, its denominator, and a record that it ran."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pdl_kernels.losses.functional import pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.losses.modules import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss
from pdl_kernels.options import CrossEntropyKeywords
from pdl_kernels.weights.checks import check_table
from pdl_kernels.weights.saved import SavedWeights, load_weights

WEIGHTS_FILE = "pdl_weights.safetensors"  # in a folder of a checkpoint
NOT_HERE = {
    "reduction": "the sum is divided by the number of targets of the whole step, which the framework counts",
    "normalizer": "the framework gives it: the number of targets of the whole step",
    "return_stats": "PDLCallback logs the statistics",
}
OF_TRAINING = ("label_smoothing", "z_loss", "row_sampling")  # not part of plain cross entropy

# What is summed while a record is kept, over the tokens of every training call; see `TrainingLoss.record`.
TOTALS = ("targets", "nll", "correct", "factors", "squared_factors", "never_counted", "calls", "with_token_weights")


class Record(NamedTuple):
    """Sums since the record was last taken: over targets, unless said otherwise."""

    targets: float  # their number
    nll: float  # unweighted negative log-likelihood, in nats
    correct: float  # targets that reach the maximum of their row
    factors: float  # w(y) |u|
    squared_factors: float  # (w(y) |u|)^2
    never_counted: float  # targets that the counts of the callback do not hold
    calls: float  # number of calls with a gradient
    with_token_weights: float  # of these calls, those that had token weights

    def statistics(self) -> dict[str, float]:
        """What is logged of a record; {} of one without targets."""
        n = self.targets
        if n == 0:
            return {}
        nll = self.nll / n
        return {
            "nll": nll,
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "accuracy": self.correct / n,
            "mean_weight": self.factors / n,
            "effective_sample_share": self.factors**2 / (n * self.squared_factors) if self.squared_factors else 0.0,
        }


class TrainingLoss:
    """PDL with its weights, for a training framework.

        L = sum_i w(y_i) u_i ce_i / n          n: the number of targets of the whole optimizer step

    A shared n makes the gradient independent of how a step is cut into micro-batches and processes. Where gradients are
    off (`torch.no_grad`), the loss is plain cross entropy, so that evaluation losses compare with those of other runs.

    Args:
        weights: (V,) floating, one weight per column of the logits; a file that `pdl-kernels weights` or
            `save_weights` wrote; a folder of a checkpoint that `PDLCallback` wrote; None for plain cross entropy.
        linear: whether the options are those of `pdl_linear_cross_entropy`.
        weighted_evaluation: keep weights, token weights, smoothing and z-loss where gradients are off.
        options: of `pdl_cross_entropy` or `pdl_linear_cross_entropy`, but `reduction`, `normalizer` and `return_stats`.

    Attributes:
        table: (V,) float32 on the CPU, or None.
        saved: what the weights' file held, or None.
        forwards, backwards: training calls recorded, and those of them whose gradient came back.
        uncounted: training calls recorded that were not given the number of targets of the whole step.
    """

    def __init__(
        self,
        weights: Tensor | str | os.PathLike[str] | None,
        *,
        linear: bool = False,
        weighted_evaluation: bool = False,
        **options: Any,
    ) -> None:
        for name, reason in NOT_HERE.items():
            if name in options:
                raise ValueError(f"{name} is given, and a training loss takes none: {reason}")
        (PDLLinearCrossEntropyLoss if linear else PDLCrossEntropyLoss)(None, **options)  # checks names and values
        self.options = options
        self.ignore_index: int = options.get("ignore_index", -100)
        self.weighted_evaluation = weighted_evaluation
        self.saved: SavedWeights | None = None
        self.table: Tensor | None = None
        if isinstance(weights, (str, os.PathLike)):
            path = Path(weights)
            self.saved = load_weights(path / WEIGHTS_FILE if path.is_dir() else path)
            weights = self.saved.table
        if weights is not None:
            check_table(weights)
            self.table = weights.detach().to("cpu", torch.float32, copy=True)
        self._copies: dict[torch.device, Tensor] = {}  # of the table, where it was needed
        self._seen: Tensor | None = None  # (V,) bool, which classes the counts hold
        self._totals: Tensor | None = None  # (8,): see TOTALS; None while no record is kept
        self.forwards = self.backwards = self.uncounted = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Weights

    def weights_on(self, device: torch.device) -> Tensor | None:
        """(V,) the table on this device."""
        if self.table is None:
            return None
        if device not in self._copies:
            with torch.inference_mode(False):  # an evaluation may come first, and training needs the copy, too
                self._copies[device] = self.table.to(device, copy=True)
        return self._copies[device]

    def set_weights(self, weights: Tensor) -> None:
        """Train with these weights from the next call on; (V,), as many as before."""
        check_table(weights)
        if self.table is None or weights.shape != self.table.shape:
            had = "none" if self.table is None else f"{len(self.table)}"
            raise ValueError(f"weights have shape {tuple(weights.shape)} where there were {had}; accepted are as many")
        for table in (self.table, *self._copies.values()):
            table.copy_(weights.detach())

    def uses(self, expected: Tensor | None) -> bool:
        """Whether these are the weights of the next call."""
        if expected is None or self.table is None:
            return expected is self.table
        return all(torch.equal(table.cpu(), expected) for table in (self.table, *self._copies.values()))

    # -----------------------------------------------------------------------------------------------------------------
    # What PDLCallback asks

    def problem_of(self, arguments: Any, model: Any) -> str | None:
        """What in the training arguments or the model would keep this loss from being right, or None."""
        if self.ignore_index == -100:
            return None
        return (
            f"ignore_index is {self.ignore_index}, and the Trainer counts as targets what is not -100; accepted is "
            "-100: have the collator pad labels with it"
        )

    def why_not_called(self, model: Any) -> str:
        """Why a step may have passed without a call."""
        return "it is not the loss of this training"

    # -----------------------------------------------------------------------------------------------------------------
    # The loss

    def targets(
        self,
        labels: Tensor | None,  # (..., L)
        shift_labels: Tensor | None = None,  # (..., L)
        token_weights: Tensor | None = None,  # (..., L)
        shift_token_weights: Tensor | None = None,  # (..., L)
        *,
        shift: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(..., L) targets and token weights, position by position of the logits.

        Args:
            labels, token_weights: as long as the inputs; with `shift`, position i of the model predicts number i + 1.
            shift_labels, shift_token_weights: the same, shifted already; they win.
        """
        if shift_token_weights is not None and shift_labels is None:
            raise ValueError("shift_token_weights are given without shift_labels; accepted are both, or token_weights")
        if shift_labels is not None:
            if token_weights is not None and shift_token_weights is None:
                raise ValueError("token_weights are given beside shift_labels; accepted are shift_token_weights")
            return shift_labels, shift_token_weights
        if labels is None:
            raise ValueError("labels are missing; accepted are labels or shift_labels, (B, L) class indices")
        if token_weights is not None and token_weights.shape != labels.shape:
            raise ValueError(
                f"token_weights have shape {tuple(token_weights.shape)}; accepted is {tuple(labels.shape)}, that of "
                "labels"
            )
        if not shift:
            return labels, token_weights
        return _next(labels, self.ignore_index), None if token_weights is None else _next(token_weights, 0)

    def of_logits(
        self,
        logits: Tensor,  # (..., V)
        targets: Tensor,  # (...), shifted
        token_weights: Tensor | None = None,  # (...), shifted
        count: Tensor | float | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of these logits, 0-d. `count` is the number of targets of the whole step, None for this call's;
        `options` win over those of the object."""
        known = CrossEntropyKeywords.__annotations__
        options = {name: value for name, value in self.options.items() if name in known} | options
        return self._loss(pdl_cross_entropy, (logits,), targets, token_weights, count, options)

    def of_hidden(
        self,
        hidden: Tensor,  # (..., H)
        lm_head_weight: Tensor,  # (V, H)
        targets: Tensor,  # (...), shifted
        token_weights: Tensor | None = None,  # (...), shifted
        count: Tensor | float | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of `hidden @ lm_head_weight.T`, 0-d, without the logits; `options` win over those of the object."""
        options = self.options | options
        return self._loss(pdl_linear_cross_entropy, (hidden, lm_head_weight), targets, token_weights, count, options)

    def _loss(
        self,
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        targets: Tensor,
        token_weights: Tensor | None,
        count: Tensor | float | None,
        options: dict[str, Any],
    ) -> Tensor:
        device = inputs[0].device
        targets = targets.to(device)
        training = torch.is_grad_enabled()
        if training or self.weighted_evaluation:
            table = self.weights_on(device)
            token_weights = None if token_weights is None else token_weights.to(device)
        else:
            table = token_weights = None
            options = {name: value for name, value in options.items() if name not in OF_TRAINING}
        recorded = training and self._totals is not None
        if count is None:
            count = targets.ne(self.ignore_index).sum()
            if recorded and not torch.compiler.is_compiling():
                self.uncounted += 1
        elif dist.is_available() and dist.is_initialized():
            # Data parallel training averages gradients, and who divides by the targets of all processes undoes that.
            options = {"expected_upstream": float(dist.get_world_size())} | options
        if isinstance(count, Tensor) and count.dim() > 0:  # of nn.DataParallel: the same for every replica
            count = count.flatten()[0]
        options |= {"normalizer": count, "token_weights": token_weights}
        found = function(*inputs, targets, table, return_stats=recorded, **options)
        if not recorded:
            loss: Tensor = found
            return loss
        loss, stats = found
        self.record(targets, table, token_weights, stats.nll, stats.accuracy)
        self.watch(loss)
        return loss

    # -----------------------------------------------------------------------------------------------------------------
    # The record

    def keep_record(self, seen: Tensor | None = None) -> None:
        """Sum up statistics of every training call from now on; `seen` (V,) says which classes were counted."""
        self._totals = torch.zeros(len(TOTALS), dtype=torch.float64)
        self._seen = seen

    @torch.no_grad()
    def record(
        self, targets: Tensor, table: Tensor | None, token_weights: Tensor | None, nll: Tensor, accuracy: Tensor
    ) -> None:
        """Add one training call; nothing waits for the device. `nll` and `accuracy` are means over its targets."""
        if self._totals is None:
            return
        if self._totals.device != targets.device:
            exact = torch.float32 if targets.device.type == "mps" else torch.float64
            self._totals = self._totals.to(targets.device, exact)
        counted = targets.ne(self.ignore_index)
        if token_weights is not None:
            counted = counted & token_weights.ne(0)
        factors = counted.to(self._totals.dtype)
        inside = torch.where(counted, targets, 0)
        if table is not None:
            factors = factors * table[inside.clamp(0, len(table) - 1)]
        if token_weights is not None:
            factors = factors * torch.where(counted, token_weights, 0).abs()
        unknown = counted.new_zeros(())
        if self._seen is not None:
            self._seen = self._seen.to(targets.device)
            unknown = (counted & ~self._seen[inside.clamp(0, len(self._seen) - 1)]).sum()
        number = counted.sum()
        numbers = (
            number,
            nll * number,
            accuracy * number,
            factors.sum(),
            factors.square().sum(),
            unknown,
            torch.ones_like(number),
            torch.ones_like(number) * (token_weights is not None),
        )
        self._totals += torch.stack([value.to(self._totals.dtype) for value in numbers])

    def watch(self, loss: Tensor) -> None:
        """Count this call, and the gradient when it comes back: a loss that is computed and dropped trains nothing."""
        if loss.requires_grad and self._totals is not None and not torch.compiler.is_compiling():
            self.forwards += 1
            loss.register_hook(self._came_back)

    def _came_back(self, gradient: Tensor) -> None:
        self.backwards += 1

    def read_record(self) -> Record:
        """The sums of this process so far, which waits for the device."""
        if self._totals is None:
            raise RuntimeError("no record is kept: call keep_record first")
        return Record(*self._totals.tolist())

    def take_record(self) -> Record:
        """The sums over all processes since the last time, which every process must take at once; then from 0 on."""
        if self._totals is None:
            raise RuntimeError("no record is kept: call keep_record first")
        totals = self._totals
        self._totals = torch.zeros_like(totals)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
        return Record(*totals.tolist())


def _next(values: Tensor, last: float) -> Tensor:
    """(..., L) -> (..., L): position i holds what position i + 1 held, the last one `last`."""
    return F.pad(values, (0, 1), value=last)[..., 1:]
