"""One case of `pdl-kernels doctor --check`: run it, hold it against float64.

A tensor is right if its error, in the maximum norm and in the 2-norm, is at most twice that of torch's own composition
in the same dtype, plus one rounding of that dtype and 1e-6, both relative to the norm of the float64 result, and plus
the dtype's smallest step for every element, which is all that float16 has left of small probabilities. Twice, and one
rounding, because chance decides whose rounding is the luckier one, and a fault is off by far more; the test suite,
whose inputs are chosen for it, is stricter. The same call made twice must give the same bits, rows that do not count a
gradient of exactly 0, and whatever they hold, nan here, must not be read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_kernels import LossStats, pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.backends import interpreted
from pdl_kernels.doctor.cases import DTYPES, HIDDEN_SIZE, RECIPES, Case, Recipe
from pdl_kernels.doctor.composition import Piece, Problem, counted_of, exact_pieces, source_gradients, torchs_pieces

RELATIVE = 1e-6
TORCHS_SHARE = 2.0
CONFIDENT_EVERY, CONFIDENT_MARGIN = 4, 12.0  # so many rows have a target far above the other logits
IGNORED_EVERY = 7


class Outcome(NamedTuple):
    """What the package gave."""

    loss: Tensor
    gradients: tuple[Tensor, ...]  # of Problem.sources; none of a forward alone
    stats: LossStats | None


class Errors(NamedTuple):
    """Of one tensor, absolute, in both norms; and the norms of the float64 result, and of as many ones."""

    ours: tuple[float, float]  # maximum, 2-norm
    torchs: tuple[float, float]
    norms: tuple[float, float]
    ones: tuple[float, float]

    def worst_ratio(self, rounding: float, step: float = 0.0) -> float:
        """The error as a share of what is allowed; `rounding` is relative, `step` absolute."""
        ratios = []
        for ours, torchs, norm, ones in zip(self.ours, self.torchs, self.norms, self.ones, strict=True):
            allowed = TORCHS_SHARE * torchs + (RELATIVE + rounding) * norm + step * ones
            ratios.append(ours / allowed if allowed > 0 else (0.0 if ours == 0 else math.inf))
        return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)

    def relative(self, whose: tuple[float, float]) -> float:
        """In the 2-norm."""
        return whose[1] / self.norms[1] if self.norms[1] > 0 else whose[1]


def check_case(case: Case, device: torch.device, backend: str) -> dict[str, Any]:
    """The verdict on one case, as JSON can hold it."""
    recipe = RECIPES[case.recipe]
    problem = make_problem(case, device)
    upstream = make_upstream(problem, recipe)
    call = make_call(problem, recipe, upstream, backend)
    with reading_twice(recipe.read_twice):
        kernels: list[str] = []
        with heard_launches(kernels):
            call()  # compiles
        second = call()
        third = call()
    problems = []
    if not _same_bits(second, third):
        problems.append("the same call gave other bits the second time")
    errors = compare(problem, second, upstream)
    rounding = 2.0 if interpreted() and backend == "triton" else 1.0  # the interpreter truncates bfloat16
    ratios = {}
    for name, (dtype, found) in errors.items():
        limits = torch.finfo(dtype)
        ratios[name] = found.worst_ratio(rounding * limits.eps / 2, limits.smallest_normal * limits.eps)
        if not ratios[name] <= 1:
            problems.append(f"{name}: {ratios[name]:.3g} times the error that is allowed")
    problems += _exact_zeros(problem, second)
    problems += _wrong_statistics(problem, second)
    (_, loss), *gradients = errors.values()
    (_, gradient) = gradients[0] if gradients else (None, None)
    return {
        "status": "wrong" if problems else "right",
        "problem": "; ".join(problems) or None,
        "kernels": sorted(set(kernels)) if backend == "triton" and not interpreted() else None,
        "loss_error": loss.relative(loss.ours),
        "torch_loss_error": loss.relative(loss.torchs),
        "gradient_error": gradient and gradient.relative(gradient.ours),
        "torch_gradient_error": gradient and gradient.relative(gradient.torchs),
        "share_of_allowed": max(ratios.values()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Random numbers, never zeros: a few confident rows among flat ones, ignored rows, weights from 0 to 2.

    On the device "meta" as well, for programs that only compile what a case would launch.
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
    """A number, or (N,) for "none"."""
    if not problem.per_row:
        return 1.0 if recipe.upstream is None else recipe.upstream
    return torch.linspace(0, 2, len(problem.targets), device=problem.targets.device)


def make_call(problem: Problem, recipe: Recipe, upstream: float | Tensor, backend: str) -> Callable[[], Outcome]:
    """A function that makes the call on fresh tensors. Rows that are ignored hold nan."""
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
        if recipe.expected:  # as a tensor, which is read on the device
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
    """Makes a non-leaf of a leaf in the same memory, which `inplace=True` may overwrite."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@contextmanager
def reading_twice(wanted: bool) -> Iterator[None]:
    """Within, the kernel that reads rows twice forms loss and gradient, whatever the planner would choose."""
    if not wanted:
        yield
        return
    from pdl_kernels.kernels import launch, planner

    with launch.planned_by(functools.partial(planner.plan_loss, only=planner.TWO_PASSES)):
        yield


@contextmanager
def heard_launches(names: list[str]) -> Iterator[None]:
    """Within, the name of every kernel that Triton launches is appended to `names`; not of interpreted ones."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return

    def hear(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hear)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(hear)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def compare(problem: Problem, outcome: Outcome, upstream: float | Tensor) -> dict[str, tuple[torch.dtype, Errors]]:
    """By tensor, the loss first: the dtype whose rounding counts, and the errors."""
    dtype = problem.sources[0].dtype
    if problem.linear:
        return _compare_linear(problem, outcome, upstream, dtype)
    loss, torchs_loss = _Sum(problem.per_row), _Sum(problem.per_row)
    gradient = _Accumulated()
    for exact, torchs in zip(exact_pieces(problem, upstream), torchs_pieces(problem, upstream), strict=True):
        loss.add(exact.loss)
        torchs_loss.add(torchs.loss)
        if outcome.gradients:
            gradient.add(exact.gradient, outcome.gradients[0][exact.rows], torchs.gradient)
    found = {"loss": (torch.float32, _errors(loss.total, outcome.loss, torchs_loss.total))}
    if outcome.gradients:
        found["gradient"] = (dtype, gradient.errors())
    return found


def _compare_linear(
    problem: Problem, outcome: Outcome, upstream: float | Tensor, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, Errors]]:
    exact_loss, torchs_loss = _Sum(False), _Sum(False)
    exact = source_gradients(problem, exact_loss.watch(exact_pieces(problem, upstream)))
    torchs = source_gradients(problem, torchs_loss.watch(torchs_pieces(problem, upstream)))
    found = {"loss": (dtype, _errors(exact_loss.total, outcome.loss, torchs_loss.total))}  # as rounded as its logits
    for name, *tensors in zip(("hidden gradient", "head gradient"), exact, outcome.gradients, torchs, strict=True):
        found[name] = (dtype, _errors(*tensors))
    return found


class _Sum:
    """The loss out of pieces: their sum, or one after the other."""

    def __init__(self, per_row: bool) -> None:
        self.per_row = per_row
        self.parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        self.parts.append(part)

    def watch(self, found: Iterator[Piece]) -> Iterator[Piece]:
        for piece in found:
            self.add(piece.loss)
            yield piece

    @property
    def total(self) -> Tensor:
        return torch.cat(self.parts) if self.per_row else torch.stack(self.parts).sum()


class _Accumulated:
    """Errors of a tensor that is looked at in pieces."""

    def __init__(self) -> None:
        self.largest = [0.0] * 3
        self.squares = [0.0] * 3
        self.elements = 0

    def add(self, exact: Tensor, ours: Tensor, torchs: Tensor) -> None:
        self.elements += exact.numel()
        for number, difference in enumerate((ours.double() - exact, torchs.double() - exact, exact)):
            largest = difference.abs().max().item()
            self.largest[number] = math.nan if math.isnan(largest) else max(self.largest[number], largest)
            self.squares[number] += difference.square().sum().item()

    def errors(self) -> Errors:
        ours, torchs, exact = (
            (largest, square**0.5) for largest, square in zip(self.largest, self.squares, strict=True)
        )
        return Errors(ours, torchs, exact, (1.0, self.elements**0.5))


def _errors(exact: Tensor, ours: Tensor, torchs: Tensor) -> Errors:
    found = _Accumulated()
    found.add(exact, ours, torchs)
    return found.errors()


def _same_bits(one: Outcome, other: Outcome) -> bool:
    pairs = zip(chain([one.loss], one.gradients), chain([other.loss], other.gradients), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def _exact_zeros(problem: Problem, outcome: Outcome) -> list[str]:
    if not outcome.gradients or bool((outcome.gradients[0][~counted_of(problem)] == 0).all()):
        return []
    return ["rows that do not count have a gradient other than 0"]


def _wrong_statistics(problem: Problem, outcome: Outcome) -> list[str]:
    """The linear loss rounds its logits to their dtype before it takes statistics: they are left to its loss."""
    if outcome.stats is None or problem.linear:
        return []
    counted = counted_of(problem)
    found = list(exact_pieces(problem, 1.0))
    count = int(counted.sum())
    nll = torch.cat([piece.nll for piece in found])[counted].sum().item() / count
    accuracy = torch.cat([piece.hits for piece in found])[counted].sum().item() / count
    u = torch.ones_like(problem.weights[:1]) if problem.token_weights is None else problem.token_weights.abs()
    weight_sum = torch.where(counted, u.double() * problem.weights.double()[problem.targets.clamp(min=0)], 0).sum()
    expected = {"nll": nll, "accuracy": accuracy, "weight_sum": weight_sum.item(), "token_count": count}
    problems = []
    for name, want in expected.items():
        got = getattr(outcome.stats, name).item()
        if not abs(got - want) <= 1e-5 * abs(want):
            problems.append(f"{name} is {got}, expected {want}")
    return problems
