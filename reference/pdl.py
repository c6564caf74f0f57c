"""Power-Law Decay Loss, written out as in the paper (arXiv 2505.16900) and in the definitions of docs/loss.md.

Everything is float64, one formula a line, no tricks, no speed. Autograd differentiates it, so that gradients have the
same source as values. Tests and benchmarks import this file; the package does not.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceStats(NamedTuple):
    nll: Tensor  # ()  unweighted mean negative log-likelihood over counted tokens, nats
    accuracy: Tensor  # ()  fraction of counted tokens whose target reaches the row's maximum
    weight_sum: Tensor  # ()  sum of w(y_i) |u_i|
    token_count: Tensor  # ()  number of counted tokens


def power_law_weights(counts: Tensor, alpha: float, eps: float) -> Tensor:
    """w(t) = 1 / (freq(t) + eps) ** alpha, one weight per vocabulary entry: (V,) -> (V,)."""
    return 1.0 / (counts.double() + eps) ** alpha


def reference_cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    weights: Tensor | None = None,  # (V,)
    *,
    token_weights: Tensor | None = None,  # (...)
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, ReferenceStats]:
    """The loss, (...) for "none" and 0-d otherwise, and its statistics, all float64 and differentiable in `logits`."""
    V = logits.shape[-1]
    raw = logits.reshape(-1, V)  # (N, V)
    y = targets.reshape(-1)  # (N,)
    N = y.numel()
    w = torch.ones(V, dtype=torch.float64) if weights is None else weights.double()  # (V,)
    u = torch.ones(N, dtype=torch.float64) if token_weights is None else token_weights.reshape(-1).double()  # (N,)

    counted = (y != ignore_index) & (u != 0)  # (N,)
    y = torch.where(counted, y, 0)
    u = torch.where(counted, u, 0.0)
    w_y = torch.where(counted, w[y], 0.0)  # (N,)

    # A row that cannot contribute is taken out before its logits are read: they may hold nan or inf.
    read = counted & ((w_y != 0) | (label_smoothing != 0) | (z_loss != 0))
    ce, smoothing, lse = (torch.zeros(N, dtype=torch.float64) for _ in range(3))
    if read.any():
        z = raw[read].double() * logit_scale  # (R, V)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        log_p = torch.log_softmax(z, dim=-1)  # (R, V)
        ce = ce.masked_scatter(read, -log_p.gather(1, y[read, None])[:, 0])
        smoothing = smoothing.masked_scatter(read, torch.where(w != 0, -w * log_p, 0.0).sum(-1))
        lse = lse.masked_scatter(read, torch.logsumexp(z, dim=-1))

    s = label_smoothing
    target_term = torch.where(w_y * u != 0, u * (1 - s) * w_y * ce, 0.0) if s < 1 else torch.zeros_like(ce)
    smoothing_term = u * s / V * smoothing if s > 0 else torch.zeros_like(ce)
    z_term = z_loss * u.abs() * lse**2 if z_loss > 0 else torch.zeros_like(ce)

    weight_sum = (w_y * u.abs()).sum()
    token_count = counted.sum()
    one = torch.ones((), dtype=torch.float64)
    D, D_z = {
        "mean": (weight_sum, u.abs().sum()),
        "token_mean": (token_count.double(), u.abs().sum()),
        "sum": (one, one),
        "none": (one, one),
    }[reduction]
    if normalizer is not None:
        D = D_z = torch.as_tensor(normalizer, dtype=torch.float64)

    rows = _divide(target_term + smoothing_term, D) + _divide(z_term, D_z)  # (N,)
    rows = rows + raw[:0].double().sum()  # nothing to average: 0, yet attached to the graph
    loss = rows.reshape(targets.shape) if reduction == "none" else rows.sum()
    return loss, _statistics(raw, y, counted, w_y, u, logit_scale, softcap)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator if denominator != 0 else numerator.nan_to_num() * 0.0


@torch.no_grad()
def _statistics(
    raw: Tensor, y: Tensor, counted: Tensor, w_y: Tensor, u: Tensor, logit_scale: float, softcap: float | None
) -> ReferenceStats:
    zero = torch.zeros((), dtype=torch.float64)
    nll = accuracy = zero
    if counted.any():
        raw, y = raw[counted].double(), y[counted, None]  # (C, V), (C, 1)
        z = raw * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        nll = -torch.log_softmax(z, dim=-1).gather(1, y).mean()
        # The transform is increasing, so the raw logits decide which column is largest.
        accuracy = (raw.gather(1, y)[:, 0] >= raw.amax(-1)).double().mean()
    return ReferenceStats(nll, accuracy, (w_y * u.abs()).sum(), counted.sum())
