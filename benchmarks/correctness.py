"""Whether a contender computes what it claims, on the very inputs it will be timed on.

The float64 reference runs over a few rows at a time, so that its memory stays bounded. The tolerances only tell right
from wrong, for peers that round more than this package does; how exact the package is, its tests say.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.operations import Operation, Outcome, Run
from reference import reference_cross_entropy


class Tolerance(NamedTuple):
    loss: float  # relative
    gradient: float  # relative, of the target's column and of the norm of the other columns, row by row
    probability: float  # absolute, of the target: p - 1 cancels where the model is confident


TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-3, 1e-4),
    torch.bfloat16: Tolerance(3e-2, 5e-2, 1e-2),
    torch.float16: Tolerance(1e-2, 2e-2, 2e-3),
}
PIECE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}  # float64 logits of the reference at a time


class Verdict(NamedTuple):
    loss_error: float  # relative
    gradient_error: float  # the worst row's, as a share of what is allowed; 0 where there is no gradient
    problem: str | None  # None: right


class ExpectedPiece(NamedTuple):
    rows: slice
    loss: Tensor  # () this piece's share of the mean
    gradient: Tensor  # (R, V) float64
    factors: Tensor  # (R,) what p - [j == y] is multiplied by: w(y) / D, 0 where ignored


def check(run: Run, operations: list[Operation]) -> dict[str, Verdict]:
    """One verdict per operation, by its name. The first run also compiles whatever needs compilation."""
    inputs = run.inputs
    before = _fingerprint(inputs.logits)
    outcomes: dict[str, Outcome] = {}
    for operation in operations:
        outcome = run.prepare(operation)()
        if run.contender.overwrites and outcome.gradient is not None:
            outcome = outcome._replace(gradient=outcome.gradient.clone())  # the next run restores the logits there
        outcomes[operation.name] = outcome
    if _fingerprint(inputs.logits) != before:
        problem = "it wrote to logits that it was to leave alone"
        return {operation.name: Verdict(0.0, 0.0, problem) for operation in operations}

    expected_loss = torch.zeros((), dtype=torch.float64, device=inputs.device)
    gradient_errors = dict.fromkeys(outcomes, 0.0)
    for piece in expected(inputs, run.contender.weighted):
        expected_loss += piece.loss
        for operation in operations:
            gradient = outcomes[operation.name].gradient
            if gradient is not None and operation.upstream is not None:
                error = _gradient_error(gradient[piece.rows], piece, inputs, operation.upstream)
                gradient_errors[operation.name] = max(gradient_errors[operation.name], error)
    return {
        name: _verdict(outcome.loss, expected_loss.item(), gradient_errors[name], inputs)
        for name, outcome in outcomes.items()
    }


def expected(inputs: Inputs, weighted: bool) -> Iterator[ExpectedPiece]:
    """The reference's loss and gradient for an upstream gradient of 1, a few rows at a time."""
    weights = inputs.weights if weighted else torch.ones_like(inputs.weights)
    counted = inputs.targets != IGNORE_INDEX
    denominator = weights.double()[inputs.targets[counted]].sum()
    rows, vocab_size = inputs.logits.shape
    size = max(1, PIECE_ELEMENTS.get(inputs.device.type, PIECE_ELEMENTS["cpu"]) // vocab_size)
    factors = torch.where(counted, weights.double()[inputs.targets.clamp(min=0)] / denominator, 0)  # (rows,)
    with inputs.device:  # where the reference makes its tensors
        for start in range(0, rows, size):
            piece = slice(start, start + size)
            exact = inputs.logits[piece].double().requires_grad_()  # (R, V)
            loss, _ = reference_cross_entropy(exact, inputs.targets[piece], weights, normalizer=denominator)
            (gradient,) = torch.autograd.grad(loss, exact)
            yield ExpectedPiece(piece, loss.detach(), gradient, factors[piece])


def _gradient_error(got: Tensor, piece: ExpectedPiece, inputs: Inputs, upstream: float) -> float:
    """The worst row's error, as a share of what is allowed; inf where the gradient is nan.

    The target's column and the others are judged apart: their sizes differ by orders of magnitude.
    """
    want = piece.gradient * upstream  # (R, V)
    difference = got.double() - want
    y = inputs.targets[piece.rows].clamp(min=0)[:, None]  # (R, 1)
    limits = torch.finfo(got.dtype)
    step = limits.smallest_normal * limits.eps  # float16 rounds the smallest gradients to multiples of it
    tolerance = TOLERANCES[got.dtype]
    allowed = tolerance.gradient * want.gather(1, y).abs() + step  # (R, 1)
    allowed += tolerance.probability * abs(upstream) * piece.factors[:, None]
    target_error = difference.gather(1, y).abs() / allowed
    allowed = tolerance.gradient * want.scatter(1, y, 0).norm(dim=1) + step * want.shape[1] ** 0.5  # (R,)
    other_error = difference.scatter_(1, y, 0).norm(dim=1) / allowed
    worst = torch.stack((target_error.max(), other_error.max())).nan_to_num(nan=torch.inf)
    return worst.max().item()


def _verdict(loss: Tensor, expected_loss: float, gradient_error: float, inputs: Inputs) -> Verdict:
    loss_error = abs(loss.double().item() - expected_loss) / max(abs(expected_loss), 1e-30)
    allowed = TOLERANCES[inputs.logits.dtype].loss
    problems = []
    if not loss_error <= allowed:  # nan is wrong too
        problems.append(f"relative error of the loss {loss_error:.1e}, allowed {allowed:.0e}")
    if not gradient_error <= 1:
        problems.append(f"gradient's error {gradient_error:.1f} times what is allowed")
    return Verdict(loss_error, gradient_error, "; ".join(problems) or None)


def _fingerprint(logits: Tensor) -> int:
    integers = logits.view(torch.int16 if logits.element_size() == 2 else torch.int32)
    return int(integers.sum(dtype=torch.int64))
