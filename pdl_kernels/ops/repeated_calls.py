"""The Triton backend in eager mode: what a call needs is worked out once and kept for calls that are alike.

Two calls are alike if everything is the same that decides which kernels run, in which shape, and how Triton compiles
them: shapes, strides, dtypes, the device, which tensors are given and at which offset from 16 bytes they start, and the
options. Only then does the second use what the first has left: a Call, which holds no tensor.
"""

from typing import Any

import torch
from torch import Tensor

from pdl_kernels.kernels import launch
from pdl_kernels.ops.rows import as_rows, empty_gradient, same_rows, share_storage
from pdl_kernels.options import LossInputs, LossOptions, LossOutputs

MAX_CALLS = 512  # kept; one takes a few kilobytes


class Call:
    """What forward worked out, and backward for each alignment of its own tensors."""

    __slots__ = ("backward", "gradient_strides", "logits_strides", "loss")

    def __init__(
        self, loss: launch.LossCall, logits_strides: tuple[int, ...], gradient_strides: tuple[int, ...]
    ) -> None:
        self.loss = loss
        self.logits_strides = logits_strides
        self.gradient_strides = gradient_strides  # of a gradient of the shape of the logits
        self.backward: dict[tuple[Any, ...], launch.RowCall] = {}


_calls: dict[tuple[Any, ...], Call] = {}


def forget() -> None:
    """Work everything out again, for instance after a change of `triton.knobs` or PDL_KERNELS_FORCE_KERNEL."""
    _calls.clear()


def plain(logits: Tensor, targets: Tensor, weights: Tensor | None, token_weights: Tensor | None) -> launch.RowTensors:
    """The same numbers as kernels take them: a copy of whatever they cannot step through."""
    if logits.dim() > 2 and not logits.is_contiguous():
        rows = as_rows(logits)
        logits = logits if share_storage(rows, logits) else rows
    return (
        logits,
        targets.contiguous(),
        None if weights is None else weights.contiguous(),
        None if token_weights is None else token_weights.contiguous(),
    )


def _described(tensor: Tensor | float | None) -> Any:
    """What matters of a tensor whose shape and strides are known, or of a number in its place."""
    if tensor is None or isinstance(tensor, float):
        return type(tensor)
    return tensor.dtype, tensor.data_ptr() % launch.VECTOR_BYTES


def forward(
    tensors: launch.RowTensors,  # (..., V), (...), (V,) and (...), as `plain` returns them
    normalizer: Tensor | float | None,  # ()
    options: LossOptions,
    gradient: bool,
    inplace: bool,
) -> tuple[LossOutputs, Tensor | None, Call]:
    """The loss, and if asked its gradient, of the shape of the logits.

    In place for an upstream gradient of 1, else for the last one on this device.
    """
    logits, targets, weights, token_weights = tensors
    strides = logits.stride()
    key = (
        logits.shape, strides, logits.dtype, logits.device, logits.data_ptr() % launch.VECTOR_BYTES,
        _described(targets), _described(weights), _described(token_weights), _described(normalizer),
        options, gradient, inplace,
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        call = _work_out(tensors, normalizer, options, gradient=gradient, inplace=inplace)
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    if not gradient:
        return call.loss(tensors, normalizer, None), None, call
    if inplace:
        return call.loss(tensors, normalizer, logits), logits, call
    made = logits.new_empty_strided(logits.shape, call.gradient_strides)
    return call.loss(tensors, normalizer, made, remembered_upstream(logits.device)), made, call


_remembered: dict[torch.device, Tensor] = {}


def remembered_upstream(device: torch.device) -> Tensor | None:
    """The last upstream gradient that a backward met on this device, () float32; None while there is no place for it.

    Kernels read and write it, also those of captured graphs. Whatever it holds, results are right: forward works with
    its own copy, and backward with that.
    """
    found = _remembered.get(device)
    if found is None and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        found = _remembered[device] = torch.ones((), dtype=torch.float32, device=device)
    return found


def _work_out(
    tensors: launch.RowTensors,
    normalizer: Tensor | float | None,
    options: LossOptions,
    *,
    gradient: bool,
    inplace: bool,
) -> Call:
    logits, targets, weights, token_weights = tensors
    rows = as_rows(logits)
    row_gradient = None if not gradient else rows if inplace else empty_gradient(rows)
    inputs = LossInputs(rows, targets.view(-1), weights, token_weights, normalizer)
    strides = () if row_gradient is None else row_gradient.reshape(logits.shape).stride()
    return Call(launch.LossCall(inputs, options, row_gradient), logits.stride(), strides)


def adjust(
    call: Call,  # of the forward with these tensors, unless hooks on saved tensors returned others
    tensors: launch.RowTensors,  # as `plain` returns them
    row_state: Tensor,  # (2, N)
    scalars: Tensor,  # (7,)
    upstream: Tensor,  # ()
    gradient: Tensor,  # (..., V)
    options: LossOptions,
) -> None:
    """Make `gradient`, formed for an expected upstream gradient, right for `upstream`, without reading it here."""
    logits, targets, weights, token_weights = tensors
    if targets.numel() == 0:
        return
    if logits.stride() != call.logits_strides or (logits.dim() > 2 and gradient.stride() != call.logits_strides):
        rows, row_gradient = same_rows(logits, gradient)  # they may split into rows differently
        inputs = LossInputs(rows, targets.view(-1), weights, token_weights, None)
        launch.adjust(inputs, options, row_state, scalars, upstream, row_gradient, remembered_upstream(logits.device))
        return
    # Of what forward made, the alignment is that of fresh memory every time.
    key = (
        logits.data_ptr() % launch.VECTOR_BYTES,
        _described(targets), _described(weights), _described(token_weights), _described(upstream),
    )  # fmt: skip
    row_call = call.backward.get(key)
    if row_call is None:
        inputs = LossInputs(as_rows(logits), targets.view(-1), weights, token_weights, None)
        row_call = call.backward[key] = launch.gradient_call(inputs, options, as_rows(gradient))
    remembered = remembered_upstream(logits.device)
    with launch.on_device(logits):
        stream = launch.direct_stream()
        row_call.gradient_rows(
            tensors, gradient, scalars, row_state, upstream, remembered, stream, unless_expected=True
        )
