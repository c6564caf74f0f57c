"""Ranks that do not come, fail, leave, or call something else: everybody ends with an error, and soon.

Everything that waits has a timeout of rank_cases.SHORT seconds.
"""

import os
import time
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from helpers import make_logits, make_weights, run_reference
from helpers.linear import make_problem
from helpers.rank_cases import LEFT, SHORT, Cases
from helpers.vocabulary import V, check_split, columns, everyones_errors, own

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.eager import cross_entropy

cases = Cases("apart")
SPLIT = (7, 1, 9)
LOGITS, WEIGHTS = make_logits(4, V), make_weights("random", V)
TARGETS = torch.tensor([0, 16, 7, -100])


def call(ranks, loss="logits", targets=TARGETS, weights=None, **options):
    group, mine = options.pop("group", dist.group.WORLD), columns(options.pop("split", SPLIT), ranks.rank)
    if loss == "logits":
        logits = LOGITS[-len(targets) :, mine]
        return pdl_cross_entropy(logits, targets, weights, group=group, **options)
    problem = make_problem(len(targets), V=V)
    options = {"chunk_size": 1} | options
    return pdl_linear_cross_entropy(
        problem.hidden, problem.lm_head_weight[mine], targets, weights, group=group, **options
    )


def error_of(function):
    """(type, message, seconds) of what it raises."""
    begin = time.monotonic()
    try:
        function()
    except Exception as error:
        return type(error), str(error), time.monotonic() - begin
    return None, "", time.monotonic() - begin


def assert_timed_out(found, *words):
    kind, message, seconds = found
    assert kind is RuntimeError, found
    assert seconds < 4 * SHORT, found
    for word in words:
        assert word in message, f"{word!r} is missing in: {message}"


@cases(3, loss=["logits", "linear"])
def a_rank_that_never_comes(ranks, loss):
    """It is named, and how long it was waited for."""
    if ranks.rank == 2:
        time.sleep(SHORT + 3)
        return
    found = error_of(lambda: call(ranks, loss))
    name = {"logits": "pdl_cross_entropy(..., group=...)", "linear": "pdl_linear_cross_entropy(..., group=...)"}[loss]
    assert_timed_out(found, f"{name} with the group of ranks [0, 1, 2] waited for {SHORT} s",
                     "rank 2 has called no loss with a group")  # fmt: skip
    assert "rank 0" not in found[1]
    assert "rank 1" not in found[1]


@cases(3)
def a_rank_that_comes_late(ranks):
    if ranks.rank == 1:
        time.sleep(SHORT / 3)
    check_split(ranks, LOGITS, TARGETS, WEIGHTS, split=SPLIT, group=dist.group.WORLD)


@cases(3)
def groups_that_differ(ranks):
    """Each rank asks another pair, and hears where the other one is."""
    pairs = [dist.new_group(pair, timeout=timedelta(seconds=SHORT)) for pair in ([0, 1], [1, 2], [0, 2])]
    ranks.everyones()
    members = ([0, 1], [1, 2], [0, 2])
    other = [1, 2, 0][ranks.rank]
    found = error_of(lambda: call(ranks, group=pairs[ranks.rank]))
    assert_timed_out(found, f"the group of ranks {members[ranks.rank]}",
                     f"rank {other} last asked a group of ranks {members[other]}")  # fmt: skip


@cases(3, loss=["logits", "linear"])
def a_rank_that_fails_in_the_first_call(ranks, loss):
    """With an error of its own; the others name it."""
    found = error_of(lambda: call(ranks, loss, TARGETS.double() if ranks.rank == 1 else TARGETS))
    if ranks.rank == 1:
        assert found[0] is TypeError
        time.sleep(SHORT)
    else:
        assert_timed_out(found, "rank 1 has called no loss with a group")


@cases(3, then=["the same", "another split", "another loss"])
def a_call_after_one_that_failed_on_a_rank(ranks, then):
    """All ranks have caught their errors and go on, as a training loop that leaves a batch out does. The one that had
    failed comes first, and must not take what the others have said before for what they say now.
    """
    found = error_of(lambda: call(ranks, targets=TARGETS.double() if ranks.rank == 1 else TARGETS))
    assert found[0] is not None
    ranks.everyones()
    if ranks.rank != 1:
        time.sleep(1)
    split = (9, 1, 7) if then == "another split" else SPLIT
    loss = "linear" if then == "another loss" else "logits"
    found = everyones_errors(ranks, lambda: call(ranks, loss, split=split))
    assert found == [(None, "")] * 3, found


@cases(3, loss=["logits", "linear"])
def a_rank_that_fails_in_a_later_call(ranks, loss):
    """The others are in the collective by then."""
    call(ranks, loss)
    found = error_of(lambda: call(ranks, loss, TARGETS.double() if ranks.rank == 1 else TARGETS))
    if ranks.rank == 1:
        assert found[0] is TypeError
        time.sleep(SHORT)
    else:
        assert_timed_out(found)


@cases(3)
def a_rank_that_fails_between_chunks(ranks):
    """As one that has no memory left."""
    call(ranks, "linear")
    calls = []

    def fail(*arguments, **options):
        calls.append(arguments)
        if ranks.rank == 1 and len(calls) == 2:
            raise MemoryError("no memory left")
        return backward(*arguments, **options)

    backward = cross_entropy.backward
    problem, mine = make_problem(4, V=V), columns(SPLIT, ranks.rank)
    hidden = problem.hidden.requires_grad_()
    with mock.patch.object(cross_entropy, "backward", fail):
        found = error_of(
            lambda: pdl_linear_cross_entropy(
                hidden, problem.lm_head_weight[mine], TARGETS, group=dist.group.WORLD, chunk_size=1
            )
        )
    if ranks.rank == 1:
        assert found[0] is MemoryError
        time.sleep(SHORT)
    else:
        assert_timed_out(found)


@cases(3, when=["before the first call", "later"])
def a_rank_that_leaves(ranks, when):
    """Its process ends while the others wait for it."""
    if when == "later":
        call(ranks)
    ranks.gone = True
    if ranks.rank == 2:
        os._exit(LEFT)
    found = error_of(lambda: call(ranks))
    assert_timed_out(found, *(["rank 2 has called no loss with a group"] if when == "before the first call" else []))


@cases(3)
def a_new_world_in_the_same_process(ranks):
    """What was agreed on in the one before is forgotten: the new one may split otherwise."""
    for number, split in enumerate([(7, 1, 9), (7, 9, 1), (2, 14, 1)]):
        if number:
            ranks.everyones()
            dist.destroy_process_group()
            where = f"file://{ranks.place} again {number}"
            dist.init_process_group("gloo", init_method=where, rank=ranks.rank, world_size=3)
        mine = columns(split, ranks.rank)
        leaf = LOGITS[:, mine].clone().requires_grad_()
        loss = pdl_cross_entropy(leaf, TARGETS, own(WEIGHTS, split, ranks.rank), group=dist.group.WORLD)
        loss.backward()
        expected = run_reference(LOGITS, TARGETS, WEIGHTS)
        torch.testing.assert_close(loss.detach().double(), expected.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(leaf.grad.double(), expected.gradient[:, mine], rtol=1e-5, atol=1e-7)


@cases(3, loss=["logits", "linear"])
def all_columns_on_one_rank_with_either_table(ranks, loss):
    """A table of all columns is then that rank's own, too, so that it cannot tell one kind of call from the other."""
    groups = [dist.new_group([0, 1, 2]) for _ in range(2)]
    split = (V, 0, 0)
    mine, expected = columns(split, ranks.rank), []
    problem = make_problem(4, V=V)
    for table, group in ((WEIGHTS, groups[0]), (WEIGHTS[mine], groups[1]), (WEIGHTS, groups[0])):
        if loss == "logits":
            found = pdl_cross_entropy(LOGITS[:, mine], TARGETS, table, group=group)
        else:
            found = pdl_linear_cross_entropy(problem.hidden, problem.lm_head_weight[mine], TARGETS, table, group=group)
        expected.append(found)
        assert torch.equal(found, expected[0])
