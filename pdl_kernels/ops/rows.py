"""What a call brings as backends take it: numbers on a device, logits as rows, memory for gradients."""

import math
from typing import Any

import torch
from torch import Tensor

from pdl_kernels.options import LossInputs


def as_operand(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """What an operator takes for a number, so that another number needs no compilation; fake where `like` is."""
    if value is None:
        return None
    return moved(value, like.device) if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float64)


def on_device(value: Any, device: torch.device) -> Any:
    """A number, or a 0-d tensor on `device`; nobody waits for a GPU unless `device` is the CPU."""
    if value is None or type(value) is float:
        return value
    if not isinstance(value, Tensor) or (value.device.type == "cpu" and device.type != "cpu"):
        return float(value)
    return moved(value, device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Detached and on `device`, which is not touched if the value is there: that of a fake tensor need not exist."""
    value = value.detach()
    return value if value.device == device else value.to(device)


def inputs_as_rows(inputs: LossInputs) -> LossInputs:
    """The same numbers as backends take them: logits (rows_outer, rows_inner, V), targets and token_weights (N,)."""
    weights, token_weights = inputs.weights, inputs.token_weights
    return inputs._replace(
        logits=as_rows(inputs.logits.detach()),
        targets=_flat(inputs.targets),
        weights=None if weights is None else weights.contiguous(),
        token_weights=None if token_weights is None else _flat(token_weights),
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.reshape(-1).contiguous()


def as_rows(logits: Tensor) -> Tensor:
    """(..., V) as (rows_outer, rows_inner, V), a view unless the leading dimensions cannot be merged into two."""
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    *leading, V = logits.shape
    if not leading:
        return logits.view(1, 1, V)
    if logits.numel() == 0:
        return logits.reshape(1, math.prod(leading), V)
    # Merge neighbouring dimensions where one stride steps through both.
    shape: list[int] = []
    strides: list[int] = []
    for size, stride in zip(leading, logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if shape and strides[-1] == size * stride:
            shape[-1] *= size
            strides[-1] = stride
        else:
            shape.append(size)
            strides.append(stride)
    if len(shape) > 2:
        return logits.reshape(1, math.prod(leading), V)
    while len(shape) < 2:
        shape.insert(0, 1)
        strides.insert(0, 0)
    return logits.as_strided((*shape, V), (*strides, logits.stride(-1)))


def empty_gradient(rows: Tensor, *, contiguous: bool = False) -> Tensor:
    """Uninitialised memory for the gradient of (rows_outer, rows_inner, V) logits.

    Laid out as the logits are, so that their rows have the same alignment, unless that would leave large gaps or make
    elements share memory; contiguous then.
    """
    if rows.is_contiguous():
        return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    steps = sorted((stride, size) for stride, size in zip(rows.stride(), rows.shape, strict=True) if size > 1)
    span = 1  # elements from the first to the last
    apart = True
    for stride, size in steps:
        apart = apart and stride >= span
        span += (size - 1) * stride
    if not contiguous and rows.stride(-1) == 1 and apart and span <= 1.25 * rows.numel():
        return torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype, device=rows.device)
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


def same_rows(rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (rows_outer, rows_inner, V) of one shape; a view of the gradient, whose rows were once the logits'."""
    try:
        return rows, gradient.view(rows.shape)
    except RuntimeError:  # a hook on saved tensors returned the logits with other strides
        row_gradient = as_rows(gradient)
        return rows.reshape(row_gradient.shape), row_gradient
