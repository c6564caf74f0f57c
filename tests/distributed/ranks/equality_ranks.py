"""One of several processes that save and load together: what each case returns or raises goes to a file."""

import contextlib
import errno
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.ranks import leave

from pdl_kernels import PowerLawWeighting, TokenCounts, load_weights, save_weights
from pdl_kernels.distributed.equality import check_equal, together
from pdl_kernels.weights import files

V = 6
CASES = {}  # by name; for the arguments see `run`


def case(function):
    CASES[function.__name__] = function
    return function


def make_counts(last_row=(3, 2)):
    return TokenCounts(V, documents=True, tokenizer="animals").update([[0, 1, 2, 2], list(last_row)], shift=False)


def make_table(**changed):
    """Weights from 0.5 to 2; `at_3` is another value for one of them."""
    table = torch.linspace(0.5, 2, V)
    table[3] = changed.get("at_3", table[3])
    return table


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def of_rank(folder):
    """A folder that only this rank looks into."""
    mine = folder / f"rank {dist.get_rank()}"
    mine.mkdir()
    return mine / "file"


# ---------------------------------------------------------------------------------------------------------------------
# check_equal and together


@case
def the_same(group, first, odd, folder):
    wide = torch.arange(12.0).reshape(6, 2)
    numbers = torch.tensor([float("nan"), -0.0, 1.0])
    values = {
        "strides": wide[:, 0].contiguous() if odd else wide[:, 0],
        "nan": numbers,
        "no dimension": torch.tensor(3),
        "no element": torch.ones(0, 2),
        "booleans": torch.tensor([True, False]),
        "gradient": torch.ones(2, requires_grad=odd),
        "words": "some words",
        "nothing": None,
    }
    if odd:
        values.pop("nothing")
    check_equal("a check", values, group)


@case
def another_value(group, first, odd, folder):
    check_equal("a check", {"same": torch.ones(2), "table": make_table(at_3=1.75 if odd else 1.5)}, group)


@case
def another_value_on_the_first(group, first, odd, folder):
    check_equal("a check", {"table": make_table(at_3=1.75 if first else 1.5)}, group)


@case
def another_sign_of_zero(group, first, odd, folder):
    check_equal("a check", {"table": torch.tensor([-0.0 if odd else 0.0])}, group)


@case
def another_length(group, first, odd, folder):
    check_equal("a check", {"table": torch.ones(V + 100_000 * odd)}, group)


@case
def another_shape(group, first, odd, folder):
    check_equal("a check", {"table": torch.ones((2, 3) if odd else (3, 2))}, group)


@case
def another_dtype(group, first, odd, folder):
    check_equal("a check", {"table": torch.zeros(V, dtype=torch.int32 if odd else torch.float32)}, group)


@case
def all_different(group, first, odd, folder):
    check_equal("a check", {"table": torch.full((2,), float(dist.get_rank()))}, group)


@case
def a_value_that_is_missing(group, first, odd, folder):
    check_equal("a check", {} if odd else {"table": torch.ones(2)}, group)


@case
def other_words(group, first, odd, folder):
    check_equal("a check", {"words": "b" if odd else "a", "table": make_table(at_3=2.0 if odd else 1.0)}, group)


@case
def other_words_at_the_end(group, first, odd, folder):
    check_equal("a check", {"words": "a" * 1000 + "b" * odd}, group)


class Wordless:
    def __repr__(self):
        raise ValueError("no words for it")


@case
def a_value_that_cannot_be_compared(group, first, odd, folder):
    check_equal("a check", {"words": Wordless() if odd else "words"}, group)


@case
def nobody_fails(group, first, odd, folder):
    with together("a block", group):
        pass


@case
def one_fails(group, first, odd, folder):
    with together("a block", group):
        if odd:
            raise KeyError("a reason")


@case
def everybody_fails(group, first, odd, folder):
    with together("a block", group):
        raise KeyError("a reason")


@case
def no_group_at_all(group, first, odd, folder):
    check_equal("a check", {"table": torch.ones(2)}, "world")


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def wrote(path, save):
    """How often this process writes a file while `save` runs, and what is there when it has returned."""
    calls = []

    def slow(*arguments):
        time.sleep(0.3)  # long enough for a rank that does not wait to have looked
        calls.append(arguments)
        write(*arguments)

    with replaced(files, "save", slow) as write:
        save()
    return len(calls), path.exists()


@case
def weights_saved_and_loaded(group, first, odd, folder):
    path, counts, weighting = folder / "weights", make_counts(), PowerLawWeighting(0.7)
    counts.counted = f"what rank {dist.get_rank()} has counted"
    table = weighting.table(counts)
    seen = wrote(path, lambda: save_weights(path, table, weighting, counts, group=group))
    loaded = load_weights(path, group=group)
    assert torch.equal(loaded.table, table)
    assert loaded.weighting == weighting
    return *seen, loaded.facts["counted"], os.listdir(folder)


@case
def without_a_group(group, first, odd, folder):
    """One rank alone: it waits for nobody."""
    if odd:
        path = folder / "weights"
        seen = wrote(path, lambda: save_weights(path, make_table()))
        return *seen, torch.equal(load_weights(path).table, make_table())
    return None


@case
def another_table_to_save(group, first, odd, folder):
    try:
        save_weights(folder / "weights", make_table(at_3=1.75 if odd else 1.5), group=group)
    finally:
        assert not os.listdir(folder)


@case
def another_recipe_to_save(group, first, odd, folder):
    save_weights(folder / "weights", make_table(), PowerLawWeighting(0.7 if odd else 0.4), group=group)


@case
def other_counts_to_save_with_weights(group, first, odd, folder):
    save_weights(folder / "weights", make_table(), None, make_counts([3] if odd else [3, 2]), group=group)


@case
def a_table_that_is_none(group, first, odd, folder):
    save_weights(folder / "weights", make_table(at_3=-1.0 if odd else 1.0), group=group)


@case
def a_full_disk(group, first, odd, folder):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        with replaced(os, "fsync", full):
            save_weights(folder / "weights", make_table(), group=group)
    finally:
        assert not os.listdir(folder)


@case
def no_folder_to_save_to(group, first, odd, folder):
    save_weights(folder / "missing" / "weights", make_table(), group=group)


@case
def no_file_to_load(group, first, odd, folder):
    path = of_rank(folder)
    if not odd:
        save_weights(path, make_table())
    load_weights(path, group=group)


@case
def a_damaged_file_to_load(group, first, odd, folder):
    path = of_rank(folder)
    save_weights(path, make_table())
    if odd:
        path.write_bytes(path.read_bytes()[:-1])
    load_weights(path, group=group)


@case
def another_table_loaded(group, first, odd, folder):
    path = of_rank(folder)
    save_weights(path, torch.ones(V + 1) if odd else make_table())
    load_weights(path, group=group)


@case
def another_recipe_loaded(group, first, odd, folder):
    path = of_rank(folder)
    save_weights(path, make_table(), PowerLawWeighting(0.7 if odd else 0.4))
    load_weights(path, group=group)


@case
def other_facts_loaded(group, first, odd, folder):
    path, counts = of_rank(folder), make_counts()
    counts.tokenizer = "plants" if odd else "animals"
    save_weights(path, make_table(), None, counts)
    load_weights(path, group=group)


# ---------------------------------------------------------------------------------------------------------------------
# Counts


@case
def counts_saved_and_loaded(group, first, odd, folder):
    path = folder / "counts"
    counts = make_counts([3] if odd else [3, 2]).all_reduce(group)
    counts.counted = f"what rank {dist.get_rank()} has counted"
    seen = wrote(path, lambda: counts.save(path, group=group))
    loaded = TokenCounts.load(path, group=group)
    assert loaded == counts
    return *seen, loaded.counted, os.listdir(folder)


@case
def other_counts_to_save(group, first, odd, folder):
    try:
        make_counts([3, 3] if odd else [3, 2]).save(folder / "counts", group=group)
    finally:
        assert not os.listdir(folder)


@case
def another_tokenizer_to_save(group, first, odd, folder):
    counts = make_counts()
    counts.tokenizer = "plants" if odd else "animals"
    counts.save(folder / "counts", group=group)


@case
def documents_on_one_rank(group, first, odd, folder):
    counts = make_counts()
    if not odd:
        counts.document_counts = None
    counts.save(folder / "counts", group=group)


@case
def no_folder_to_save_counts_to(group, first, odd, folder):
    make_counts().save(folder / "missing" / "counts", group=group)


@case
def no_counts_to_load(group, first, odd, folder):
    path = of_rank(folder)
    if not odd:
        make_counts().save(path)
    TokenCounts.load(path, group=group)


@case
def other_counts_loaded(group, first, odd, folder):
    path = of_rank(folder)
    make_counts([3, 3] if odd else [3, 2]).save(path)
    TokenCounts.load(path, group=group)


# ---------------------------------------------------------------------------------------------------------------------


def run(group, folder):
    """{case: [type of the error or None, its message or what the case returns]}, of every case in turn.

    A case is called on every rank of the group, with the group, whether the rank is the group's first, whether it is
    the last, which is the odd one out, and a folder for all of them.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    seen = {}
    for name, function in CASES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        dist.barrier(group)
        try:
            seen[name] = [None, function(group, rank == 0, rank == size - 1, folder / name)]
        except Exception as error:  # assertions too: the test of this case fails, and the next case runs
            seen[name] = [type(error).__name__, str(error)]
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))  # a rank that waits for nobody fails, not hangs
    rank, size = dist.get_rank(), dist.get_world_size()
    seen = {"all": run(dist.group.WORLD, folder / "all")}
    if size == 3:
        pair = dist.new_group([1, 2], timeout=timedelta(seconds=30))
        if rank > 0:
            seen["pair"] = run(pair, folder / "pair")
        else:
            try:
                load_weights(folder / "missing", group=pair)
            except ValueError as error:
                seen["outside"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    leave()
