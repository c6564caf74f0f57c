"""Turns tensors, arrays and nested lists of labels into flat int64 blocks of about a million ids."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Integers = npt.NDArray[np.int64]

# Ids converted and counted at a time: 8 MiB, whatever the size of the input.
BLOCK_IDS = 2**20
ACCEPTED = (
    "integer ids in a torch tensor, a numpy array or a (nested, ragged) list, the last dimension running over time"
)


class Block(NamedTuple):
    """Targets of some sequences, or of a part of one."""

    ids: Integers  # (n,) what remains after the shift, ignored positions included
    lengths: Integers  # (sequences,) ids of each sequence in here; their sum is n
    locate: Callable[[int], str]  # where in the input ids[i] came from, such as "labels[3, 17]"


def check_label_settings(shift: object, ignore_index: object) -> None:
    if not isinstance(shift, bool):
        raise TypeError(f"shift is {shift!r}; accepted are True (causal labels) and False (labels that are targets)")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is a {type(ignore_index).__name__}; accepted is an integer")


def describe_label_settings(shift: bool, ignore_index: int | None) -> str:
    ignored = "" if ignore_index is None else f", ignore_index {ignore_index}"
    return f"{'shifted' if shift else 'not shifted'}{ignored}"


def label_blocks(labels: Any, shift: bool, name: object = "labels", *, whole: bool = True) -> Iterator[Block]:
    """The ids in `labels` (..., L), as blocks; with `shift`, position 0 of each sequence is left out.

    With `whole` no sequence is cut: how many sequences hold a token needs each in one block. Otherwise a long sequence
    comes in several blocks, of which the first one counts it.
    """
    if isinstance(labels, Tensor):
        if labels.is_nested:
            yield from label_blocks(list(labels.unbind()), shift, name, whole=whole)
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
            yield from label_blocks(entry, shift, f"{name}[{position}]", whole=whole)
        return
    array = np.asarray(labels)
    if array.dtype == object and array.size > 0 and all(_is_sequence(entry) for entry in array.flat):
        yield from label_blocks(list(array.flat), shift, name, whole=whole)
    elif array.ndim > 0 and array.size == 0:
        yield Block(np.empty(0, np.int64), np.zeros(int(np.prod(array.shape[:-1])), np.int64), str)
    else:
        yield from _array_blocks(array, shift, name, whole)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def id_array(ids: Any) -> npt.NDArray[Any]:
    """(n,) what a tokenizer gave for one text."""
    array = np.asarray(ids)
    return array if array.size else array.astype(np.int64)


def check_fits(ids: npt.NDArray[Any], name: object) -> None:
    """Refuse ids that int64 cannot hold, which only uint64 has."""
    if ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max:
        raise IndexError(f"{name} holds {ids.max()}, which is no id of any vocabulary")


def _array_blocks(array: npt.NDArray[Any], shift: bool, name: object, whole: bool) -> Iterator[Block]:
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} holds {array.dtype}; accepted are {ACCEPTED}")
    if array.ndim == 0:
        raise ValueError(f"{name} is a single number; accepted is (..., L), sequences of ids")
    check_fits(array, name)
    rows = array.reshape(-1, array.shape[-1])  # (sequences, L)
    length = rows.shape[1]
    row_step = max(1, BLOCK_IDS // length)
    column_step = length if whole else BLOCK_IDS
    first = int(shift)
    for row in range(0, len(rows), row_step):
        for column in range(first, max(length, first + 1), column_step):
            part = rows[row : row + row_step, column : column + column_step]
            width = part.shape[1]

            def locate(index: int, row: int = row, column: int = column, width: int = width) -> str:
                below, beside = divmod(index, max(width, 1))
                position = [*np.unravel_index(row + below, array.shape[:-1]), column + beside]
                return f"{name}[{', '.join(map(str, position))}]"

            lengths = np.full(len(part) if column == first else 0, width)
            yield Block(part.astype(np.int64).ravel(), lengths, locate)


def join_blocks(blocks: Sequence[Block]) -> Block:
    """One block of many short ones."""
    if len(blocks) == 1:
        return blocks[0]
    ends = np.cumsum([0, *(len(block.ids) for block in blocks)])

    def locate(index: int) -> str:
        which = int(np.searchsorted(ends, index, side="right")) - 1
        return blocks[which].locate(index - int(ends[which]))

    ids = np.concatenate([block.ids for block in blocks])
    return Block(ids, np.concatenate([block.lengths for block in blocks]), locate)


def gather_blocks(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same ids in blocks of about BLOCK_IDS: counting a block costs a pass over the vocabulary, however short."""
    waiting: list[Block] = []
    size = 0
    for block in blocks:
        waiting.append(block)
        size += len(block.ids) + 1  # a sequence without ids takes memory too
        if size >= BLOCK_IDS:
            yield join_blocks(waiting)
            waiting, size = [], 0
    if waiting:
        yield join_blocks(waiting)


def count_ids(block: Block, kept: npt.NDArray[np.bool_], vocab_size: int) -> Integers:
    """(V,) how often each token is in the `kept` (n,) positions of the block. IndexError: an id outside [0, V)."""
    ids = block.ids if kept.all() else block.ids[kept]  # a copy takes as long as counting: only where it is needed
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        outside = kept & ((block.ids < 0) | (block.ids >= vocab_size))
        index = int(outside.argmax())
        raise IndexError(
            f"{block.locate(index)} is {block.ids[index]}; accepted are ids from 0 to {vocab_size - 1} "
            f"(vocab_size {vocab_size}) and the ignore_index"
        )
    return np.bincount(ids, minlength=vocab_size)


def count_documents(block: Block, kept: npt.NDArray[np.bool_], vocab_size: int) -> Integers:
    """(V,) how many sequences of the block hold each token in one of the `kept` (n,) positions."""
    sequence = np.repeat(np.arange(len(block.lengths)), block.lengths)
    pairs = sequence[kept] * vocab_size + block.ids[kept]  # one number per (sequence, token)
    pairs.sort()
    first = np.ones(len(pairs), dtype=bool)
    first[1:] = pairs[1:] != pairs[:-1]
    return np.bincount(pairs[first] % vocab_size, minlength=vocab_size)
