"""This package: the Triton backend on GPUs, the eager one elsewhere; with memory for the gradient, and in place."""

import torch

from benchmarks.inputs import DTYPES, Case, Inputs
from benchmarks.peers.contender import Contender, Loss
from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy


def backend_of(device_type: str) -> str:
    """The one that is timed. Triton on a CPU means its interpreter, whose time says nothing."""
    return "triton" if device_type == "cuda" else "eager"


def rows_are_held(case: Case, device: torch.device) -> bool:
    """Whether the Triton backend reads the logits of this case once for loss and gradient."""
    from pdl_kernels.kernels import launch, planner

    itemsize = DTYPES[case.dtype].itemsize
    best, *_ = planner.plan_loss(
        case.rows, case.vocab_size, itemsize, launch.device_of(device), launch.TRITON_VERSION,
        head=case.vocab_size * itemsize % planner.VECTOR_BYTES != 0, clusters=launch.clusters_wanted(),
    )  # fmt: skip
    return best.kernel == planner.SINGLE_PASS


def _build(inputs: Inputs, inplace: bool) -> Loss:
    backend = backend_of(inputs.device.type)
    return lambda logits: pdl_cross_entropy(
        logits, inputs.targets, inputs.weights,
        expected_upstream=inputs.upstream, inplace=inplace, backend=backend,
    )  # fmt: skip


def build_linear(inputs: Inputs) -> Loss:
    backend = backend_of(inputs.device.type)
    return lambda hidden, head: pdl_linear_cross_entropy(
        hidden, head, inputs.targets, inputs.weights, expected_upstream=inputs.upstream, backend=backend
    )


CONTENDERS = (
    Contender("pdl", "pdl", lambda inputs: _build(inputs, inplace=False)),
    Contender("pdl in place", "pdl", lambda inputs: _build(inputs, inplace=True), overwrites=True),
    Contender("pdl linear", "pdl", build_linear, linear=True),
)
