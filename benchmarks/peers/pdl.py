"""This package: the Triton backend on GPUs, the eager one elsewhere; with memory for the gradient, and in place."""

from benchmarks.inputs import Inputs
from benchmarks.peers.contender import Contender, Loss
from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy


def backend_of(device_type: str) -> str:
    """The one that is timed. Triton on a CPU means its interpreter, whose time says nothing."""
    return "triton" if device_type == "cuda" else "eager"


def _build(inputs: Inputs, inplace: bool) -> Loss:
    backend = backend_of(inputs.device.type)
    return lambda logits: pdl_cross_entropy(logits, inputs.targets, inputs.weights, inplace=inplace, backend=backend)


def build_linear(inputs: Inputs) -> Loss:
    backend = backend_of(inputs.device.type)
    return lambda hidden, head: pdl_linear_cross_entropy(hidden, head, inputs.targets, inputs.weights, backend=backend)


CONTENDERS = (
    Contender("pdl", "pdl", lambda inputs: _build(inputs, inplace=False)),
    Contender("pdl in place", "pdl", lambda inputs: _build(inputs, inplace=True), overwrites=True),
    Contender("pdl linear", "pdl", build_linear, linear=True),
)
