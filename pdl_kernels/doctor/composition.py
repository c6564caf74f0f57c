"""The loss composed of torch's own functions: in float64 what is right, in the logits' dtype how far torch is off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PORTION_ELEMENTS = 1 << 24  # float64 logits at a time


class Problem(NamedTuple):
    """What a case computes. Everything is finite."""

    sources: tuple[Tensor, ...]  # logits (N, V); or hidden states (N, H) and the output layer (V, H)
    targets: Tensor  # (N,) int64, -100 where ignored
    weights: Tensor  # (V,) float32
    token_weights: Tensor | None  # (N,) float32
    options: dict[str, Any]  # of pdl_cross_entropy

    @property
    def per_row(self) -> bool:
        return self.options.get("reduction", "mean") == "none"

    @property
    def linear(self) -> bool:
        return len(self.sources) == 2

    @property
    def vocab_size(self) -> int:
        return len(self.weights)

    def logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """(R, V)"""
        if not self.linear:
            return self.sources[0][rows].detach().to(dtype)
        hidden, head = self.sources
        return F.linear(hidden[rows].detach().to(dtype), head.detach().to(dtype))


class Portion(NamedTuple):
    """Some rows, or all of them."""

    rows: slice
    loss: Tensor  # () their share of the loss, or (R,) for "none"
    gradient: Tensor  # (R, V) of the logits
    nll: Tensor  # (R,) unweighted negative log-likelihood, 0 where ignored
    hits: Tensor  # (R,) whether the target reaches the row's maximum


def portions(
    problem: Problem, upstream: float | Tensor, dtype: torch.dtype, *, arithmetic: torch.dtype | None = None
) -> Iterator[Portion]:
    """Loss and gradient of logits in `dtype`, a few rows at a time.

    Args:
        upstream: a number, or (N,) for the reduction "none".
        arithmetic: the dtype of everything after the logits; that of the logits by default.
    """
    denominators = _denominators(problem, torch.float64 if dtype == torch.float64 else torch.float32)
    count = max(1, PORTION_ELEMENTS // problem.vocab_size)
    for start in range(0, len(problem.targets), count):
        rows = slice(start, start + count)
        with torch.enable_grad():
            x = problem.logits(rows, dtype).requires_grad_()  # (R, V)
            loss, z = _loss(x.to(arithmetic or dtype), problem, rows, denominators)
            given = upstream[rows].to(loss.dtype) if isinstance(upstream, Tensor) else torch.full_like(loss, upstream)
            (gradient,) = torch.autograd.grad(loss, x, given)
        yield Portion(rows, loss.detach(), gradient, *_statistics(z.detach(), problem.targets[rows]))


def exact_portions(problem: Problem, upstream: float | Tensor) -> Iterator[Portion]:
    """What is right: all arithmetic in float64."""
    return portions(problem, upstream, torch.float64)


def torchs_portions(problem: Problem, upstream: float | Tensor) -> Iterator[Portion]:
    """What a user of torch gets in the logits' dtype.

    Where the dtype overflows, that is what its user would try next: the logits upcast to float32.
    """
    dtype = problem.sources[0].dtype
    upcast = portions(problem, upstream, dtype, arithmetic=torch.float32)
    for narrow, wide in zip(portions(problem, upstream, dtype), upcast, strict=True):
        finite = narrow.loss.isfinite().all() and narrow.gradient.isfinite().all()
        yield narrow if finite else wide


def source_gradients(problem: Problem, found: Iterator[Portion]) -> tuple[Tensor, ...]:
    """The gradients of hidden states (N, H) and output layer (V, H), in the dtype of the portions.

    `found` is used up.
    """
    hidden, head = problem.sources
    of_hidden, of_head = [], None
    for portion in found:
        gradient = portion.gradient  # (R, V)
        of_hidden.append(gradient @ head.to(gradient.dtype))
        share = gradient.T @ hidden[portion.rows].to(gradient.dtype)
        of_head = share if of_head is None else of_head + share
    assert of_head is not None
    return torch.cat(of_hidden), of_head


def counted_of(problem: Problem) -> Tensor:
    """(N,) bool"""
    counted = problem.targets != -100
    return counted if problem.token_weights is None else counted & (problem.token_weights != 0)


def _denominators(problem: Problem, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """Of the loss and of its z-loss."""
    reduction = problem.options.get("reduction", "mean")
    if reduction in ("sum", "none"):
        return 1.0, 1.0
    counted = counted_of(problem)
    u = torch.where(counted, 1.0 if problem.token_weights is None else problem.token_weights.abs(), 0.0).to(dtype)
    if reduction == "token_mean":
        return counted.sum().to(dtype), u.sum()
    return (u * problem.weights.to(dtype)[problem.targets.clamp(min=0)]).sum(), u.sum()


def _loss(
    x: Tensor, problem: Problem, rows: slice, denominators: tuple[Tensor | float, Tensor | float]
) -> tuple[Tensor, Tensor]:
    """The loss of (R, V) logits in their own dtype, and the logits after scale and softcap."""
    options, targets = problem.options, problem.targets[rows]
    z = x * options.get("logit_scale", 1.0)
    if options.get("softcap") is not None:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    losses = F.cross_entropy(
        z,
        targets,
        weight=problem.weights.to(z.dtype),
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )  # (R,)
    counted = counted_of(problem)[rows]
    u = torch.ones_like(losses) if problem.token_weights is None else problem.token_weights[rows].to(losses.dtype)
    losses = torch.where(counted, losses * u, 0)
    z_losses = torch.where(counted, options.get("z_loss", 0.0) * u.abs() * z.logsumexp(-1) ** 2, 0)
    if problem.per_row:
        return losses + z_losses, z
    return losses.sum() / denominators[0] + z_losses.sum() / denominators[1], z


def _statistics(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Portion.nll and Portion.hits. They do not know of token weights of 0, which the caller leaves out."""
    of_target = z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    counted = targets != -100
    return torch.where(counted, z.logsumexp(-1) - of_target, 0), counted & (of_target >= z.amax(-1))
