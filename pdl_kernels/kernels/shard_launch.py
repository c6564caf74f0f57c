"""How kernels are launched where every rank of a group has some of the columns."""

import torch
from torch import Tensor

from pdl_kernels.kernels import launch, shards
from pdl_kernels.kernels.planner import TWO_PASSES, Layout, RowLaunch, fusion_options, make_variant, next_power_of_two
from pdl_kernels.options import LossInputs, LossOptions, RowOutputs, ShardLayout

MERGE = RowLaunch(TWO_PASSES, 32, 1, 1, None)  # a program of one warp for the numbers of one row


def shard_rows(inputs: LossInputs, options: LossOptions, layout: ShardLayout, found: Tensor) -> None:
    """Write what is found of each row in these columns to `found`, (F, N), laid out by `layout`, but for weights."""
    rows = inputs.targets.shape[0]
    if rows == 0:
        return
    if inputs.logits.shape[-1] == 0:
        found.zero_()
        found[layout.row_max].fill_(torch.finfo(torch.float32).min)
        return
    # Denominators come later: they may depend on what the others say.
    options = options._replace(reduction="sum")
    with launch.on_device(inputs.logits):
        plan = launch.loss_plans(inputs, options, None)[-1]
        outputs = RowOutputs(None, found, None)  # type: ignore[arg-type]
        launch.launch_loss_rows(plan, inputs, found, None, outputs)  # no scalar is read


def merge_shards(
    inputs: LossInputs,
    options: LossOptions,
    scalars: Tensor,
    layout: ShardLayout,
    gathered: Tensor,  # (R, F, N): what `shard_rows` found on each of R ranks
    totals: Tensor | None,  # (R,) sum of the weights of each rank's columns, for label smoothing
) -> RowOutputs:
    """Each row's loss, state and statistics in the whole vocabulary."""
    rows = inputs.targets.shape[0]
    stats = scalars.new_empty(2, rows) if options.return_stats else None
    outputs = RowOutputs(scalars.new_empty(rows), scalars.new_empty(2, rows), stats)
    if rows == 0:
        return outputs
    assert inputs.shard is not None
    with launch.on_device(scalars):
        variant = make_variant(1, 4, options, Layout("any", "any", True, False), MERGE)
        shards.merge_shards_kernel[(rows,)](
            gathered, totals, inputs.targets, inputs.shard.row_weights, inputs.token_weights, scalars, *outputs,
            rows, len(gathered), gathered.stride(0), 0 if totals is None else totals.stride(0), inputs.vocab_size,
            *launch.numbers_of(options), next_power_of_two(len(gathered)), variant._replace(shard=True), variant,
            num_warps=MERGE.warps, **fusion_options(softcap=variant.softcap),
        )  # fmt: skip
    return outputs
