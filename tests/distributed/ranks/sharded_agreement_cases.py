"""What ranks must agree on, and errors that all of them raise: where they do not, and where all give the same."""

import os
from unittest import mock

import torch
from helpers import make_logits, make_weights, run_reference
from helpers.linear import make_problem
from helpers.rank_cases import Cases
from helpers.vocabulary import (
    UNEVEN,
    V,
    assert_every_rank_raises,
    check_split,
    check_split_linear,
    columns,
    own,
)
from torch.utils.flop_counter import FlopCounterMode

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy

cases = Cases()
WEIGHTS = make_weights("random", V)
LOGITS = make_logits(4, V)
TARGETS = torch.tensor([0, 16, 9, -100])


def targets_of(V):
    return torch.tensor([0, V - 1, V // 2, -100])


def part(ranks, split, wide=V):
    return make_logits(4, wide)[:, columns(split, ranks.rank)].clone().requires_grad_()


def different(ranks, here, there):
    """`here` on the first rank, `there` on the others."""
    return here if ranks.rank == 0 else there


@cases(2, 3)
def different_tables(ranks):
    """Whole and own, of the wrong length, or on one rank alone."""
    split = UNEVEN[ranks.size]
    whole, mine, long = WEIGHTS, own(WEIGHTS, split, ranks.rank), torch.ones(V + 1)
    for here, there in ((whole, mine), (mine, whole), (None, whole), (mine, None), (whole[:-1], whole),
                        (whole[:-1], whole[:-1]), (long, long)):  # fmt: skip
        table, group = different(ranks, here, there), ranks.group()
        assert_every_rank_raises(
            ranks, ValueError, lambda t=table, g=group: pdl_cross_entropy(part(ranks, split), TARGETS, t, group=g),
            "weights have lengths", f"{V} in all", f"({V},)",
        )  # fmt: skip


@cases(2, 3, what=["label_smoothing", "dtype", "loss"])
def different_arguments(ranks, what):
    """ValueError in the same words on every rank, and calls that are alike go on."""
    split, group = UNEVEN[ranks.size], ranks.group()
    mine = columns(split, ranks.rank)
    problem = make_problem(4, V=V)

    def call(odd):
        logits = LOGITS[:, mine]
        if what == "label_smoothing":
            return pdl_cross_entropy(logits, TARGETS, group=group, label_smoothing=0.1 * odd)
        if what == "dtype":
            return pdl_cross_entropy(logits.double() if odd else logits, TARGETS, group=group)
        if odd:
            return pdl_linear_cross_entropy(problem.hidden, problem.lm_head_weight[mine], TARGETS, group=group)
        return pdl_cross_entropy(logits, TARGETS, group=group)

    assert_every_rank_raises(
        ranks, ValueError, lambda: call(int(ranks.rank == ranks.size - 1)),
        "the ranks of the group call with different arguments",
    )  # fmt: skip
    assert call(0).isfinite()
    assert call(1).isfinite()


VALIDATING = {"PDL_KERNELS_VALIDATE": "1"}


@cases(2, 3, loss=["logits", "linear"])
def validated(ranks, loss):
    """The numbers are those of calls without it; layers that are split otherwise have a group of their own."""
    split, groups = UNEVEN[ranks.size], [ranks.group(), ranks.group()]
    other = split[::-1]
    problem = make_problem(4, V=V)._replace(targets=TARGETS)
    with mock.patch.dict(os.environ, VALIDATING):
        for columns_of_ranks, group in ((split, groups[0]), (other, groups[1]), (split, groups[0])):
            for own_weights in (False, True):
                options = {"split": columns_of_ranks, "own_weights": own_weights, "group": group}
                if loss == "logits":
                    check_split(ranks, LOGITS, TARGETS, WEIGHTS, return_stats=True, **options)
                else:
                    check_split_linear(ranks, problem, WEIGHTS, chunk_size=3, **options)


@cases(
    2,
    what=["rows", "targets", "token_weights", "tables", "label_smoothing", "dtype", "reduction", "z_loss", "columns"],
    loss=["logits", "linear"],
)
def different_arguments_validated(ranks, what, loss):
    """In calls like those that were made before, too: ValueError in the same words on every rank, and all go on."""
    split, group = UNEVEN[2], ranks.group()
    mine = columns(split, ranks.rank)
    problem = make_problem(4, V=V)

    def call(odd):
        logits, hidden, head, targets, options = (
            LOGITS[:, mine],
            problem.hidden,
            problem.lm_head_weight[mine],
            TARGETS,
            {},
        )
        if what == "rows":
            logits, hidden, targets = logits[odd:], hidden[odd:], targets[odd:]
        elif what == "targets":
            targets = torch.where(torch.arange(4) == 1, targets - odd, targets)
        elif what == "dtype":
            logits, hidden, head = (t.double() if odd else t for t in (logits, hidden, head))
        elif what == "columns":
            logits, head = logits[:, odd:], head[odd:]
            targets = targets.clamp_max(V - 3)
        else:
            options = {
                "token_weights": {"token_weights": torch.ones(4) + odd},
                "tables": {"weights": WEIGHTS[mine] if odd else WEIGHTS},
                "label_smoothing": {"label_smoothing": 0.1 * odd},
                "reduction": {"reduction": "sum" if odd else "mean"},
                "z_loss": {"z_loss": 0.1 + odd},
            }[what]
        if loss == "logits":
            return pdl_cross_entropy(logits, targets, group=group, **options)
        return pdl_linear_cross_entropy(hidden, head, targets, group=group, **options)

    with mock.patch.dict(os.environ, VALIDATING):
        before = [call(0), call(1)]
        assert_every_rank_raises(ranks, ValueError, lambda: call(ranks.rank), "the ranks of the group")
        assert torch.equal(call(0), before[0])
        assert torch.equal(call(1), before[1])


@cases(2)
def validated_and_traced(ranks):
    """Layers that give a rank as many columns each, from different ones on; their backward passes come afterwards."""
    losses, leaves = [], []
    with mock.patch.dict(os.environ, VALIDATING), FlopCounterMode(display=False):  # a call is then one operator
        for split in ((8, 8), (12, 8)):
            wide = sum(split)
            leaves.append(part(ranks, split, wide))
            loss = pdl_cross_entropy(leaves[-1], targets_of(wide), group=ranks.group(), label_smoothing=0.1)
            losses.append(loss)
        found = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
    for split, gradient in zip(((8, 8), (12, 8)), found, strict=True):
        wide = sum(split)
        expected = run_reference(make_logits(4, wide), targets_of(wide), label_smoothing=0.1).gradient
        wanted = expected[:, columns(split, ranks.rank)]
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)


@cases(2, what=["chunk_size", "reduction", "sequence_parallel", "hidden", "compact", "accumulate_dtype"])
def different_linear_arguments(ranks, what):
    group, mine = ranks.group(), columns(UNEVEN[2], ranks.rank)
    problem = make_problem(4, V=V)
    hidden, head, targets = problem.hidden, problem.lm_head_weight[mine], TARGETS
    other = {
        "chunk_size": {"chunk_size": 2},
        "reduction": {"reduction": "none"},
        "sequence_parallel": {"sequence_parallel": True},
        "compact": {"compact": False},
        "accumulate_dtype": {"accumulate_dtype": torch.float64},
    }
    options = {}
    if ranks.rank == 1:
        options = other.get(what, {})
        if what == "hidden":
            hidden, head = torch.cat([hidden, hidden], 1), torch.cat([head, head], 1)
        elif what == "sequence_parallel":
            hidden = hidden[:2]
    assert_every_rank_raises(
        ranks, ValueError, lambda: pdl_linear_cross_entropy(hidden, head, targets, group=group, **options),
        "the ranks of the group call with different arguments",
    )  # fmt: skip


@cases(2)
def no_columns_anywhere(ranks):
    empty = torch.zeros(4, 0)
    assert_every_rank_raises(
        ranks,
        ValueError,
        lambda: pdl_cross_entropy(empty, TARGETS, group=ranks.group()),
        "[0, 0] columns",
        "one column",
    )
    assert_every_rank_raises(
        ranks, ValueError,
        lambda: pdl_linear_cross_entropy(torch.zeros(4, 2), torch.zeros(0, 2), TARGETS, group=ranks.group()),
        "[0, 0] columns",
    )  # fmt: skip


@cases(2, 3, target=[V, V + 5, -1, -101], loss=["logits", "linear"])
def targets_that_are_no_class(ranks, target, loss):
    """IndexError on every rank, whichever columns it has, and the group goes on."""
    split, group = UNEVEN[ranks.size], ranks.group()
    mine, targets = columns(split, ranks.rank), TARGETS.clone()
    targets[2] = target
    problem = make_problem(4, V=V)

    def call(table, dtype):
        y = targets.to(dtype)
        if loss == "logits":
            return pdl_cross_entropy(LOGITS[:, mine], y, table, group=group)
        return pdl_linear_cross_entropy(problem.hidden, problem.lm_head_weight[mine], y, table, group=group)

    for table in (WEIGHTS, own(WEIGHTS, split, ranks.rank)):
        for dtype in (torch.int64, torch.int32):
            assert_every_rank_raises(
                ranks, IndexError, lambda t=table, d=dtype: call(t, d), f"targets[2] is {target}", "from 0 to 16"
            )
    check_split(ranks, LOGITS, TARGETS, WEIGHTS, split=split, group=group)


@cases(2)
def arguments_that_one_process_refuses_too(ranks):
    """In the same words on every rank, before anything is sent."""
    group, mine = ranks.group(), columns(UNEVEN[2], ranks.rank)
    logits = LOGITS[:, mine]
    for error, call, words in (
        (TypeError, lambda: pdl_cross_entropy(logits, TARGETS.float(), group=group), ("targets are torch.float32",)),
        (TypeError, lambda: pdl_cross_entropy(logits.long(), TARGETS, group=group), ("logits are torch.int64",)),
        (ValueError, lambda: pdl_cross_entropy(logits, TARGETS[:2], group=group), ("targets have shape (2,)",)),
        (
            ValueError,
            lambda: pdl_cross_entropy(logits, TARGETS, torch.ones(1, V), group=group),
            ("weights have shape",),
        ),
        (TypeError, lambda: pdl_cross_entropy(logits, TARGETS, torch.ones(V).long(), group=group), ("weights are",)),
        (
            NotImplementedError,
            lambda: pdl_cross_entropy(logits, TARGETS, torch.ones(V, requires_grad=True), group=group),
            ("weights require grad",),
        ),
        (
            ValueError,
            lambda: pdl_cross_entropy(logits, TARGETS, group=group, token_weights=torch.ones(3)),
            ("token_weights have shape (3,)",),
        ),
        (
            ValueError,
            lambda: pdl_cross_entropy(logits, TARGETS, group=group, normalizer=2.0, reduction="sum"),
            ("normalizer is given with reduction='sum'",),
        ),
        (ValueError, lambda: pdl_cross_entropy(torch.tensor(1.0), TARGETS, group=group), ("logits have shape ()",)),
        (
            RuntimeError,
            lambda: pdl_cross_entropy(logits.double(), TARGETS, group=group, backend="triton"),
            ("backend='triton' cannot run",),
        ),
    ):
        assert_every_rank_raises(ranks, error, call, *words, same=False)
    check_split(ranks, LOGITS, TARGETS, WEIGHTS, group=group)
