"""torch's own compositions: F.cross_entropy with class weights, which it wants in the logits' dtype, and F.linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss


def build(inputs: Inputs) -> Loss:
    weights = inputs.weights.to(inputs.sources[0].dtype)
    return lambda logits: F.cross_entropy(logits, inputs.targets, weight=weights, ignore_index=IGNORE_INDEX)


def build_linear(inputs: Inputs) -> Loss:
    loss = build(inputs)
    return lambda hidden, head: loss(F.linear(hidden, head))


def build_chunked(inputs: Inputs) -> Loss:
    """torch's own operation with its default chunks."""
    weights = inputs.weights.to(inputs.sources[0].dtype)
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            hidden, head, inputs.targets, weight=weights, ignore_index=IGNORE_INDEX, options=options
        )

    return loss


def lacks_chunks(device: torch.device) -> str | None:
    found = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if found else "F.linear_cross_entropy came with torch 2.13"


CONTENDERS = (
    Contender("torch", "torch", build),
    Contender("torch linear", "torch", build_linear, linear=True),
    Contender(
        "torch chunked",
        "torch",
        build_chunked,
        linear=True,
        problem=lacks_chunks,
        not_quick="on a CPU it takes seconds",
    ),
)
