"""The loss on logits with split columns: every option alone and together, upstream gradients, statistics, layouts."""

import torch
from helpers import make_logits, make_weights, run_reference
from helpers.rank_cases import Cases
from helpers.vocabulary import (
    UNEVEN,
    V,
    assert_same_bits,
    border_targets,
    check_split,
    columns,
    everything,
    own,
    run_split,
)

from pdl_kernels import PDLCrossEntropyLoss, pdl_cross_entropy

cases = Cases()
OWN = {"whole": False, "own": True}
SPLIT = UNEVEN[2]
TARGETS = border_targets(SPLIT)  # one of them ignored
N = len(TARGETS)


def signed(N=N):
    u = torch.linspace(-1.5, 2.0, N)
    u[N // 2] = 0
    return u


ALONE = {
    "nothing": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "only_smoothing": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.3},
    "token_weights": {"token_weights": signed()},
    "ignore_index": {"ignore_index": int(TARGETS[0])},
    "everything": everything(N),
}


@cases(2, reduction=["mean", "token_mean", "sum", "none"], weights=["none", *OWN])
def options(ranks, reduction, weights):
    group = ranks.group()
    table = None if weights == "none" else make_weights("random", V)
    for number, more in enumerate(ALONE.values()):
        targets = torch.where(TARGETS < 0, more["ignore_index"], TARGETS) if "ignore_index" in more else TARGETS
        upstream = [1.0, -3.0, 0.25][number % 3]
        more = {"return_stats": True, "upstream": upstream, "reduction": reduction, "group": group} | more
        check_split(ranks, make_logits(N, V, seed=number), targets, table, own_weights=OWN.get(weights, False), **more)


@cases(3, 4, weights=["none", *OWN])
def everything_together(ranks, weights):
    split = UNEVEN[ranks.size]
    targets = border_targets(split)
    table = None if weights == "none" else make_weights("random", V)
    group = ranks.group()
    for reduction in ("mean", "token_mean", "sum", "none"):
        check_split(ranks, make_logits(len(targets), V), targets, table, own_weights=OWN.get(weights, False),
                    group=group, reduction=reduction, **everything(len(targets)))  # fmt: skip


@cases(2, weights=["none", *OWN])
def normalizers(ranks, weights):
    """Numbers, tensors of any real dtype, 0, and nan, which propagates."""
    group = ranks.group()
    table = None if weights == "none" else make_weights("random", V)
    keywords = {"own_weights": OWN.get(weights, False), "group": group}
    terms = {}, {"z_loss": 0.01, "label_smoothing": 0.1, "token_weights": signed()}
    given = 7, 0.5, torch.tensor(3.0), torch.tensor(3, dtype=torch.int32), torch.tensor(2.5, dtype=torch.float64)
    for more in terms:
        for normalizer in given:
            check_split(ranks, make_logits(N, V), TARGETS, table, normalizer=normalizer, **keywords, **more)
        for nothing in (0, torch.tensor(0.0)):
            got = run_split(ranks, make_logits(N, V), TARGETS, table, normalizer=nothing, **keywords, **more)
            assert got.loss == 0
            assert not got.gradient.any()
    got = run_split(ranks, make_logits(N, V), TARGETS, table, normalizer=torch.tensor(torch.nan), **keywords)
    assert got.loss.isnan()
    assert (got.gradient[TARGETS < 0] == 0).all()


@cases(2, own_weights=[False, True])
def an_upstream_gradient_per_row(ranks, own_weights):
    """Zero in the first row, strided, of stride 0, of any sign, and the sum that a user takes."""
    group = ranks.group()
    upstream = torch.linspace(-2, 3, N)
    upstream[0] = 0
    strided = upstream.repeat_interleave(3)[::3]
    assert strided.stride() == (3,)
    expanded = torch.tensor(0.5).expand(N)
    for given in (upstream, strided, expanded, torch.zeros(N)):
        got = check_split(ranks, make_logits(N, V), TARGETS, make_weights("random", V), own_weights=own_weights,
                          reduction="none", upstream=given, group=group, z_loss=0.01)  # fmt: skip
        assert (got.gradient[given == 0] == 0).all()
    mine = columns(SPLIT, ranks.rank)
    logits, weights = make_logits(N, V), make_weights("random", V)
    table = own(weights, SPLIT, ranks.rank) if own_weights else weights
    for total in (torch.sum, lambda rows: (rows * upstream).sum(), lambda rows: rows[1::2].sum()):
        leaf = logits[:, mine].clone().requires_grad_()
        total(pdl_cross_entropy(leaf, TARGETS, table, reduction="none", group=group)).backward()
        rows = torch.ones(N, requires_grad=True)
        (factors,) = torch.autograd.grad(total(rows), rows)
        expected = run_reference(logits, TARGETS, weights, reduction="none", upstream=factors)
        torch.testing.assert_close(leaf.grad.double(), expected.gradient[:, mine], rtol=1e-5, atol=1e-7)


@cases(3, dtype=[torch.float32, torch.bfloat16])
def ties_over_ranks(ranks, dtype):
    """Logits of few values, so that the largest is on several ranks: accuracy exactly as in one process."""
    rows = 60
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-1, 2, (rows, V), generator=generator).to(dtype)
    targets = torch.randint(V, (rows,), generator=generator)
    u = torch.randint(0, 3, (rows,), generator=generator).float()
    for options in ({}, {"token_weights": u}, {"softcap": 0.01}, {"label_smoothing": 0.1}):
        got = check_split(ranks, logits, targets, make_weights("random", V), return_stats=True, **options)
        single = pdl_cross_entropy(logits, targets, make_weights("random", V), return_stats=True, **options)[1]
        assert 0 < got.stats.accuracy < 1
        assert got.stats.accuracy == single.accuracy
        assert got.stats.token_count == single.token_count
        assert got.stats.weight_sum == single.weight_sum
    logits[torch.arange(rows), targets] += torch.finfo(dtype).eps  # just above the others
    got = check_split(ranks, logits, targets, return_stats=True)
    # Adding eps to 1 is the next number, to -1 it may round away.
    assert got.stats.accuracy == (logits.amax(-1) == logits[torch.arange(rows), targets]).double().mean().float()


@cases(2)
def statistics_are_detached_and_ours_to_change(ranks):
    leaf = make_logits(N, V)[:, columns(SPLIT, ranks.rank)].clone().requires_grad_()
    loss, stats = pdl_cross_entropy(leaf, TARGETS, make_weights("random", V), group=ranks.group(), return_stats=True)
    for value in stats:
        assert not value.requires_grad
        value.zero_()
    loss.backward()
    expected = run_reference(make_logits(N, V), TARGETS, make_weights("random", V)).gradient
    torch.testing.assert_close(leaf.grad.double(), expected[:, columns(SPLIT, ranks.rank)], rtol=1e-5, atol=1e-7)


@cases(3)
def targets_of_32_bits_and_ignore_index_anywhere(ranks):
    split = UNEVEN[3]
    targets = torch.cat([border_targets(split)[:3], border_targets(split)[4:]])
    logits = make_logits(len(targets), V)
    group = ranks.group()
    for ignore_index in (0, V - 1, int(targets[2]), V + 3, -1):
        for dtype, own_weights in ((torch.int32, True), (torch.int64, False)):
            y = targets.clone()
            y[1] = ignore_index
            check_split(ranks, logits, y.to(dtype), make_weights("random", V), own_weights=own_weights, group=group,
                        ignore_index=ignore_index, return_stats=True, label_smoothing=0.1)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def in_layout(name, logits):
    """(whole logits as the problem has them, a function from them to a rank's part with its strides)"""
    if name == "columns of a wider tensor":
        return logits, lambda part: torch.cat([part, part.new_full((*part.shape[:-1], 3), torch.nan)], -1)[..., :-3]
    if name == "rows of a longer tensor":
        return logits, lambda part: part.repeat_interleave(2, 0)[::2]
    if name == "last stride":
        return logits, lambda part: part.transpose(-1, -2).contiguous().transpose(-1, -2)
    if name == "seq first":  # (S, B, V) memory of (B, S, V) logits
        return logits, lambda part: part.transpose(0, 1).contiguous().transpose(0, 1)
    if name == "without the last position":
        return logits, lambda part: torch.cat([part, part[:, :1]], 1)[:, :-1]
    if name == "expanded rows":
        return logits[:1].expand(logits.shape), lambda part: part[:1].expand(part.shape)
    if name == "four dimensions":
        return logits.unflatten(1, (2, 3)), lambda part: part.transpose(0, 2).contiguous().transpose(0, 2)
    raise ValueError(name)


@cases(
    2,
    layout=[
        "columns of a wider tensor", "rows of a longer tensor", "last stride", "seq first", "without the last position",
        "expanded rows", "four dimensions",
    ],
)  # fmt: skip
def layouts(ranks, layout):
    """(B, S, V) logits: values, gradients, and bits as of contiguous ones; targets and weights in other strides."""
    B, S = 4, 6
    whole, place = in_layout(layout, make_logits(B, S, V))
    targets = torch.randint(V, whole.shape[:-1], generator=torch.Generator().manual_seed(0))
    targets.view(-1)[3] = -100
    upstream = torch.linspace(-1, 1, targets.numel()).view(targets.shape)
    mine, group = columns(SPLIT, ranks.rank), ranks.group()
    wide = make_weights("random", 2 * V)
    weights, u = wide[::2], (torch.rand(*targets.shape, 2, generator=torch.Generator().manual_seed(1)) - 0.3)[..., 0]
    options = {"token_weights": u, "group": group, "label_smoothing": 0.1, "z_loss": 0.01}
    spread = torch.stack([targets, targets], -1)[..., 0]
    assert not spread.is_contiguous()
    for reduction in ("mean", "none"):
        given = upstream if reduction == "none" else 1.0
        expected = check_split(ranks, whole, targets, weights, reduction=reduction, upstream=given, **options)
        part = place(whole[..., mine])
        assert part.shape == (*targets.shape, mine.stop - mine.start)
        leaf = part.detach().requires_grad_()
        assert leaf.stride() == part.stride()
        loss = pdl_cross_entropy(leaf, spread, weights, reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(loss, leaf, given if reduction == "none" else None)
        torch.testing.assert_close(loss.detach(), expected.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, expected.gradient[..., mine], rtol=1e-5, atol=1e-7)
        ranks.everyones()


@cases(2)
def one_row_without_dimensions(ranks):
    for reduction in ("mean", "none"):
        got = check_split(ranks, make_logits(V), torch.tensor(9), reduction=reduction, return_stats=True)
        assert got.loss.shape == ()
    for shape in ((0,), (3, 0), (0, 2)):
        got = run_split(ranks, torch.zeros(*shape, V), torch.zeros(shape, dtype=torch.int64), reduction="none")
        assert got.loss.shape == shape


# ---------------------------------------------------------------------------------------------------------------------
# Modules, one rank


@cases(2)
def a_module_has_the_group_too(ranks):
    group, mine = ranks.group(), columns(SPLIT, ranks.rank)
    weights = make_weights("random", V)
    logits = make_logits(N, V)
    for table in (weights, own(weights, SPLIT, ranks.rank)):
        module = PDLCrossEntropyLoss(table, group=group, label_smoothing=0.1)
        assert "group" in module.extra_repr()
        assert module.state_dict() == {}
        direct = pdl_cross_entropy(logits[:, mine], TARGETS, table, group=group, label_smoothing=0.1)
        assert_same_bits(module(logits[:, mine], TARGETS), direct, "module and function")
        moved = module.bfloat16()(logits[:, mine].bfloat16(), TARGETS)
        direct = pdl_cross_entropy(logits[:, mine].bfloat16(), TARGETS, table, group=group, label_smoothing=0.1)
        assert_same_bits(moved, direct, "module and function in bfloat16")


@cases(2)
def a_group_of_one_rank_is_the_plain_call(ranks):
    groups = [ranks.group([rank]) for rank in range(ranks.size)]
    group = groups[ranks.rank]
    targets, weights = TARGETS, make_weights("random", V)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for reduction in ("mean", "token_mean", "sum", "none"):
            for more in ({"return_stats": True}, everything(N)):
                results = []
                for keywords in ({}, {"group": group}):
                    leaf = make_logits(N, V, dtype=dtype, seed=ranks.rank).requires_grad_()
                    found = pdl_cross_entropy(leaf, targets, weights, reduction=reduction, **keywords, **more)
                    loss, stats = found
                    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                    results.append((loss.detach(), gradient, tuple(stats)))
                ours, plain = results[1], results[0]
                rtol, atol = {torch.bfloat16: (2**-7, 1e-6), torch.float32: (2e-6, 1e-7)}.get(dtype, (1e-12, 1e-14))
                torch.testing.assert_close(ours[1], plain[1], rtol=rtol, atol=atol)
                rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (2e-6, 1e-7)
                torch.testing.assert_close(ours[0], plain[0], rtol=rtol, atol=atol)
                torch.testing.assert_close(ours[2], plain[2], rtol=rtol, atol=atol)
