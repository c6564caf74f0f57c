"""What is timed: forward, and forward + backward with two upstream gradients, for any contender."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.peers.contender import Contender


class Operation(NamedTuple):
    name: str
    upstream: float | None  # of the loss; None: forward alone, without gradients

    @property
    def has_backward(self) -> bool:
        return self.upstream is not None


# The linear variant's operations join here once it exists; its inputs are other tensors, its floor is in flops.
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
    gradient: Tensor | None  # (rows, V)


class _MadeByAModel(torch.autograd.Function):
    """Makes a non-leaf of the logits without copying them: what it returns may be overwritten, a leaf may not."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


class Run:
    """One contender bound to one case's inputs."""

    def __init__(self, contender: Contender, inputs: Inputs, scratch: Tensor | None) -> None:
        """`scratch`, (rows, V), takes the logits anew before each run of a contender that overwrites them."""
        self.contender = contender
        self.inputs = inputs
        self._scratch = scratch
        self._loss = contender.build(inputs)
        self._upstream: dict[float, Tensor] = {}

    def prepare(self, operation: Operation) -> Callable[[], Outcome]:
        """Everything that is not timed; calling the result is the operation."""
        logits = self.inputs.logits
        if self.contender.overwrites:
            assert self._scratch is not None, f"{self.contender.name} overwrites its logits"
            logits = self._scratch.copy_(logits)
        upstream = operation.upstream
        if upstream is None:
            return lambda: self._forward(logits)
        leaf = torch.zeros((), dtype=logits.dtype, device=logits.device).expand(logits.shape).requires_grad_()
        made = _MadeByAModel.apply(leaf, logits)
        return lambda: self._forward_backward(made, upstream)

    def _forward(self, logits: Tensor) -> Outcome:
        with torch.no_grad():
            return Outcome(self._loss(logits), None)

    def _forward_backward(self, logits: Tensor, upstream: float) -> Outcome:
        loss = self._loss(logits)
        if upstream not in self._upstream:  # in the first run, which is not timed
            self._upstream[upstream] = torch.full_like(loss, upstream)
        (gradient,) = torch.autograd.grad(loss, logits, self._upstream[upstream])
        return Outcome(loss.detach(), gradient)
