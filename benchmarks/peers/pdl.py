"""This package: the Triton backend on GPUs, the eager one elsewhere; with memory for the gradient, and in place."""

import torch

from benchmarks.inputs import DTYPES, Case, Inputs
from benchmarks.peers.contender import Contender, Loss
from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.ops.cross_entropy import empty_gradient
from pdl_kernels.options import LossInputs, LossOptions


def backend_of(device_type: str) -> str:
    """The one that is timed. Triton on a CPU means its interpreter, whose time says nothing."""
    return "triton" if device_type == "cuda" else "eager"


def rows_are_held(case: Case, device: torch.device) -> bool:
    """Whether the Triton backend reads the logits of this case once for loss and gradient."""
    from pdl_kernels.kernels import launch, planner

    logits = torch.empty(1, case.rows, case.vocab_size, dtype=DTYPES[case.dtype], device="meta")
    inputs = LossInputs(logits, logits.new_empty(case.rows, dtype=torch.int64), None, None, None)
    best, *_ = launch.loss_plans(inputs, LossOptions(), empty_gradient(logits), launch.device_of(device))
    return best.kernel == planner.SINGLE_PASS


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
