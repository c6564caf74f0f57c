"""What is timed: forward, and forward + backward with two upstream gradients, for any contender."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.peers.contender import Contender, Loss


class Operation(NamedTuple):
    name: str
    upstream: float | None  # of the loss; None: forward alone, without gradients

    @property
    def has_backward(self) -> bool:
        return self.upstream is not None


FORWARD = Operation("forward", None)
TRAINING = Operation("forward-backward", 1.0)
SCALED_TRAINING = Operation("forward-backward-scaled", 0.25)
OPERATIONS = {operation.name: operation for operation in (FORWARD, TRAINING, SCALED_TRAINING)}
TITLES = {
    "forward": "forward",
    "forward-backward": "forward + backward",
    "forward-backward-scaled": "forward + backward, upstream 0.25",
}


class Outcome(NamedTuple):
    loss: Tensor  # ()
    gradients: tuple[Tensor, ...]  # of Inputs.sources; none of a forward alone

    @property
    def gradient(self) -> Tensor | None:
        """Of the logits."""
        return self.gradients[0] if self.gradients else None


class _MadeByAModel(torch.autograd.Function):
    """Makes a non-leaf of the logits without copying them: what it returns may be overwritten, a leaf may not."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def make_run(contender: Contender, inputs: Inputs) -> "Run":
    """The contender with memory of its own to overwrite, where it does."""
    return Run(contender, inputs, torch.empty_like(inputs.logits) if contender.overwrites else None)


class Run:
    """One contender bound to one case's inputs.

    Logits come from a model, whose gradients flow on; hidden states and output layer are leaves.
    """

    def __init__(self, contender: Contender, inputs: Inputs, scratch: Tensor | None) -> None:
        """`scratch`, (rows, V), takes the logits anew before each run of a contender that overwrites them."""
        self.contender = contender
        self.inputs = inputs
        self._scratch = scratch
        self._losses: dict[float, Loss] = {}  # by upstream gradient
        self._upstream: dict[float, Tensor] = {}

    def prepare(self, operation: Operation) -> Callable[[], Outcome]:
        """Everything that is not timed; calling the result is the operation."""
        upstream = operation.upstream
        if self.inputs.case.linear:
            sources = tuple(source.detach().requires_grad_(upstream is not None) for source in self.inputs.sources)
        else:
            sources = (self._logits(upstream is not None),)
        expected = 1.0 if upstream is None else upstream
        if expected not in self._losses:
            self._losses[expected] = self.contender.build(self.inputs._replace(upstream=expected))
        loss = self._losses[expected]
        if upstream is None:
            return lambda: self._forward(loss, sources)
        return lambda: self._forward_backward(loss, sources, upstream)

    def _logits(self, requires_grad: bool) -> Tensor:
        logits = self.inputs.logits
        if self.contender.overwrites:
            assert self._scratch is not None, f"{self.contender.name} overwrites its logits"
            logits = self._scratch.copy_(logits)
        if not requires_grad:
            return logits
        leaf = torch.zeros((), dtype=logits.dtype, device=logits.device).expand(logits.shape).requires_grad_()
        return _MadeByAModel.apply(leaf, logits)

    def _forward(self, function: Loss, sources: tuple[Tensor, ...]) -> Outcome:
        with torch.no_grad():
            return Outcome(function(*sources), ())

    def _forward_backward(self, function: Loss, sources: tuple[Tensor, ...], upstream: float) -> Outcome:
        loss = function(*sources)
        if upstream not in self._upstream:  # in the first run, which is not timed
            self._upstream[upstream] = torch.full_like(loss, upstream)
        gradients = torch.autograd.grad(loss, sources, self._upstream[upstream])
        return Outcome(loss.detach(), gradients)
