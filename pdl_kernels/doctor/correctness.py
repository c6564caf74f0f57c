"""One case of `pdl-kernels doctor --check`: run it and compare it with the loss composed in float64.

A tensor is right if its error, in the maximum norm and in the 2-norm, is at most the sum of

- twice the error of torch's own composition in the same dtype,
- one rounding of that dtype and 1e-6, both relative to the norm of the float64 result,
- the dtype's smallest step for every element, which is all that float16 has left of small probabilities.

It is twice torch's error and one rounding more because chance decides whose roundings are smaller; a fault is off by
far more. The test suite, whose inputs are chosen for it, is stricter.

Besides, the same call made twice must give the same bits, rows that do not count must have gradients of exactly 0, and
the nan that ignored rows hold must not reach the loss, because such rows are not to be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_kernels.backends import interpreted
from pdl_kernels.doctor.calls import Outcome, make_call, make_problem, make_upstream
from pdl_kernels.doctor.cases import RECIPES, Case
from pdl_kernels.doctor.composition import (
    Portion,
    Problem,
    counted_of,
    exact_portions,
    source_gradients,
    torchs_portions,
)
from pdl_kernels.doctor.kernels import heard_launches, reading_twice

RELATIVE = 1e-6
TORCHS_SHARE = 2.0


class Errors(NamedTuple):
    """Absolute errors of one tensor. Every pair is of the maximum norm and the 2-norm."""

    ours: tuple[float, float]
    torchs: tuple[float, float]
    norms: tuple[float, float]  # of the float64 result
    ones: tuple[float, float]  # the norms of as many ones, which turn a step of each element into one of the tensor

    def worst_ratio(self, rounding: float, step: float = 0.0) -> float:
        """The error as a share of what is allowed; `rounding` is relative, `step` absolute."""
        ratios = []
        for ours, torchs, norm, ones in zip(self.ours, self.torchs, self.norms, self.ones, strict=True):
            allowed = TORCHS_SHARE * torchs + (RELATIVE + rounding) * norm + step * ones
            ratios.append(ours / allowed if allowed > 0 else (0.0 if ours == 0 else math.inf))
        return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)

    def relative(self, whose: tuple[float, float]) -> float:
        """`ours` or `torchs` relative to the float64 result, in the 2-norm."""
        return whose[1] / self.norms[1] if self.norms[1] > 0 else whose[1]


def check_case(case: Case, device: torch.device, backend: str) -> dict[str, Any]:
    """Run one case and compare it; the verdict, as JSON can hold it."""
    recipe = RECIPES[case.recipe]
    problem = make_problem(case, device)
    upstream = make_upstream(problem, recipe)
    call = make_call(problem, recipe, upstream, backend)
    with reading_twice(recipe.read_twice):
        launched: list[str] = []
        with heard_launches(launched):
            call()  # compiles
        second = call()
        third = call()
    errors = compare(problem, second, upstream)
    ratios = {name: _share_of_allowed(found, dtype, backend) for name, (dtype, found) in errors.items()}
    problems = [] if _same_bits(second, third) else ["the same call gave other bits the second time"]
    problems += [
        f"{name}: {ratio:.3g} times the error that is allowed" for name, ratio in ratios.items() if not ratio <= 1
    ]
    problems += _exact_zeros(problem, second)
    problems += _wrong_statistics(problem, second)
    (_, loss), *gradients = errors.values()
    (_, gradient) = gradients[0] if gradients else (None, None)
    return {
        "status": "wrong" if problems else "right",
        "problem": "; ".join(problems) or None,
        "kernels": sorted(set(launched)) if backend == "triton" and not interpreted() else None,
        "loss_error": loss.relative(loss.ours),
        "torch_loss_error": loss.relative(loss.torchs),
        "gradient_error": gradient and gradient.relative(gradient.ours),
        "torch_gradient_error": gradient and gradient.relative(gradient.torchs),
        "share_of_allowed": max(ratios.values()),
    }


def _share_of_allowed(errors: Errors, dtype: torch.dtype, backend: str) -> float:
    limits = torch.finfo(dtype)
    roundings = 2.0 if interpreted() and backend == "triton" else 1.0  # the interpreter truncates to bfloat16
    return errors.worst_ratio(roundings * limits.eps / 2, limits.smallest_normal * limits.eps)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def compare(problem: Problem, outcome: Outcome, upstream: float | Tensor) -> dict[str, tuple[torch.dtype, Errors]]:
    """For each tensor by name, the loss first: the dtype whose rounding is allowed for, and the errors."""
    dtype = problem.sources[0].dtype
    if problem.linear:
        return _compare_linear(problem, outcome, upstream, dtype)
    loss, torchs_loss = _Loss(problem.per_row), _Loss(problem.per_row)
    gradient = _Accumulated()
    for exact, torchs in zip(exact_portions(problem, upstream), torchs_portions(problem, upstream), strict=True):
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
    exact_loss, torchs_loss = _Loss(False), _Loss(False)
    exact = source_gradients(problem, exact_loss.watch(exact_portions(problem, upstream)))
    torchs = source_gradients(problem, torchs_loss.watch(torchs_portions(problem, upstream)))
    found = {"loss": (dtype, _errors(exact_loss.total, outcome.loss, torchs_loss.total))}  # its logits are rounded
    for name, *tensors in zip(("hidden gradient", "head gradient"), exact, outcome.gradients, torchs, strict=True):
        found[name] = (dtype, _errors(*tensors))
    return found


class _Loss:
    """The loss put together from portions of the rows: their sum, or one loss a row."""

    def __init__(self, per_row: bool) -> None:
        self.per_row = per_row
        self.parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        self.parts.append(part)

    def watch(self, found: Iterator[Portion]) -> Iterator[Portion]:
        for portion in found:
            self.add(portion.loss)
            yield portion

    @property
    def total(self) -> Tensor:
        return torch.cat(self.parts) if self.per_row else torch.stack(self.parts).sum()


class _Accumulated:
    """Errors of a tensor that is seen a portion at a time."""

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
    """Statistics of the loss on logits; those of the linear loss are of logits rounded to their dtype, so left out."""
    if outcome.stats is None or problem.linear:
        return []
    counted = counted_of(problem)
    found = list(exact_portions(problem, 1.0))
    count = int(counted.sum())
    nll = torch.cat([portion.nll for portion in found])[counted].sum().item() / count
    accuracy = torch.cat([portion.hits for portion in found])[counted].sum().item() / count
    u = torch.ones_like(problem.weights[:1]) if problem.token_weights is None else problem.token_weights.abs()
    weight_sum = torch.where(counted, u.double() * problem.weights.double()[problem.targets.clamp(min=0)], 0).sum()
    expected = {"nll": nll, "accuracy": accuracy, "weight_sum": weight_sum.item(), "token_count": count}
    problems = []
    for name, want in expected.items():
        got = getattr(outcome.stats, name).item()
        if not abs(got - want) <= 1e-5 * abs(want):
            problems.append(f"{name} is {got}, expected {want}")
    return problems
