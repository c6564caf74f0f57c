"""The loss on logits that are a DTensor: its placements say which ranks hold which columns and rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from pdl_kernels.distributed.collectives import name_of
from pdl_kernels.distributed.vocabulary import NONE, SHARDED, WHOLE, Split, even_split
from pdl_kernels.losses import checks
from pdl_kernels.ops import cross_entropy, sharded_cross_entropy
from pdl_kernels.ops.inplace import refuse_inplace
from pdl_kernels.options import CallOptions, LossInputs, LossOptions, LossOutputs

ACCEPTED = (
    "accepted are Shard and Replicate, with the class dimension split over one dimension of the mesh at most, or a "
    "plain tensor"
)


class _Places(NamedTuple):
    """Over which dimensions of the mesh what is split."""

    columns: int | None
    rows: tuple[int, ...]


def dtensor_cross_entropy(inputs: LossInputs, options: LossOptions, call: CallOptions) -> LossOutputs:
    """The loss as a DTensor on the logits' mesh, differentiable in them: one number, the same on every rank, or placed
    as the rows are. What serves the statistics is of the whole.
    """
    logits = inputs.logits
    assert isinstance(logits, DTensor)
    if call.group is not None:
        raise ValueError("group is given with logits that are a DTensor; accepted is None: their placements say it")
    mesh = logits.device_mesh
    places = _places_of(logits)
    local = LossInputs(
        logits.to_local(grad_placements=logits.placements),
        _local_rows("targets", inputs.targets, logits, places),
        inputs.weights,
        None if inputs.token_weights is None else _local_rows("token_weights", inputs.token_weights, logits, places),
        _whole(inputs.normalizer),
        _whole(inputs.expected_upstream),
        row_groups=tuple(name_of(mesh.get_group(dim)) for dim in places.rows),
    )
    outputs: LossOutputs
    if places.columns is None:
        local = local._replace(weights=_whole(inputs.weights))
        checks.check_inputs(local)
        # In place would bump the version of a view that torch made of the DTensor, which autograd forbids.
        outputs = cross_entropy.cross_entropy(local, options, call.backend)
    else:
        weights, split = _local_weights(inputs.weights, logits, places.columns)
        local = local._replace(weights=weights)
        checks.check_inputs(local, sharded=True)
        if call.inplace and logits.requires_grad and torch.is_grad_enabled():
            refuse_inplace(logits)
        group = mesh.get_group(places.columns)
        outputs = sharded_cross_entropy.sharded_cross_entropy(
            local, options, call.backend, group, split, inplace=call.inplace
        )
    return outputs._replace(loss=_global_loss(outputs.loss, logits, places))


def _places_of(logits: DTensor) -> _Places:
    columns: list[int] = []
    rows: list[int] = []
    for dim, placement in enumerate(logits.placements):
        if type(placement) is Shard:
            (columns if placement.dim in (-1, logits.dim() - 1) else rows).append(dim)
        elif type(placement) is not Replicate:
            columns = [-1, -1]
            break
    if len(columns) > 1:
        raise TypeError(f"logits are a DTensor placed {_shown(logits)}; {ACCEPTED}")
    return _Places(columns[0] if columns else None, tuple(rows))


def _shown(tensor: DTensor) -> str:
    return f"{tensor.placements} on a mesh of shape {tuple(tensor.device_mesh.shape)}"


def _row_placements(logits: DTensor, places: _Places) -> list[Placement]:
    """How tensors are placed that have the logits' rows and no columns."""
    return [placement if dim in places.rows else Replicate() for dim, placement in enumerate(logits.placements)]


def _local_rows(name: str, value: Any, logits: DTensor, places: _Places) -> Any:
    """This rank's part of targets or token weights."""
    if isinstance(value, DTensor):
        if value.device_mesh != logits.device_mesh:
            raise ValueError(
                f"{name} are on the mesh {value.device_mesh} and logits on {logits.device_mesh}; accepted is one"
            )
        if value.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} have shape {tuple(value.shape)} and logits {tuple(logits.shape)}; accepted is the shape "
                f"{tuple(logits.shape[:-1])}"
            )
        return value.redistribute(placements=_row_placements(logits, places)).to_local()
    if places.rows and isinstance(value, Tensor):
        raise TypeError(
            f"{name} are a plain tensor, and logits a DTensor whose rows are split, placed {_shown(logits)}; accepted "
            f"are {name} that are a DTensor, on the same mesh"
        )
    return value


def _local_weights(weights: Any, logits: DTensor, columns: int) -> tuple[Any, Split]:
    """This rank's table, and how the vocabulary is split."""
    V, mesh = logits.shape[-1], logits.device_mesh
    split = even_split(V, mesh.get_group(columns), NONE if weights is None else WHOLE)
    width = logits.to_local().shape[-1]
    if width != split.size:
        raise ValueError(
            f"logits are a DTensor of {V} columns, of which this rank holds {width}; accepted are {split.size}, as "
            "DTensor splits them"
        )
    if isinstance(weights, DTensor):
        own = [Shard(0) if dim == columns else Replicate() for dim in range(mesh.ndim)]
        if weights.device_mesh == mesh and list(weights.placements) == own and weights.shape == (V,):
            return weights.to_local(), split._replace(weights=SHARDED)
        weights = weights.full_tensor()
    if isinstance(weights, Tensor) and weights.shape != (V,):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; accepted is ({V},), one per column of the whole logits, or a "
            "DTensor of that shape"
        )
    return weights, split


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _global_loss(loss: Tensor, logits: DTensor, places: _Places) -> DTensor:
    mesh = logits.device_mesh
    if loss.dim() == 0:
        partial = [Partial() if dim in places.rows else Replicate() for dim in range(mesh.ndim)]
        # Added up, because item() of a partial sum is this rank's part of it.
        return DTensor.from_local(loss, mesh, partial, run_check=False).redistribute(
            placements=[Replicate()] * mesh.ndim
        )
    shape = logits.shape[:-1]
    stride = torch.empty(shape, device="meta").stride()
    placements = _row_placements(logits, places)
    return DTensor.from_local(loss, mesh, placements, run_check=False, shape=shape, stride=stride)
