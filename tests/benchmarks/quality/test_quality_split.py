"""How the quality benchmark's pairs are split: nothing that is held out, and nothing like it, is trained on."""

import random

import pytest

from benchmarks.quality.errors import UserError
from benchmarks.quality.tasks.pairs import Pair
from benchmarks.quality.tasks.split import normalised, split


def many_pairs(groups=40, size=5):
    return [Pair((f"prompt {g} {n}",), f"answer {g} {n}", f"group {g}") for g in range(groups) for n in range(size)]


def groups_of(pairs):
    return {pair.group for pair in pairs}


def test_texts_are_compared_by_their_words():
    assert normalised("  Yes, I DON'T -- know!") == normalised("yes i don't know") == "yes i don't know"


def test_parts_have_the_sizes_asked_for_and_share_no_group():
    parts = split(many_pairs(), training=100, validation=13, held_out=22, seed=3)
    assert [len(part) for part in (parts.training, parts.validation, parts.held_out)] == [100, 13, 22]
    assert not groups_of(parts.training) & groups_of(parts.validation)
    assert not groups_of(parts.held_out) & groups_of(parts.training + parts.validation)
    assert len(groups_of(parts.held_out)) <= 5
    assert len(groups_of(parts.training)) > 100 / 5  # pairs are shuffled before the training part is cut
    assert len(set(parts.training + parts.validation + parts.held_out)) == 135


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    pairs = many_pairs()
    first, again, other = (split(pairs, training=50, validation=10, held_out=10, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.held_out != other.held_out
    assert groups_of(first.held_out) != groups_of(other.held_out)
    random.Random(0).shuffle(pairs)
    shuffled = split(pairs, training=50, validation=10, held_out=10, seed=1)
    assert groups_of(shuffled.held_out) == groups_of(first.held_out)


def test_what_is_held_out_does_not_depend_on_how_much_is_trained_on():
    pairs = [*many_pairs(), *(Pair((f"twice {n % 20}",), f"reply {n}", f"group {n}") for n in range(40))]
    few, more = (split(pairs, training=training, validation=10, held_out=10, seed=1) for training in (10, 100))
    assert (few.held_out, few.validation) == (more.held_out, more.validation)


@pytest.mark.parametrize("part", ["validation", "held_out"])
@pytest.mark.parametrize(
    ("repeated", "dropped"),
    [
        (lambda n: Pair(("Same prompt!" if n % 2 else "SAME, prompt",), f"answer number {n}", f"group {n}"), True),
        (lambda n: Pair((f"prompt {n}",), "Yes I do like it much" + "." * (n % 2), f"group {n}"), True),
        (lambda n: Pair((f"prompt {n}",), "Yes I do like it", f"group {n}"), False),
    ],
)  # fmt: skip
def test_texts_that_training_holds_too_are_dropped(part, repeated, dropped):
    repeats = [repeated(number) for number in range(40)]
    sizes = {"training": 60, "validation": 0, "held_out": 0} | {part: 15}
    parts = split([*many_pairs(), *repeats], **sizes, seed=0)
    kept = getattr(parts, part)
    assert len(kept) == 15  # further groups make up for what is dropped
    assert bool(set(kept) & set(repeats)) is not dropped
    rest = {normalised(pair.source) for pair in parts.training}
    assert not rest & {normalised(pair.source) for pair in kept}


def test_too_few_pairs_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"^200 pairs in 40 groups are too few for 180 training, 10 validation and 11 "):
        split(many_pairs(), training=180, validation=10, held_out=11, seed=0)
    assert len(split(many_pairs(), training=180, validation=10, held_out=10, seed=0).training) == 180
    twins = [Pair(("same",), "reply", f"group {number}") for number in range(9)]
    for training in (0, 3):
        with pytest.raises(UserError, match=r"9 pairs in 9 groups are too few .* which left \d+ for training"):
            split(twins, training=training, validation=0, held_out=10 if training == 0 else 2, seed=0)
