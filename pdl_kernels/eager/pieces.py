"""Pieces of the logits whose softmax fits in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pdl_kernels.eager.row_math import Tokens, is_untransformed, transformed
from pdl_kernels.options import LossInputs, LossOptions

# One piece's softmax. On CPU a few megabytes beat both single rows and whole tensors; elsewhere it only bounds memory.
CPU_PIECE_BYTES = 1 << 21
DEVICE_PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class Piece:
    """Some rows of the logits; `index` selects them from tensors of N rows."""

    index: slice | Tensor
    logits: Tensor  # (R, V)


class Buffers:
    """One piece's logits and softmax, allocated once: fresh pages for every piece cost as much as the arithmetic."""

    def __init__(self, inputs: LossInputs, options: LossOptions, dtype: torch.dtype) -> None:
        shape = min(piece_rows(inputs.logits), len(inputs.targets)), inputs.logits.shape[-1]
        self.options = options
        self.p = torch.empty(shape, dtype=dtype, device=inputs.logits.device)
        converts = is_untransformed(options) and inputs.logits.dtype != dtype
        self.z = torch.empty_like(self.p) if converts else None

    def fill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z, the (R, V) logits that the loss sees, and their softmax."""
        z = self._transformed(x)
        return z, torch.softmax(z, dim=-1, out=self.p[: len(x)])

    def fill_relative(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """z as above, and exp(z - reference) for (R,) references."""
        z = self._transformed(x)
        return z, torch.sub(z, reference[:, None], out=self.p[: len(x)]).exp_()

    def _transformed(self, x: Tensor) -> Tensor:
        return transformed(x, self.options, self.p.dtype) if self.z is None else self.z[: len(x)].copy_(x)


def piece_rows(logits: Tensor) -> int:
    piece_bytes = CPU_PIECE_BYTES if logits.device.type == "cpu" else DEVICE_PIECE_BYTES
    return max(1, piece_bytes // (4 * max(logits.shape[-1], 1)))


def pieces_of(inputs: LossInputs, read: Tensor) -> Iterator[Piece]:
    logits = inputs.logits
    size = piece_rows(logits)
    if logits.device.type != "cpu":
        for start in range(0, len(inputs.targets), size):
            index = slice(start, min(start + size, len(inputs.targets)))
            piece_logits = take_rows(logits, index)
            yield Piece(index, torch.where(read[index, None], piece_logits, 0))
        return
    rows = None if bool(read.all()) else read.nonzero()[:, 0]
    for start in range(0, len(inputs.targets) if rows is None else rows.numel(), size):
        if rows is None:
            index = slice(start, min(start + size, len(inputs.targets)))
            yield Piece(index, take_rows(logits, index))
            continue
        chosen = rows[start : start + size]
        first, last = int(chosen[0]), int(chosen[-1])
        if last - first + 1 == chosen.numel():
            yield Piece(slice(first, last + 1), take_rows(logits, slice(first, last + 1)))
        else:
            yield Piece(chosen, take_rows(logits, chosen))


def target_logits(inputs: LossInputs, tokens: Tokens) -> Tensor:
    """(N,) x[i, y_i]."""
    logits = inputs.logits
    return logits.gather(2, tokens.targets.view(*logits.shape[:2], 1)).flatten()


def take_rows(tensor: Tensor, index: slice | Tensor) -> Tensor:
    """(R, V) rows of a (rows_outer, rows_inner, V) tensor: a view where the rows allow one."""
    rows_outer, rows_inner, _ = tensor.shape
    if rows_outer == 1:
        return tensor[0, index]
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=tensor.device)
    return tensor[index // rows_inner, index % rows_inner]


def put_rows(gradient: Tensor, index: slice | Tensor, values: Tensor) -> None:
    rows_outer, rows_inner, _ = gradient.shape
    if rows_outer == 1 and isinstance(index, slice):
        gradient[0, index] = values
        return
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=gradient.device)
    gradient[index // rows_inner, index % rows_inner] = values.to(gradient.dtype)


def zero_rows(gradient: Tensor, written: Tensor) -> None:
    """Rows that no piece writes have a gradient of exactly 0."""
    if gradient.device.type != "cpu" or bool(written.all()):
        return
    rows = (~written).nonzero()[:, 0]
    rows_inner = gradient.shape[1]
    gradient[rows // rows_inner, rows % rows_inner] = 0
