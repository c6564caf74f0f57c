"""Groups and splits: several in one program, output layers that share a group, and what is no group of this rank."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
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
)
from torch.distributed.device_mesh import DeviceMesh

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.ops import cross_entropy, sharded_chunks, sharded_cross_entropy

cases = Cases()
WEIGHTS = make_weights("random", V)
LOGITS = make_logits(4, V)
TARGETS = torch.tensor([0, 16, 9, -100])


def targets_of(V):
    return torch.tensor([0, V - 1, V // 2, -100])


def part(ranks, split, wide=V):
    return make_logits(4, wide)[:, columns(split, ranks.rank)].clone().requires_grad_()


# ---------------------------------------------------------------------------------------------------------------------
# Several of them


@cases(3)
def several_groups(ranks):
    """Of all ranks and of pairs, each with a split of its own, by turns."""
    members = {"all": [0, 1, 2], "first": [0, 1], "last": [1, 2], "ends": [0, 2]}
    splits = {"all": (5, 0, 12), "first": (8, 9), "last": (1, 16), "ends": (12, 5)}
    groups = {name: ranks.group(of) for name, of in members.items()}
    for seed in range(2):
        for name, of in members.items():
            if ranks.rank not in of:
                continue
            logits = make_logits(4, V, seed=seed)
            mine = columns(splits[name], of.index(ranks.rank))
            for table in (None, WEIGHTS, WEIGHTS[mine]):
                leaf = logits[:, mine].clone().requires_grad_()
                loss = pdl_cross_entropy(leaf, TARGETS, table, group=groups[name])
                loss.backward()
                expected = run_reference(logits, TARGETS, None if table is None else WEIGHTS)
                torch.testing.assert_close(loss.detach().double(), expected.loss, rtol=1e-6, atol=0)
                torch.testing.assert_close(leaf.grad.double(), expected.gradient[:, mine], rtol=1e-5, atol=1e-7)


@cases(3)
def ranks_of_a_group_in_their_own_order(ranks):
    """Columns go by the rank in the group, whatever order its ranks were named in."""
    group = ranks.group([2, 0])
    if ranks.rank == 1:
        return
    mine = columns((11, 6), dist.get_rank(group))
    leaf = LOGITS[:, mine].clone().requires_grad_()
    pdl_cross_entropy(leaf, TARGETS, WEIGHTS[mine], group=group).backward()
    expected = run_reference(LOGITS, TARGETS, WEIGHTS).gradient[:, mine]
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-7)


@cases(2)
def a_group_of_a_mesh(ranks):
    mesh = DeviceMesh("cpu", torch.arange(2))
    check_split(ranks, LOGITS, TARGETS, WEIGHTS, group=mesh.get_group())


@cases(2)
def the_default_group(ranks):
    check_split(ranks, LOGITS, TARGETS, WEIGHTS, group=dist.group.WORLD)


@cases(2, 3)
def output_layers_with_equal_shares(ranks):
    """Several on one group, by turns, both losses, with and without their weights."""
    group = ranks.group()
    for _ in range(2):
        for share in (8, 4, 1):
            wide, split = share * ranks.size, (share,) * ranks.size
            logits, targets, weights = make_logits(4, wide), targets_of(wide), make_weights("random", wide)
            for options in ({}, {"own_weights": True}, {"label_smoothing": 0.1}):
                check_split(ranks, logits, targets, weights, split=split, group=group, **options)
            problem = make_problem(4, V=wide)
            check_split_linear(ranks, problem, weights, split=split, group=group, own_weights=True)
            check_split_linear(ranks, problem, None, split=split, group=group, chunk_size=3)


@cases(2, which=["other on one rank", "other on both", "exchanged", "each known"], loss=["logits", "linear"])
def output_layers_with_unequal_shares(ranks, which, loss):
    """An error on every rank, in the same words; the first layer goes on, and a group of its own serves the other."""
    group = ranks.group()

    def call(split, group=group):
        wide = sum(split)
        if loss == "logits":
            return pdl_cross_entropy(part(ranks, split, wide), targets_of(wide), group=group)
        problem, mine = make_problem(4, V=wide), columns(split, ranks.rank)
        return pdl_linear_cross_entropy(problem.hidden, problem.lm_head_weight[mine], targets_of(wide), group=group)

    first, second = {
        "other on one rank": ((8, 8), (8, 9)),
        "other on both": ((8, 8), (4, 5)),
        "exchanged": ((8, 9), (9, 8)),
        "each known": ((8, 8), (8, 12)),
    }[which]
    before = call(first)
    if which == "each known":
        call((12, 12))
    words = "an earlier call with this group", f"hold {list(second)} columns", "torch.distributed.new_group"
    for _ in range(2):
        assert_every_rank_raises(ranks, ValueError, lambda: call(second), *words)
        assert torch.equal(call(first), before)
    assert call(second, ranks.group()).isfinite()


@cases(2, loss=["logits", "linear"])
def splits_that_differ_become_nan_where_nobody_waits(ranks, loss):
    """As on a GPU, where reading what the others say would wait for the device."""
    group, watched = ranks.group(), sharded_cross_entropy if loss == "logits" else sharded_chunks

    def call(split):
        wide, mine = sum(split), columns(split, ranks.rank)
        if loss == "logits":
            leaf = part(ranks, split, wide)
            value = pdl_cross_entropy(leaf, targets_of(wide), group=group)
        else:
            problem = make_problem(4, V=wide)
            leaf = problem.hidden.requires_grad_()
            value = pdl_linear_cross_entropy(leaf, problem.lm_head_weight[mine], targets_of(wide), group=group)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value, gradient

    with (
        mock.patch.object(watched, "validates", return_value=False),
        mock.patch.object(cross_entropy, "validates", return_value=False),
    ):
        right = [call((8, 8)), call((4, 4)), call((8, 8))]
        assert all(value.isfinite() and gradient.isfinite().all() for value, gradient in right)
        value, gradient = call((8, 4))
        assert value.isnan()
        assert gradient[:3].isnan().any(-1).all()
        assert torch.equal(call((8, 8))[1], right[0][1])


@cases(2)
def what_is_no_group(ranks):
    mesh = DeviceMesh("cpu", torch.arange(2))
    mine = columns(UNEVEN[2], ranks.rank)
    outside = dist.GroupMember.NON_GROUP_MEMBER  # what dist.new_group returns where a rank is not in it
    problem = make_problem(4, V=V)
    for group, kind in (("world", "str"), (0, "int"), ([0, 1], "list"), (mesh, "DeviceMesh"), (outside, None)):
        for call in (
            lambda g=group: pdl_cross_entropy(LOGITS[:, mine], TARGETS, group=g),
            lambda g=group: pdl_linear_cross_entropy(problem.hidden, problem.lm_head_weight[mine], TARGETS, group=g),
        ):
            if kind is None:
                assert_every_rank_raises(ranks, ValueError, call, "group does not hold this process")
            else:
                assert_every_rank_raises(ranks, TypeError, call, f"group is a {kind}", "accepted is a ProcessGroup")


@cases(3)
def a_rank_that_is_not_in_the_group(ranks):
    """ValueError there, and the others are not disturbed."""
    group = ranks.group([0, 2])
    if ranks.rank == 1:
        with (
            mock.patch.object(dist, "get_rank", lambda of=None: 1 if of is None else -1),
            pytest.raises(ValueError, match="group does not hold this process, rank 1; accepted are groups that do"),
        ):
            pdl_cross_entropy(LOGITS, TARGETS, group=dist.group.WORLD)
        return
    mine = columns((11, 6), dist.get_rank(group))
    loss = pdl_cross_entropy(LOGITS[:, mine], TARGETS, WEIGHTS, group=group)
    torch.testing.assert_close(loss.double(), run_reference(LOGITS, TARGETS, WEIGHTS).loss, rtol=1e-6, atol=0)


@cases(2)
def a_rank_that_never_comes(ranks):
    """It is named after the store's timeout; see sharded_trouble_cases.py for more of them."""
    group = ranks.group()
    if ranks.rank == 0:
        message = r"with the group of ranks \[0, 1\] waited for 2 s for ranks that do not call it: rank 1 "
        with ranks.short_waits(2), pytest.raises(RuntimeError, match=message):
            pdl_cross_entropy(LOGITS[:, columns(UNEVEN[2], 0)], TARGETS, group=group)
