"""Unsloth's Triton loss: no class weights, (batch, sequence, V) logits, -100 ignored.

Older versions write the gradient over the logits, later ones do not, so the logits are restored either way. Importing
Unsloth changes torch and transformers for the whole process: it is looked at after every other peer.
"""

from benchmarks.inputs import Inputs
from benchmarks.peers.contender import Contender, Loss, gpu_only

MODULE = "unsloth.kernels.cross_entropy_loss"


def build(inputs: Inputs) -> Loss:
    from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss

    targets = inputs.targets[None]  # (1, rows)
    return lambda logits: fast_cross_entropy_loss(logits[None], targets)


CONTENDERS = (
    Contender(
        "unsloth",
        "unsloth",
        build,
        weighted=False,
        overwrites=True,
        problem=gpu_only(MODULE),
        packages=("unsloth", "unsloth-zoo"),
    ),
)
