"""flash-attention's Triton loss: no class weights; one loss per row."""

from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss, gpu_only, mean_over_counted

MODULE = "flash_attn.ops.triton.cross_entropy"


def build(inputs: Inputs, inplace: bool = False) -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def loss(logits: Tensor) -> Tensor:
        row_losses, _ = cross_entropy_loss(logits, inputs.targets, ignore_index=IGNORE_INDEX, inplace_backward=inplace)
        return mean_over_counted(row_losses, inputs.targets)

    return loss


CONTENDERS = (
    Contender(
        "flash-attention",
        "flash-attention",
        build,
        weighted=False,
        problem=gpu_only(MODULE),
        packages=("flash-attn",),
    ),
    Contender(
        "flash-attention in place",
        "flash-attention",
        lambda inputs: build(inputs, inplace=True),
        weighted=False,
        overwrites=True,
        problem=gpu_only(MODULE),
        packages=("flash-attn",),
    ),
)
