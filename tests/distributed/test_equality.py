"""Weights and counts saved once and loaded on every rank, and errors that every rank raises where one fails.

The cases are functions of ranks/equality_ranks.py, in which the last rank of a group is the odd one out.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from pdl_kernels import TokenCounts, load_weights, save_weights
from pdl_kernels.distributed import equality

RANKS = Path(__file__).parent / "ranks" / "equality_ranks.py"
GROUPS = {
    "two processes": (2, "all", [0, 1]),
    "three": (3, "all", [0, 1, 2]),
    "the last two of three": (3, "pair", [1, 2]),
}


class Seen:
    """What a group's ranks have seen, and how messages name them."""

    def __init__(self, folder, name, ranks):
        self.of_rank = {rank: json.loads((folder / f"{rank}.json").read_text())[name] for rank in ranks}
        self.folder, self.ranks, self.first, self.odd = folder / name, ranks, ranks[0], ranks[-1]
        self.usual = "most ranks" if len(ranks) > 2 else f"rank {self.first}"

    def case(self, name):
        """{rank: (type of the error or None, its message or what the case returned)}"""
        return {rank: tuple(seen[name]) for rank, seen in self.of_rank.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function from a number of processes to the folder where they have written what they saw."""
    folders = {}

    def run_once(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("ranks")
            run_ranks(processes, RANKS, folders[processes], timeout=120)
        return folders[processes]

    return run_once


@pytest.fixture(scope="module", params=GROUPS.values(), ids=GROUPS.keys())
def seen(request, run):
    processes, name, ranks = request.param
    return Seen(run(processes), name, ranks)


@pytest.mark.parametrize("case", ["the_same", "nobody_fails"])
def test_nothing_happens_where_nothing_is_wrong(seen, case):
    assert seen.case(case) == dict.fromkeys(seen.ranks, (None, None))


ALIKE = "float32 of shape (6,) on {usual}, other values on rank {odd}"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another_value", f"a check: the ranks of the group do not have the same table ({ALIKE}); accepted is"),
        ("another_sign_of_zero", "table (float32 of shape (1,) on {usual}, other values on rank {odd})"),
        ("another_length", "table (float32 of shape (6,) on {usual}, float32 of shape (100006,) on rank {odd})"),
        ("another_shape", "table (float32 of shape (3, 2) on {usual}, float32 of shape (2, 3) on rank {odd})"),
        ("another_dtype", "table (float32 of shape (6,) on {usual}, int32 of shape (6,) on rank {odd})"),
        ("a_value_that_is_missing", "table (float32 of shape (2,) on {usual}, none on rank {odd})"),
        ("other_words", f"words ('a' on {{usual}}, 'b' on rank {{odd}}), table ({ALIKE})"),
        ("other_words_at_the_end", "aaa... on {usual}, other values on rank {odd})"),
        ("another_table_to_save", "save_weights to {path}: the ranks of the group do not have the same table (float32"),
        ("another_recipe_to_save", "the same weighting ({{'name': 'power_law', "),
        ("another_recipe_to_save", "on {usual}, {{'name': 'power_law', "),
        ("another_recipe_to_save", "on rank {odd}); accepted is"),
        ("other_counts_to_save_with_weights", "counts ({{'tokens': 6, 'tokenizer': 'animals'}} on {usual}, {{'tok"),
        ("another_table_loaded", "table (float32 of shape (6,) on {usual}, float32 of shape (7,) on rank {odd})"),
        ("another_recipe_loaded", "the same weighting ({{'name': 'power_law', "),
        ("other_facts_loaded", "the same tokenizer ('animals' on {usual}, 'plants' on rank {odd}); accepted is"),
        ("other_counts_to_save", "TokenCounts.save to {path}: the ranks of the group do not have the same counts ("),
        ("other_counts_to_save", "counts (int64 of shape (6,) on {usual}, other values on rank {odd}), document_"),
        ("another_tokenizer_to_save", "the same tokenizer ('animals' on {usual}, 'plants' on rank {odd}); accepted is"),
        ("documents_on_one_rank", "the same document_counts (none on {usual}, int64 of shape (6,) on rank {odd}); acc"),
        ("other_counts_loaded", "counts (int64 of shape (6,) on {usual}, other values on rank {odd})"),
    ],
)  # fmt: skip
def test_every_rank_says_which_rank_has_something_else(seen, case, message):
    path = seen.folder / case / ("weights" if "table" in case else "counts")
    message = message.format(usual=seen.usual, odd=seen.odd, path=path)
    for rank, (error, said) in seen.case(case).items():
        assert error == "ValueError", (rank, error, said)
        assert message in said


def test_the_majority_is_right_and_else_the_first_rank(seen):
    three = len(seen.ranks) == 3
    strange = seen.first if three else seen.odd
    for error, said in seen.case("another_value_on_the_first").values():
        assert error == "ValueError"
        assert f"float32 of shape (6,) on {seen.usual}, other values on rank {strange})" in said
    others = ", ".join(f"other values on rank {rank}" for rank in seen.ranks[1:])
    for error, said in seen.case("all_different").values():
        assert error == "ValueError"
        assert f"table (float32 of shape (2,) on rank {seen.first}, {others})" in said


@pytest.mark.parametrize(
    ("case", "caller", "failing", "error", "reason"),
    [
        ("one_fails", "a block", "odd", "KeyError", "'a reason'"),
        ("a_value_that_cannot_be_compared", "a check", "odd", "ValueError", "no words for it"),
        ("a_table_that_is_none", "save_weights to {folder}/weights", "odd", "ValueError", "table[3] is -1"),
        ("a_full_disk", "save_weights to {folder}/weights", "first", "OSError", "[Errno 28] No space left"),
        ("no_folder_to_save_to", "save_weights to {folder}/missing/weights", "first", "FileNotFoundError", "[Errno 2]"),
        ("no_file_to_load", "load_weights of {folder}/", "odd", "FileNotFoundError", "there is no file {folder}/rank"),
        ("a_damaged_file_to_load", "load_weights of {folder}/", "odd", "ValueError", "{folder}/rank {odd}/file is dam"),
        ("no_folder_to_save_counts_to", "TokenCounts.save to {folder}/m", "first", "FileNotFoundError", "[Errno 2]"),
        (
            "no_counts_to_load",
            "TokenCounts.load of {folder}/",
            "odd",
            "FileNotFoundError",
            "there is no file {folder}/",
        ),
    ],
)
def test_every_rank_fails_where_one_fails(seen, case, caller, failing, error, reason):
    names = {"folder": seen.folder / case, "odd": seen.odd}
    failing, caller, reason = getattr(seen, failing), caller.format(**names), reason.format(**names)
    found = seen.case(case)
    kind, said = found.pop(failing)
    assert kind == error
    assert said.startswith(reason)
    assert len(found) == len(seen.ranks) - 1
    for kind, said in found.values():
        assert kind == "RuntimeError"
        assert said.startswith(caller)
        assert f" failed on rank {failing}: {error}: {reason}" in said
        assert said.count("on rank") == 1


def test_every_rank_keeps_its_own_error_where_all_fail(seen):
    assert seen.case("everybody_fails") == dict.fromkeys(seen.ranks, ("KeyError", "'a reason'"))


@pytest.mark.parametrize("kind", ["weights", "counts"])
def test_saved_once_and_loaded_on_every_rank(seen, kind):
    """The first rank has written once, in its words; the others have found the file there when they went on."""
    for rank, (error, returned) in seen.case(f"{kind}_saved_and_loaded").items():
        assert error is None, returned
        writes, there, counted, files = returned
        assert writes == (rank == seen.first)
        assert there
        assert counted == f"what rank {seen.first} has counted"
        assert files == [kind]


def test_one_rank_saves_and_loads_alone_without_a_group(seen):
    found = seen.case("without_a_group")
    assert found.pop(seen.odd) == (None, [1, True, True])
    assert set(found.values()) == {(None, None)}


def test_what_is_no_group(seen):
    for error, said in seen.case("no_group_at_all").values():
        assert error == "TypeError"
        assert said.startswith("group is a str; accepted is a torch.distributed.ProcessGroup")


def test_a_process_outside_the_group(run):
    outside = json.loads((run(3) / "0.json").read_text())["outside"]
    assert outside == "group does not hold this process, rank 0; accepted are groups that do"


CALLS = {
    "save_weights": lambda path, **group: save_weights(path, torch.ones(3), **group),
    "load_weights": load_weights,
    "TokenCounts.save": lambda path, **group: TokenCounts(3).save(path, **group),
    "TokenCounts.load": TokenCounts.load,
    "check_equal": lambda path, group=None: equality.check_equal("check_equal", {}, group),
    "together": lambda path, group=None: equality.together("together", group).__enter__(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_group_needs_torch_distributed(tmp_path, name):
    assert not dist.is_initialized()
    group = dist.ProcessGroup(0, 1)
    with pytest.raises(RuntimeError, match=rf"^{name}.* needs torch.distributed: call .*init_process_group first"):
        CALLS[name](tmp_path / "file", group=group)
    assert not list(tmp_path.iterdir())


def test_no_group_needs_nothing(tmp_path):
    """`torch.distributed.group.WORLD` is None where torch.distributed is not initialised."""
    assert dist.group.WORLD is None
    table, counts = torch.linspace(0, 1, 3), TokenCounts(3).update([[0, 2, 2]], shift=False)
    for number, group in enumerate([{}, {"group": None}, {"group": dist.group.WORLD}]):
        save_weights(tmp_path / f"weights {number}", table, counts=counts, **group)
        assert torch.equal(load_weights(tmp_path / f"weights {number}", **group).table, table)
        counts.save(tmp_path / f"counts {number}", **group)
        assert TokenCounts.load(tmp_path / f"counts {number}", **group) == counts
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "missing", group=None)


def test_long_lists_of_ranks_are_cut():
    found = {rank: equality._fingerprint(torch.ones(rank + 1)) for rank in range(7)}
    assert equality._difference(found) == (
        "float32 of shape (1,) on rank 0, float32 of shape (2,) on rank 1, float32 of shape (3,) on rank 2, "
        "float32 of shape (4,) on rank 3, float32 of shape (5,) on rank 4 and 2 more"
    )
