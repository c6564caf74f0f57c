"""What a case computes, and the call of the package that computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_kernels import LossStats, pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.doctor.cases import DTYPES, HIDDEN_SIZE, RECIPES, Case, Recipe
from pdl_kernels.doctor.composition import Problem

CONFIDENT_EVERY, CONFIDENT_MARGIN = 4, 12.0  # every fourth row has a target far above its other logits
IGNORED_EVERY = 7


class Outcome(NamedTuple):
    """What the package gave."""

    loss: Tensor
    gradients: tuple[Tensor, ...]  # of Problem.sources; none without a backward
    stats: LossStats | None


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Random numbers: a few confident rows among flat ones, ignored rows, weights from 0 to 2.

    The device may be "meta", for programs that only compile what a case would launch.
    """
    recipe, dtype = RECIPES[case.recipe], DTYPES[case.dtype]
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    targets = torch.randint(case.vocab_size, (case.rows,), generator=generator, device=device)
    confident = torch.arange(case.rows, device=device) % CONFIDENT_EVERY == 0
    sources: tuple[Tensor, ...]
    if recipe.linear:
        head = normal(case.vocab_size, HIDDEN_SIZE) * (2 / HIDDEN_SIZE**0.5)
        hidden = normal(case.rows, HIDDEN_SIZE)
        hidden += torch.where(confident[:, None], 4 * head[targets], 0)
        sources = (hidden.to(dtype), head.to(dtype))
    else:
        logits = normal(case.rows, case.vocab_size) * 2
        of_target = torch.where(confident, logits.logsumexp(-1) + CONFIDENT_MARGIN, logits[:, 0])
        logits.scatter_(1, targets[:, None], of_target[:, None])
        sources = (_laid_out(logits.to(dtype), recipe.layout),)
    targets[1::IGNORED_EVERY] = -100
    weights = 2 * torch.rand(case.vocab_size, generator=generator, device=device)
    weights *= torch.rand(case.vocab_size, generator=generator, device=device) > 1 / 16
    weights.index_fill_(0, targets[:1], 1.5)  # so that something counts, however few the rows
    token_weights = None
    if recipe.token_weights:
        token_weights = 0.5 + torch.rand(case.rows, generator=generator, device=device)
        token_weights[2::5] = 0
        token_weights[3::5] *= -0.25
    return Problem(sources, targets, weights, token_weights, recipe.options)


def _laid_out(logits: Tensor, layout: str) -> Tensor:
    if layout == "rows":
        return logits
    if layout == "offset":
        memory = logits.new_empty(logits.numel() + 1)
        return memory[1:].view(logits.shape).copy_(logits)
    memory = logits.new_empty(*logits.shape, 2)
    return memory[..., 0].copy_(logits)


def make_upstream(problem: Problem, recipe: Recipe) -> float | Tensor:
    """The upstream gradient of the loss: a number, or (N,) for the reduction "none"."""
    if not problem.per_row:
        return 1.0 if recipe.upstream is None else recipe.upstream
    return torch.linspace(0, 2, len(problem.targets), device=problem.targets.device)


def make_call(problem: Problem, recipe: Recipe, upstream: float | Tensor, backend: str) -> Callable[[], Outcome]:
    """A function that makes the call on fresh tensors, in which ignored rows of logits hold nan."""
    ignored = problem.targets == -100

    def call() -> Outcome:
        leaves = [source.detach().clone() for source in problem.sources]
        if not recipe.linear:
            leaves = [_laid_out(leaves[0], recipe.layout)]
            leaves[0].masked_fill_(ignored[:, None], torch.nan)
        if recipe.upstream is not None:
            leaves = [leaf.requires_grad_() for leaf in leaves]
        sources = [_MadeByAModel.apply(leaf) for leaf in leaves] if recipe.inplace else leaves
        function: Callable[..., Any] = pdl_linear_cross_entropy if recipe.linear else pdl_cross_entropy
        options: dict[str, Any] = {**problem.options, "token_weights": problem.token_weights, "backend": backend}
        if recipe.inplace:
            options["inplace"] = True
        if recipe.expected:  # as a tensor: it is read on the device
            options["expected_upstream"] = torch.full((), recipe.upstream or 1.0, device=leaves[0].device)
        with torch.set_grad_enabled(recipe.upstream is not None):
            result = function(*sources, problem.targets, problem.weights, **options)
        loss, stats = result if isinstance(result, tuple) else (result, None)
        gradients: tuple[Tensor, ...] = ()
        if recipe.upstream is not None:
            given = torch.full_like(loss, upstream) if isinstance(upstream, float) else upstream.to(loss.dtype)
            gradients = torch.autograd.grad(loss, leaves, given)
        return Outcome(loss.detach(), gradients, stats)

    return call


class _MadeByAModel(torch.autograd.Function):
    """Makes a non-leaf of a leaf, in the same memory: `inplace=True` refuses to overwrite leaves."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream
