"""The options of the loss and the tensors that travel between its layers."""

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("mean", "token_mean", "sum", "none")


class LossStats(NamedTuple):
    """What to log beside a weighted loss: detached 0-d tensors on the logits' device.

    Attributes:
        nll: unweighted mean negative log-likelihood over counted tokens, in nats (exp of it is the perplexity);
            float32, float64 for float64 logits; 0 when nothing is counted.
        accuracy: fraction of counted tokens whose target reaches the row's maximum, ties included; 0 when nothing is
            counted.
        weight_sum: sum of w(y_i) |u_i| over counted tokens.
        token_count: number of counted tokens, int64.
    """

    nll: Tensor
    accuracy: Tensor
    weight_sum: Tensor
    token_count: Tensor


class LossOptions(NamedTuple):
    """The options of `pdl_cross_entropy` that change its numbers, already checked."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    return_stats: bool = False


class LinearOptions(NamedTuple):
    """What `pdl_linear_cross_entropy` takes beyond `LossOptions`, already checked."""

    chunk_size: int | None = None
    accumulate_dtype: torch.dtype = torch.float32
    compact: bool | None = None
    row_sampling: float = 0.0


class LossInputs(NamedTuple):
    """The tensors of one call, as both backends take them (N = rows_outer * rows_inner)."""

    logits: Tensor  # (rows_outer, rows_inner, V), any strides
    targets: Tensor  # (N,)
    weights: Tensor | None  # (V,)
    token_weights: Tensor | None  # (N,)
    normalizer: Tensor | float | None = None  # (), on the logits' device
    expected_upstream: Tensor | float = 1.0  # (), on the logits' device; a number is finite and not 0

    @property
    def rows(self) -> int:
        return self.targets.numel()

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]


class RowOutputs(NamedTuple):
    """What a backend finds for each row, before anything is summed."""

    loss: Tensor  # (N,)
    state: Tensor  # (2, N): see LossOutputs.row_state
    stats: Tensor | None  # (2, N): cross entropy of counted rows; 1 where the target reaches the row's maximum


class LossOutputs(NamedTuple):
    """What a backend's forward returns; everything but `loss` serves backward and the statistics."""

    loss: Tensor  # () or (N,) for "none"
    row_state: Tensor  # (2, N): maximum of the raw logits; sum of exp(z - z of that maximum)
    scalars: Tensor  # (7,): see SCALARS
    token_count: Tensor | None  # (), int64; the Triton backend counts only for statistics


class LinearInputs(NamedTuple):
    """The tensors of one call of the loss fused with the output projection."""

    hidden: Tensor  # (..., H)
    lm_head_weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (...)
    weights: Tensor | None  # (V,)
    token_weights: Tensor | None  # (...)
    seed: Tensor | None  # (), for row sampling


class LinearOutputs(NamedTuple):
    """What it returns; everything but `loss` serves backward and the statistics."""

    loss: Tensor  # () or (...) for "none"
    row_state: Tensor  # (2, N) for "none", (2, 0) otherwise: see LossOutputs
    scalars: Tensor  # (7,): see SCALARS
    token_count: Tensor  # (), int64


# Indices into LossOutputs.scalars. A denominator of 0 has the inverse 0: its term is 0.
SCALARS = (
    "inverse_denominator",
    "inverse_z_denominator",
    "weight_total",
    "nll",
    "accuracy",
    "weight_sum",
    "expected_upstream",  # the upstream gradient that forward forms the gradient for, neither 0, infinite nor nan
)
INVERSE_DENOMINATOR, INVERSE_Z_DENOMINATOR, WEIGHT_TOTAL, NLL, ACCURACY, WEIGHT_SUM, EXPECTED_UPSTREAM = range(7)
