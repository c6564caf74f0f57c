"""Weights of single tokens on their way through a trainer's data pipeline: in the upper half of their labels.

Whatever shifts, truncates, masks, packs, pads and shuffles labels does the same to the weights, because it does not
know that they are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdl_kernels.data.batches import RowName
from pdl_kernels.data.chats import ChatTemplate
from pdl_kernels.data.labels import Integers

IGNORED = -100
LABEL_BITS = 32
LABEL_MASK = (1 << LABEL_BITS) - 1
MESSAGE_WEIGHT = "weight"  # the key of a message


def join(labels: Any, factors: Any, where: str) -> Integers:
    """(n,) labels and (n,) factors, or one for all, as (n,) int64: a float32 in the upper half, the label in the lower.

    Ignored labels stay -100, which no label with a factor can be. ValueError, with `where`: another number of factors;
    one that is not finite.
    """
    ids = np.asarray(labels, np.int64)
    misfit = ids[(ids != IGNORED) & ((ids < 0) | (ids > LABEL_MASK))]
    if len(misfit):
        inside = " (token weights are inside already)" if holds_factors(misfit.tolist()) else ""
        raise ValueError(f"{where}: a label is {misfit[0]}{inside}; accepted are class indices and {IGNORED}")
    try:
        given = np.asarray(factors)
        if given.dtype.kind in "US":
            raise ValueError
        given = given.astype(np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{where} are {factors!r}; accepted are numbers") from None
    if given.shape not in ((), ids.shape):
        raise ValueError(
            f"{where} are {len(given)} values; accepted are a number, or {len(ids)} numbers, one for each label"
        )
    if not np.isfinite(given).all():
        raise ValueError(f"{where} hold {given[~np.isfinite(given)].flat[0]}; accepted are finite numbers")
    upper = np.broadcast_to(given, ids.shape).copy().view(np.int32).astype(np.int64) << LABEL_BITS
    return np.where(ids == IGNORED, IGNORED, upper | ids)


def split(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(...) int64 of `join` -> (...) labels and (...) float32 factors, 0 where the label is ignored."""
    ignored = codes == IGNORED
    labels = torch.where(ignored, IGNORED, codes & LABEL_MASK)
    factors = (codes >> LABEL_BITS).to(torch.int32).view(torch.float32)
    return labels, torch.where(ignored, 0.0, factors)


def holds_factors(labels: Iterable[int]) -> bool:
    """Whether `join` made these: a factor other than 0 is in the upper half of one of them."""
    return any(label < IGNORED or label > LABEL_MASK for label in labels)


def message_factors(
    row: Any, messages: Any, template: ChatTemplate, where: RowName
) -> tuple[Sequence[int], list[float]]:
    """The ids of a chat and the factor of each: the `weight` of the assistant's message that it belongs to, or else 1.

    ValueError: a weight on what is not the assistant's; messages that the template does not show one by one.
    """
    read, options = template.read(row, messages, "messages", where)
    assistants = []
    for message in read:
        weight = message.get(MESSAGE_WEIGHT)
        if message["role"] == "assistant":
            assistants.append(1.0 if weight is None else weight)
        elif weight not in (None, 1):
            raise ValueError(
                f"{where}: a message of {message['role']!r} has the weight {weight!r}; accepted are weights on the "
                "assistant's messages"
            )
    if any(before["role"] == after["role"] == "assistant" for before, after in pairwise(read)):
        raise ValueError(
            f"{where}: the assistant has two messages in a row, which templates show as one turn or as two; accepted "
            "are chats in which another role speaks between them"
        )
    ((ids, mask),) = template.encode([(0, (read, options))], lambda _: str(where), mask=True)
    factors = [1.0] * len(ids)
    turns = [[position for position, _ in run] for said, run in groupby(enumerate(mask), lambda at: at[1]) if said]
    if len(turns) != len(assistants):
        raise ValueError(
            f"{where}: the chat template shows {len(turns)} turns of the assistant, and there are {len(assistants)} "
            "messages of it; accepted are chats in which another role speaks between them"
        )
    for weight, positions in zip(assistants, turns, strict=True):
        for position in positions:
            factors[position] = weight
    return ids, factors


def has_message_weights(row: Mapping[str, Any]) -> bool:
    """Whether a message of this row has a weight."""
    chats = [row.get(name) for name in ("messages", "prompt", "completion")]
    return any(
        isinstance(message, Mapping) and message.get(MESSAGE_WEIGHT) is not None
        for chat in chats
        if isinstance(chat, Sequence) and not isinstance(chat, str)
        for message in chat
    )
