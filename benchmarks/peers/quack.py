"""QuACK: CuTe kernels with class weights; its public loss forms the gradient in backward, from a second read.

Its linear loss takes no class weights.
"""

import torch

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss, gpu_only

_importable = gpu_only("quack.cross_entropy")


def problem(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return "its kernels need sm_90 or later"
    return _importable(device)


def build(inputs: Inputs, inplace: bool = False) -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda logits: cross_entropy(
        logits,
        inputs.targets,
        weight=inputs.weights,
        ignore_index=IGNORE_INDEX,
        reduction="mean",
        inplace_backward=inplace,
    )


def build_linear(inputs: Inputs) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, head: chunked_linear_cross_entropy(hidden, head, inputs.targets, ignore_index=IGNORE_INDEX)


CONTENDERS = (
    Contender("quack", "quack", build, problem=problem, packages=("quack-kernels",)),
    Contender(
        "quack in place",
        "quack",
        lambda inputs: build(inputs, inplace=True),
        overwrites=True,
        problem=problem,
        packages=("quack-kernels",),
    ),
    Contender(
        "quack linear",
        "quack",
        build_linear,
        weighted=False,
        linear=True,
        problem=lambda device: problem(device) or gpu_only("quack.linear_cross_entropy")(device),
        packages=("quack-kernels",),
    ),
)
