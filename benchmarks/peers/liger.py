"""Liger-Kernel: the gradient is written over the logits in forward, ignored rows are zeroed in any case."""

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss, gpu_only

MODULE = "liger_kernel.transformers.functional"


def build(inputs: Inputs) -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits: liger_cross_entropy(
        logits, inputs.targets, weight=inputs.weights, ignore_index=IGNORE_INDEX, reduction="mean"
    )


def build_linear(inputs: Inputs) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, head: liger_fused_linear_cross_entropy(
        hidden, head, inputs.targets, ce_weight=inputs.weights, ignore_index=IGNORE_INDEX, reduction="mean"
    )


CONTENDERS = (
    Contender("liger", "liger", build, overwrites=True, problem=gpu_only(MODULE), packages=("liger-kernel",)),
    Contender("liger linear", "liger", build_linear, linear=True, problem=gpu_only(MODULE), packages=("liger-kernel",)),
)
