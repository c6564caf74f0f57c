"""Whatever a user calls labels, as a stream of flat int64 pieces of bounded size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Integers = npt.NDArray[np.int64]

# Ids converted and counted at a time: 8 MiB, whatever the size of the input.
PIECE_IDS = 2**20
ACCEPTED = (
    "integer ids in a torch tensor, a numpy array or a (nested, ragged) list, the last dimension running over time"
)


class Piece(NamedTuple):
    """Targets of some sequences, or of a part of one."""

    ids: Integers  # (n,) what remains after the shift, ignored positions included
    lengths: Integers  # (sequences,) ids of each sequence in here; their sum is n
    locate: Callable[[int], str]  # where in the input ids[i] came from, such as "labels[3, 17]"


def split_labels(labels: Any, shift: bool, name: str = "labels", *, whole: bool = True) -> Iterator[Piece]:
    """The pieces of `labels` (..., L); with `shift`, position 0 of each sequence is left out.

    With `whole` no sequence is cut: how many sequences hold a token needs each in one piece. Otherwise a long sequence
    comes in several pieces, of which the first one counts it.
    """
    if isinstance(labels, Tensor):
        if labels.is_nested:
            yield from split_labels(list(labels.unbind()), shift, name, whole=whole)
            return
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name} is a {labels.dtype} tensor; accepted are {ACCEPTED}")
        labels = labels.detach().cpu().numpy()
    if isinstance(labels, dict) or hasattr(labels, "keys"):
        raise TypeError(f"{name} is a {type(labels).__name__}; pass one of its entries, such as batch['labels']")
    if isinstance(labels, (str, bytes)) or not (hasattr(labels, "__array__") or isinstance(labels, Sequence)):
        raise TypeError(f"{name} is a {type(labels).__name__}; accepted are {ACCEPTED}")
    if isinstance(labels, Sequence) and any(_is_sequence(entry) for entry in labels):
        for position, entry in enumerate(labels):
            yield from split_labels(entry, shift, f"{name}[{position}]", whole=whole)
        return
    array = np.asarray(labels)
    if array.dtype == object and array.size > 0 and all(_is_sequence(entry) for entry in array.flat):
        yield from split_labels(list(array.flat), shift, name, whole=whole)
    elif array.ndim > 0 and array.size == 0:
        yield Piece(np.empty(0, np.int64), np.zeros(int(np.prod(array.shape[:-1])), np.int64), str)
    else:
        yield from _split_array(array, shift, name, whole)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_fits(ids: npt.NDArray[Any], name: str) -> None:
    if ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max:
        raise IndexError(f"{name} holds {ids.max()}, which is no id of any vocabulary")


def _split_array(array: npt.NDArray[Any], shift: bool, name: str, whole: bool) -> Iterator[Piece]:
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} holds {array.dtype}; accepted are {ACCEPTED}")
    if array.ndim == 0:
        raise ValueError(f"{name} is a single number; accepted is (..., L), sequences of ids")
    check_fits(array, name)
    rows = array.reshape(-1, array.shape[-1])  # (sequences, L)
    length = rows.shape[1]
    row_step = max(1, PIECE_IDS // length)
    column_step = length if whole else PIECE_IDS
    first = int(shift)
    for row in range(0, len(rows), row_step):
        for column in range(first, max(length, first + 1), column_step):
            block = rows[row : row + row_step, column : column + column_step]
            width = block.shape[1]

            def locate(index: int, row: int = row, column: int = column, width: int = width) -> str:
                below, beside = divmod(index, max(width, 1))
                position = [*np.unravel_index(row + below, array.shape[:-1]), column + beside]
                return f"{name}[{', '.join(map(str, position))}]"

            lengths = np.full(len(block) if column == first else 0, width)
            yield Piece(block.astype(np.int64).ravel(), lengths, locate)


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """One piece of many short ones: counting costs a pass over the vocabulary each time."""
    if len(pieces) == 1:
        return pieces[0]
    ends = np.cumsum([0, *(len(piece.ids) for piece in pieces)])

    def locate(index: int) -> str:
        which = int(np.searchsorted(ends, index, side="right")) - 1
        return pieces[which].locate(index - int(ends[which]))

    ids = np.concatenate([piece.ids for piece in pieces])
    return Piece(ids, np.concatenate([piece.lengths for piece in pieces]), locate)


def gather_pieces(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same ids in pieces of about PIECE_IDS."""
    waiting: list[Piece] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece.ids) + 1  # a sequence without ids takes memory too
        if size >= PIECE_IDS:
            yield join_pieces(waiting)
            waiting, size = [], 0
    if waiting:
        yield join_pieces(waiting)
