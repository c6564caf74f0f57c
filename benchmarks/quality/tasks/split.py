"""Training, validation and held-out pairs that share no group, and no text that would give an answer away."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality.errors import UserError
from benchmarks.quality.tasks.pairs import Pair

TENTHS = 10  # a tenth is set aside for each part that is drawn from, if there is enough: more groups than needed
MINIMUM_REPEATED_WORDS = 6  # a shorter reference, "yes I do" say, may recur without giving anything away


@dataclass(frozen=True)
class Split:
    """Three lists without a common group."""

    training: list[Pair]
    validation: list[Pair]
    held_out: list[Pair]


def split(pairs: Sequence[Pair], *, training: int, validation: int, held_out: int, seed: int) -> Split:
    """Shuffle the groups, then give whole groups to the held-out part, to validation and, the rest, to training.

    A validation or held-out pair is dropped when its prompt, or its reference of six words or more, also occurs
    anywhere in the rest. So what is held out does not depend on how many training pairs are asked for. The same
    arguments give the same split. UserError when there are too few pairs.
    """
    groups = _grouped(pairs)
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    least = min(len(pairs) // TENTHS, (len(pairs) - training) // 3)
    held_out_wanted, validation_wanted = max(held_out, least), max(validation, least)
    while True:
        remaining = iter(names)
        held_out_part = _take(remaining, groups, held_out_wanted)
        validation_part = _take(remaining, groups, validation_wanted)
        rest = [pair for name in remaining for pair in groups[name]]
        held_out_clean, validation_clean = _without_repeats(rest, held_out_part, validation_part)
        enough = len(held_out_clean) >= held_out and len(validation_clean) >= validation
        if len(rest) < training or not (enough or rest):
            raise UserError(
                f"{len(pairs)} pairs in {len(groups)} groups are too few for {training} training, {validation} "
                f"validation and {held_out} held-out pairs: the parts share no group, and of the two last those pairs "
                f"are dropped that repeat a training text, which left {len(rest)} for training. Ask for fewer."
            )
        if enough:
            break
        # More groups make up for the pairs that were dropped.
        held_out_wanted += max(0, held_out - len(held_out_clean))
        validation_wanted += max(0, validation - len(validation_clean))
    return Split(
        training=_shuffled(rest, seed)[:training],
        validation=_shuffled(validation_clean, seed)[:validation],
        held_out=_shuffled(held_out_clean, seed)[:held_out],
    )


def normalised(text: str) -> str:
    """Lower case, words only."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


def _grouped(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.group].append(pair)
    return groups


def _take(names: Iterator[str], groups: dict[str, list[Pair]], count: int) -> list[Pair]:
    """The pairs of whole groups until there are enough; what the last group has too much is cut later."""
    taken: list[Pair] = []
    while len(taken) < count and (name := next(names, None)) is not None:
        taken += groups[name]
    return taken


def _without_repeats(training: list[Pair], *parts: list[Pair]) -> list[list[Pair]]:
    """The parts without those pairs whose prompt or longer reference stands in the training part too."""
    prompts = {normalised(pair.source) for pair in training}
    references = {normalised(pair.reference) for pair in training}

    def repeats(pair: Pair) -> bool:
        reference = normalised(pair.reference)
        long_enough = len(reference.split()) >= MINIMUM_REPEATED_WORDS
        return normalised(pair.source) in prompts or (long_enough and reference in references)

    return [[pair for pair in part if not repeats(pair)] for part in parts]


def _shuffled(pairs: list[Pair], seed: int) -> list[Pair]:
    return random.Random(seed).sample(pairs, len(pairs))
