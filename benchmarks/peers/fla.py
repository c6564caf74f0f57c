"""flash-linear-attention: Triton, no class weights; one loss per row, averaged as its module does."""

from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss, gpu_only, mean_over_counted

MODULE = "fla.modules.fused_cross_entropy"


def build(inputs: Inputs, inplace: bool = False) -> Loss:
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    def loss(logits: Tensor) -> Tensor:
        row_losses, _ = cross_entropy_loss(logits, inputs.targets, ignore_index=IGNORE_INDEX, inplace_backward=inplace)
        return mean_over_counted(row_losses, inputs.targets)

    return loss


CONTENDERS = (
    Contender("fla", "fla", build, weighted=False, problem=gpu_only(MODULE), packages=("fla-core",)),
    Contender(
        "fla in place",
        "fla",
        lambda inputs: build(inputs, inplace=True),
        weighted=False,
        overwrites=True,
        problem=gpu_only(MODULE),
        packages=("fla-core",),
    ),
)
