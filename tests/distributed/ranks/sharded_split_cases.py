"""The loss on logits, split evenly, unevenly and oddly; extreme rows; dtypes. All against the whole in float64."""

import torch
from helpers import confident_logits, make_logits, make_targets, make_weights
from helpers.rank_cases import Cases
from helpers.vocabulary import (
    SPLITS,
    UNEVEN,
    V,
    border_targets,
    check_split,
    columns,
    everything,
    own,
    run_split,
)

from pdl_kernels import pdl_cross_entropy

cases = Cases()
WEIGHTS = ["none", "whole", "own"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def table(kind, V=V):
    return None if kind == "none" else make_weights("random", V)


def options_of(weights):
    return {"own_weights": weights == "own"}


def check_a_split(ranks, split, weights):
    targets = border_targets(split)
    N = len(targets)
    keywords = {"split": split, "group": ranks.group(), **options_of(weights)}
    for dtype, options in (
        (torch.float32, {"return_stats": True}),
        (torch.float32, everything(N)),
        (torch.float64, {}),
    ):
        check_split(ranks, make_logits(N, V, dtype=dtype), targets, table(weights), **keywords, **options)


@cases(2, split=SPLITS[2], weights=WEIGHTS)
def columns_of_two(ranks, split, weights):
    check_a_split(ranks, split, weights)


@cases(3, split=SPLITS[3], weights=WEIGHTS)
def columns_of_three(ranks, split, weights):
    check_a_split(ranks, split, weights)


@cases(4, split=SPLITS[4], weights=WEIGHTS)
def columns_of_four(ranks, split, weights):
    check_a_split(ranks, split, weights)


@cases(2, 3, 4, weights=WEIGHTS)
def all_targets_on_one_rank(ranks, weights):
    """The columns of the others hold none."""
    split = (5,) * (ranks.size - 1) + (V - 5 * (ranks.size - 1),)
    for owner in range(ranks.size):
        mine = columns(split, owner)
        targets = torch.tensor([mine.start, mine.stop - 1, mine.start])
        options = {"split": split, "return_stats": True, **options_of(weights)}
        check_split(ranks, make_logits(3, V, seed=owner), targets, table(weights) + 0.1 if weights != "none" else None,
                    **options)  # fmt: skip


@cases(3, reduction=["mean", "token_mean", "none"])
def nothing_counted(ranks, reduction):
    """A loss of 0 that is attached, gradients of 0, even for rows of nan; and no row at all."""
    everywhere = ranks.group()
    for logits, targets in (
        (make_logits(4, V), torch.full((4,), -100)),
        (torch.full((4, V), torch.nan), torch.full((4,), -100)),
        (make_logits(0, V), torch.zeros(0, dtype=torch.int64)),
    ):
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"token_weights": torch.zeros(len(targets))}):
            for own_weights in (False, True):
                got = run_split(ranks, logits, targets, make_weights("random", V), own_weights=own_weights,
                                reduction=reduction, return_stats=True, group=everywhere, **options)  # fmt: skip
                assert got.loss.shape == (targets.shape if reduction == "none" else ())
                assert (got.loss == 0).all()
                assert (got.gradient == 0).all()
                assert [float(number) for number in got.stats] == [0, 0, 0, 0]


@cases(3, dtype=DTYPES)
def dtypes(ranks, dtype):
    group = ranks.group()
    targets = border_targets(UNEVEN[ranks.size])
    N = len(targets)
    logits = make_logits(N, V, dtype=dtype)
    for weights, own_weights in ((None, False), (make_weights("random", V), False), (make_weights("random", V), True)):
        for options in ({}, {"reduction": "none", "return_stats": True}, everything(N)):
            check_split(ranks, logits, targets, weights, own_weights=own_weights, group=group, **options)


@cases(2, dtype=[torch.bfloat16, torch.float16])
def half_precision_is_no_worse_than_torch(ranks, dtype):
    """Of a problem large enough that chance decides nothing, and of one whose targets are almost certain."""
    N, wide = 40, 200
    targets = make_targets(N, V=wide, ignored=(5, 6))
    check_split(ranks, make_logits(N, wide, dtype=dtype), targets, split=(120, 80))
    check_split(ranks, make_logits(N, wide, dtype=dtype), targets, make_weights("random", wide), split=(120, 80))
    targets = make_targets(N, V=wide)
    for p in (0.9, 0.999):
        logits = confident_logits(N, wide, p, targets, dtype=dtype)
        check_split(ranks, logits, targets, split=(120, 80), confident=True)


@cases(3)
def weights_of_any_size(ranks):
    """0, 1e-7 and 1e7 in one batch, and a table in other dtypes."""
    targets = torch.tensor([0, 16, 7, 3, 9, -100, 4])
    weights = make_weights("power_law", V)
    weights[targets[:3]] = torch.tensor([0, 1e7, 1e-7])
    logits = make_logits(7, V)
    for own_weights in (False, True):
        for reduction in ("mean", "none"):
            check_split(ranks, logits, targets, weights, own_weights=own_weights, reduction=reduction)
        for dtype in (torch.float64, torch.bfloat16):
            kept = make_weights("random", V).to(dtype)
            check_split(ranks, logits, targets, kept, own_weights=own_weights, label_smoothing=0.1, return_stats=True)
        nothing = torch.zeros(V)
        got = check_split(ranks, logits, targets, nothing, own_weights=own_weights, return_stats=True)
        assert (got.loss == 0).all()
        assert (got.gradient == 0).all()
        check_split(ranks, logits, targets, nothing, own_weights=own_weights, z_loss=0.1, label_smoothing=0.5)


@cases(2, own_weights=[False, True], dtype=[torch.float32, torch.bfloat16])
def rows_without_a_share_may_hold_anything(ranks, own_weights, dtype):
    """Ignored, u = 0, and w = 0 without smoothing, z-loss and statistics: exactly 0, whatever their logits."""
    group = ranks.group()
    targets = torch.tensor([0, -100, 9, 16, 8, 4])
    weights = make_weights("random", V) + 0.1
    weights[9] = 0
    u = torch.tensor([1.0, 2.0, 1.5, 0.0, -0.5, 3.0])
    logits = make_logits(6, V, dtype=dtype)
    for garbage, options in (
        (torch.nan, {}),
        (torch.inf, {"reduction": "sum"}),
        (torch.nan, {"reduction": "none"}),
        (-torch.inf, {"softcap": 5.0, "logit_scale": 2.0}),
        (torch.nan, {"label_smoothing": 0.1, "z_loss": 0.01, "return_stats": True}),
    ):
        silent = [1, 3] if "z_loss" in options else [1, 2, 3]
        dirty = logits.clone()
        dirty[silent] = garbage
        got = check_split(ranks, logits, targets, weights, given=dirty, own_weights=own_weights, token_weights=u,
                          group=group, **options)  # fmt: skip
        assert (got.gradient[silent] == 0).all()


@cases(2, own_weights=[False, True])
def an_infinite_upstream_gradient_leaves_rows_without_a_share_at_0(ranks, own_weights):
    targets, weights = torch.tensor([0, -100, 9, 16]), make_weights("random", V) + 0.1
    weights[9] = 0
    u = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for upstream in (torch.inf, torch.nan):
        options = {"own_weights": own_weights, "token_weights": u, "upstream": upstream}
        got = run_split(ranks, make_logits(4, V), targets, weights, **options)
        assert (got.gradient[1:] == 0).all()
        assert not got.gradient[0].isfinite().any()


@cases(2, 3, value=[torch.nan, torch.inf])
def what_is_not_finite_reaches_every_rank(ranks, value):
    """A nan or inf that counts, on whichever rank: the row's loss, and all of its gradient on every rank."""
    logits = make_logits(3, V)
    logits[1, 0] = logits[2, V - 1] = value
    got = run_split(ranks, logits, torch.tensor([0, 8, 16]), reduction="none")
    assert got.loss.isnan().tolist() == [False, True, True]
    assert got.gradient[0].isfinite().all()
    assert got.gradient[1:].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Extreme rows


@cases(3, own_weights=[False, True], dtype=[torch.float32, torch.bfloat16])
def columns_of_minus_infinity(ranks, own_weights, dtype):
    """The end of the last rank, all of it, all of the first, all but one column."""
    split, group = (6, 6, 5), ranks.group()
    last, first = columns(split, ranks.size - 1), columns(split, 0)
    weights = make_weights("random", V) + 0.1
    for hidden in (slice(last.stop - 2, None), last, first, slice(first.start, last.stop - 1)):
        logits = make_logits(4, V, dtype=dtype)
        logits[:, hidden] = -torch.inf
        left = torch.arange(V)[logits[0] > -torch.inf]
        targets = left[torch.tensor([0, -1, len(left) // 2, 0])]
        softcap = {"softcap": 10.0, "confident": True}  # it maps -inf to -10
        for options in ({"return_stats": True}, softcap, {"z_loss": 0.01, "logit_scale": 0.5}):
            check_split(ranks, logits, targets, weights, own_weights=own_weights, split=split, group=group, **options)
        padded = weights.clone()
        padded[hidden] = 0  # columns of weight 0 add 0 to the smoothing term even at -inf
        for smoothing in (0.1, 1.0):
            options = {"label_smoothing": smoothing, "own_weights": own_weights, "split": split, "group": group}
            got = check_split(ranks, logits, targets, padded, **options)
            assert got.loss.isfinite()


@cases(3)
def smoothing_over_minus_infinity(ranks):
    """As torch has it: inf, and no nan in the loss."""
    logits = make_logits(3, V)
    logits[:, 15:] = -torch.inf
    for weights in (None, make_weights("random", V) + 0.1):
        for own_weights in (False, True):
            got = run_split(ranks, logits, torch.tensor([0, 8, 14]), weights, own_weights=own_weights,
                            label_smoothing=0.1, reduction="none")  # fmt: skip
            assert (got.loss == torch.inf).all(), got.loss


@cases(2, 3, own_weights=[False, True])
def a_target_of_minus_infinity(ranks, own_weights):
    """+inf and a finite gradient, unless the row's factor is 0."""
    logits = make_logits(4, V)
    targets = torch.tensor([2, 16, 9, 4])
    logits[torch.arange(4), targets] = -torch.inf
    weights = torch.ones(V)
    weights[9] = 0
    options = {"own_weights": own_weights, "token_weights": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    got = run_split(ranks, logits, targets, weights, reduction="none", **options)
    assert got.loss.tolist() == [torch.inf, torch.inf, 0, 0]
    expected = torch.softmax(logits.double(), -1) - torch.nn.functional.one_hot(targets, V)
    expected[2:] = 0
    torch.testing.assert_close(got.gradient.double(), expected, rtol=1e-6, atol=1e-7)
    single = pdl_cross_entropy(logits, targets, weights, return_stats=True, token_weights=options["token_weights"])
    split = run_split(ranks, logits, targets, weights, return_stats=True, **options)
    assert split.loss == single[0] == torch.inf
    assert tuple(split.stats) == tuple(single[1])


@cases(2, dtype=DTYPES)
def rows_of_the_lowest_value(ranks, dtype):
    """log V each; and one rank of them beside normal columns."""
    lowest = torch.finfo(dtype).min
    targets = torch.tensor([0, 8, 16])
    options = {"reduction": "none", "return_stats": True}
    got = check_split(ranks, torch.full((3, V), lowest, dtype=dtype), targets, **options)
    torch.testing.assert_close(got.loss.double(), torch.full((3,), float(V)).double().log(), rtol=1e-6, atol=0)
    logits = make_logits(3, V, dtype=dtype)
    logits[:, columns(UNEVEN[ranks.size], ranks.size - 1)] = lowest
    check_split(ranks, logits, torch.tensor([0, 1, 2]), **options)


@cases(2, dtype=[torch.float32, torch.float64])
def large_common_offsets(ranks, dtype):
    targets = torch.tensor([0, 8, 16, 3])
    logits = (make_logits(4, V) * 64).round() / 64  # so that adding the offset is exact
    plain = run_split(ranks, logits.to(dtype), targets, reduction="none")
    for offset in (1e4, -1e4):
        # A rank without columns has no maximum that could hide those of the others.
        check_split(ranks, (logits + offset).to(dtype), targets, split=(0, V), return_stats=True)
        moved = run_split(ranks, (logits + offset).to(dtype), targets, reduction="none")
        check_split(ranks, (logits + offset).to(dtype), targets, reduction="none")
        torch.testing.assert_close(moved.loss, plain.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moved.gradient, plain.gradient, rtol=1e-5, atol=1e-7)


@cases(2)
def scaled_logits_beyond_the_finite_range(ranks):
    """They are clamped to it, as in one process."""
    logits = make_logits(3, V) * 1e37
    targets = torch.tensor([0, 8, 16])
    for options in ({"logit_scale": 100.0}, {"logit_scale": 100.0, "softcap": 30.0}):
        got = run_split(ranks, logits, targets, reduction="none", **options)
        leaf = logits.clone().requires_grad_()
        single = pdl_cross_entropy(leaf, targets, reduction="none", **options)
        (gradient,) = torch.autograd.grad(single, leaf, torch.ones(3))
        torch.testing.assert_close(got.loss, single.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(got.gradient, gradient, rtol=1e-5, atol=1e-7)
        assert not got.loss.isnan().any()
        assert not got.gradient.isnan().any()


@cases(3)
def many_pieces(ranks):
    """More columns and rows than the eager backend takes at a time; some rows in the middle of a piece do not count."""
    N, wide = 300, 6000
    split = (2000, 1000, 3000)
    logits = make_logits(N, wide)
    targets = make_targets(N, V=wide, ignored=(0, 7, 8, 150, 299))
    weights = make_weights("random", wide)
    options = {"split": split, "return_stats": True, "label_smoothing": 0.1}
    check_split(ranks, logits, targets, weights, **options)
    assert own(weights, split, ranks.rank).shape == (split[ranks.rank],)
