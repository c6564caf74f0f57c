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
    loss: float  # relative, of losses below SMALL_LOSS to that
    gradient: float  # relative, of the target's column and of the norm of the other columns, row by row
    probability: float  # absolute, of the target: p - 1 cancels where the model is confident


TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-3, 1e-4),
    torch.bfloat16: Tolerance(3e-2, 5e-2, 1e-2),
    torch.float16: Tolerance(1e-2, 2e-2, 2e-3),
}
SMALL_LOSS = 1.0  # nats. A confident row's loss is the log of 1 + many small terms, each rounded when added to the 1
BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}  # float64 logits of the reference at a time


class Verdict(NamedTuple):
    loss_error: float  # relative
    gradient_error: float  # the worst row's, as a share of what is allowed; 0 where there is no gradient
    problem: str | None  # None: right


class ExpectedRows(NamedTuple):
    rows: slice
    loss: Tensor  # () this block's share of the mean
    gradient: Tensor  # (R, V) float64
    factors: Tensor  # (R,) what p - [j == y] is multiplied by: w(y) / D, 0 where ignored


def check(run: Run, operations: list[Operation]) -> dict[str, Verdict]:
    """One verdict per operation, by its name. The first run also compiles whatever needs compilation."""
    inputs = run.inputs
    before = [_fingerprint(source) for source in inputs.sources]
    outcomes: dict[str, Outcome] = {}
    for operation in operations:
        outcome = run.prepare(operation)()
        if run.contender.overwrites and outcome.gradients:  # the next run restores the logits there
            outcome = outcome._replace(gradients=tuple(gradient.clone() for gradient in outcome.gradients))
        outcomes[operation.name] = outcome
    if [_fingerprint(source) for source in inputs.sources] != before:
        problem = "it wrote to inputs that it was to leave alone"
        return {operation.name: Verdict(0.0, 0.0, problem) for operation in operations}
    if inputs.case.linear:
        return _check_linear(run, outcomes, {operation.name: operation.upstream for operation in operations})

    expected_loss = torch.zeros((), dtype=torch.float64, device=inputs.device)
    gradient_errors = dict.fromkeys(outcomes, 0.0)
    for block in expected_rows(inputs, run.contender.weighted):
        expected_loss += block.loss
        for operation in operations:
            gradient = outcomes[operation.name].gradient
            if gradient is not None and operation.upstream is not None:
                error = _gradient_error(gradient[block.rows], block, inputs, operation.upstream)
                gradient_errors[operation.name] = max(gradient_errors[operation.name], error)
    return {
        name: _verdict(outcome.loss, expected_loss.item(), gradient_errors[name], inputs)
        for name, outcome in outcomes.items()
    }


def _check_linear(run: Run, outcomes: dict[str, Outcome], upstreams: dict[str, float | None]) -> dict[str, Verdict]:
    """Gradients of hidden states and output layer are sums over many logits, judged by their norms."""
    inputs = run.inputs
    tolerance = TOLERANCES[inputs.sources[0].dtype].gradient
    loss, gradients = expected_linear(inputs, run.contender.weighted)
    verdicts = {}
    for name, outcome in outcomes.items():
        worst = 0.0
        for got, want in zip(outcome.gradients, gradients if outcome.gradients else (), strict=True):
            want = want * (upstreams[name] or 0)
            error = (got.double() - want).norm() / (tolerance * want.norm())
            worst = max(worst, error.nan_to_num(nan=torch.inf).item())
        verdicts[name] = _verdict(outcome.loss, loss, worst, inputs)
    return verdicts


def expected_linear(inputs: Inputs, weighted: bool) -> tuple[float, tuple[Tensor, Tensor]]:
    """The reference's loss, and its gradients of hidden states (rows, H) and output layer (V, H), in float64."""
    hidden, head = (source.double() for source in inputs.sources)
    to_hidden, to_head = torch.zeros_like(hidden), torch.zeros_like(head)
    loss = 0.0
    rows = _block_rows(inputs)
    for start in range(0, inputs.case.rows, rows):
        block = slice(start, start + rows)
        logits = hidden[block] @ head.T  # (R, V)
        found = next(expected_rows(inputs._replace(sources=(logits,)), weighted, block))
        loss += found.loss.item()
        to_hidden[block] = found.gradient @ head
        to_head.addmm_(found.gradient.T, hidden[block])
    return loss, (to_hidden, to_head)


def _block_rows(inputs: Inputs) -> int:
    return max(1, BLOCK_ELEMENTS.get(inputs.device.type, BLOCK_ELEMENTS["cpu"]) // inputs.case.vocab_size)


def expected_rows(inputs: Inputs, weighted: bool, only: slice | None = None) -> Iterator[ExpectedRows]:
    """The reference's loss and gradient for an upstream gradient of 1, a few rows at a time.

    With `only`, the logits are those rows alone, and so is the block.
    """
    weights = inputs.weights if weighted else torch.ones_like(inputs.weights)
    counted = inputs.targets != IGNORE_INDEX
    denominator = weights.double()[inputs.targets[counted]].sum()
    size = _block_rows(inputs)
    factors = torch.where(counted, weights.double()[inputs.targets.clamp(min=0)] / denominator, 0)  # (rows,)
    with inputs.device:  # where the reference makes its tensors
        for block in [only] if only else [slice(start, start + size) for start in range(0, inputs.case.rows, size)]:
            logits = inputs.logits if only else inputs.logits[block]
            exact = logits.detach().double().requires_grad_()  # (R, V)
            loss, _ = reference_cross_entropy(exact, inputs.targets[block], weights, normalizer=denominator)
            (gradient,) = torch.autograd.grad(loss, exact)
            yield ExpectedRows(block, loss.detach(), gradient, factors[block])


def _gradient_error(got: Tensor, block: ExpectedRows, inputs: Inputs, upstream: float) -> float:
    """The worst row's error, as a share of what is allowed; inf where the gradient is nan.

    The target's column and the others are judged apart: their sizes differ by orders of magnitude.
    """
    want = block.gradient * upstream  # (R, V)
    difference = got.double() - want
    y = inputs.targets[block.rows].clamp(min=0)[:, None]  # (R, 1)
    limits = torch.finfo(got.dtype)
    step = limits.smallest_normal * limits.eps  # float16 rounds the smallest gradients to multiples of it
    tolerance = TOLERANCES[got.dtype]
    allowed = tolerance.gradient * want.gather(1, y).abs() + step  # (R, 1)
    allowed += tolerance.probability * abs(upstream) * block.factors[:, None]
    target_error = difference.gather(1, y).abs() / allowed
    allowed = tolerance.gradient * want.scatter(1, y, 0).norm(dim=1) + step * want.shape[1] ** 0.5  # (R,)
    other_error = difference.scatter_(1, y, 0).norm(dim=1) / allowed
    worst = torch.stack((target_error.max(), other_error.max())).nan_to_num(nan=torch.inf)
    return worst.max().item()


def _verdict(loss: Tensor, expected_loss: float, gradient_error: float, inputs: Inputs) -> Verdict:
    loss_error = abs(loss.double().item() - expected_loss) / max(abs(expected_loss), SMALL_LOSS)
    allowed = TOLERANCES[inputs.sources[0].dtype].loss
    problems = []
    if not loss_error <= allowed:  # nan is wrong too
        problems.append(f"relative error of the loss {loss_error:.1e}, allowed {allowed:.0e}")
    if not gradient_error <= 1:
        problems.append(f"gradient's error {gradient_error:.1f} times what is allowed")
    return Verdict(loss_error, gradient_error, "; ".join(problems) or None)


def _fingerprint(source: Tensor) -> int:
    integers = source.view(torch.int16 if source.element_size() == 2 else torch.int32)
    return int(integers.sum(dtype=torch.int64))
