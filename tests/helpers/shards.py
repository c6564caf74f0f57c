"""All ranks' parts of a split vocabulary, one after the other in one process, without torch.distributed."""

from itertools import pairwise

import torch

from helpers import Result
from pdl_kernels import LossStats, backends
from pdl_kernels.ops.cross_entropy import check_targets
from pdl_kernels.ops.rows import empty_gradient, inputs_as_rows
from pdl_kernels.options import ACCURACY, NLL, WEIGHT_SUM, WEIGHT_TOTAL, LossInputs, LossOptions, Shard, ShardLayout


def run_shards(backend, logits, targets, weights, ends, *, upstream=1.0, token_weights=None, inplace=False, **options):
    """[Result] of every rank; its gradient is that of its own columns, which end where `ends` says.

    `logits` are (..., V), or a list of each rank's columns.
    """
    options = LossOptions(**options)
    bounds = list(pairwise([0, *ends]))
    V = ends[-1]
    check_targets(targets, V, options.ignore_index)
    parts = logits if isinstance(logits, list) else [logits[..., begin:end] for begin, end in bounds]
    chosen, module = backends.backend_module(backend), backends.shards_module(backend)
    device = parts[0].device
    dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    y = targets.reshape(-1)
    row_weights = None if weights is None else weights[torch.where((y >= 0) & (y < V), y, 0).long()]
    layout = ShardLayout.of(smoothing=options.label_smoothing > 0, row_weights=False)

    inputs, found, totals = [], [], []
    for part, (begin, end) in zip(parts, bounds, strict=True):
        table = None if weights is None else weights[begin:end]
        given = LossInputs(part, targets, table, token_weights, shard=Shard(begin, V, row_weights))
        inputs.append(inputs_as_rows(given))
        found.append(torch.empty(layout.numbers, y.numel(), dtype=dtype, device=device))
        module.shard_rows(inputs[-1], options, layout, found[-1])
        totals.append(end - begin if weights is None else table.sum().item())
    gathered = torch.stack(found)
    totals = torch.tensor(totals, dtype=dtype, device=device) if options.label_smoothing > 0 else None

    results = []
    for given, part in zip(inputs, parts, strict=True):
        scalars, token_count = chosen.denominators(given, options)
        if totals is not None:
            scalars[WEIGHT_TOTAL] = totals.sum()
        rows = module.merge_shards(given, options, scalars, layout, gathered, totals)
        loss = chosen.reduce_rows(rows, options, scalars, token_count)
        gradient = given.logits if inplace else empty_gradient(given.logits)
        given_upstream = torch.as_tensor(upstream, dtype=dtype, device=device)
        chosen.backward(given, options, rows.state, scalars, given_upstream, gradient)
        stats = LossStats(scalars[NLL], scalars[ACCURACY], scalars[WEIGHT_SUM], token_count)
        loss = loss.view(targets.shape) if options.reduction == "none" else loss
        results.append(Result(loss, gradient.reshape(part.shape), stats if options.return_stats else None))
    return results
