"""Cut Cross Entropy: the logits' tiles stay on chip; no class weights, and gradients near zero are left out."""

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss, gpu_only


def build(inputs: Inputs) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, head: linear_cross_entropy(hidden, head, inputs.targets, ignore_index=IGNORE_INDEX)


CONTENDERS = (
    Contender(
        "cce linear",
        "cce",
        build,
        weighted=False,
        linear=True,
        problem=gpu_only("cut_cross_entropy"),
        packages=("cut-cross-entropy",),
    ),
)
