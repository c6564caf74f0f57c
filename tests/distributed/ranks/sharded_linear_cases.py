"""The loss fused with the output projection, whose rows every rank has some of, against float64 on the whole."""

import torch
from helpers import make_weights
from helpers.linear import Problem, leaves, make_problem, make_token_weights, run_linear
from helpers.rank_cases import Cases
from helpers.vocabulary import (
    SPLITS,
    UNEVEN,
    V,
    assert_every_rank_raises,
    assert_same_bits,
    border_targets,
    check_split_linear,
    columns,
    everything,
    own,
)
from torch.utils.checkpoint import checkpoint

from pdl_kernels import PDLLinearCrossEntropyLoss, pdl_linear_cross_entropy

cases = Cases()
OWN = {"whole": False, "own": True}
WEIGHTS = make_weights("random", V)
N = 12


def problem_of(split, N=N, **more):
    """Targets at every border, and one in four ignored."""
    targets = border_targets(split)
    problem = make_problem(N, V=V, **more)
    return problem._replace(targets=targets.repeat(-(-N // len(targets)))[:N])


def options_for(kind, N=N):
    u = make_token_weights(N)
    return {
        "plain": {},
        "everything": everything(N) | {"token_weights": u, "chunk_size": 5, "reduction": "token_mean"},
        "none": {"reduction": "none", "upstream": torch.linspace(0, 2, N), "chunk_size": 4, "token_weights": u},
        "sum": {"reduction": "sum", "upstream": -3.0, "return_stats": True},
        "normalizer": {"normalizer": torch.tensor(7), "upstream": 0.5, "z_loss": 0.01, "chunk_size": 1},
        "not compact": {"compact": False, "chunk_size": 5, "return_stats": True},
        "compact": {"compact": True, "chunk_size": 5, "token_weights": u},
    }[kind]


KINDS = ["plain", "everything", "none", "sum", "normalizer", "not compact", "compact"]


@cases(2, kind=KINDS, weights=["none", *OWN])
def options(ranks, kind, weights):
    problem = problem_of(UNEVEN[2], bias=kind != "plain")
    table = None if weights == "none" else WEIGHTS
    check_split_linear(ranks, problem, table, own_weights=OWN.get(weights, False), **options_for(kind))


@cases(2, split=SPLITS[2], weights=OWN)
def rows_of_two(ranks, split, weights):
    check_split_linear(ranks, problem_of(split), WEIGHTS, split=split, own_weights=OWN[weights], chunk_size=5)


@cases(3, split=SPLITS[3], weights=OWN)
def rows_of_three(ranks, split, weights):
    problem = problem_of(split)
    options = options_for("everything")
    check_split_linear(ranks, problem, WEIGHTS, split=split, own_weights=OWN[weights], **options)


@cases(2, dtype=[torch.float64, torch.bfloat16, torch.float16])
def dtypes(ranks, dtype):
    problem = problem_of(UNEVEN[2], dtype=dtype)
    for own_weights in (False, True):
        check_split_linear(ranks, problem, WEIGHTS, own_weights=own_weights, chunk_size=5, return_stats=True)
    check_split_linear(ranks, problem, None, reduction="none", z_loss=0.01)
    check_split_linear(ranks, problem, None, sequence_parallel=True, label_smoothing=0.1)


@cases(2, dtype=[torch.float32, torch.float64, torch.bfloat16])
def accumulate_dtypes(ranks, dtype):
    """Half as precise, but near; for an upstream gradient other than the expected one, too."""
    problem = problem_of(UNEVEN[2], dtype=torch.bfloat16)
    exact = run_linear("eager", problem, WEIGHTS, upstream=3.0, chunk_size=5)
    mine, group = columns(UNEVEN[2], ranks.rank), ranks.group()
    local = Problem(problem.hidden, problem.lm_head_weight[mine], problem.bias[mine], problem.targets)
    for expected_upstream in (1.0, 3.0):
        options = {"accumulate_dtype": dtype, "expected_upstream": expected_upstream, "chunk_size": 5}
        for sequence_parallel in (False, True):
            given = local
            if sequence_parallel:
                given = local._replace(hidden=local.hidden.chunk(2)[ranks.rank].clone())
            got = run_linear("eager", given, WEIGHTS, upstream=3.0, group=group,
                             sequence_parallel=sequence_parallel, **options)  # fmt: skip
            hidden = exact.gradients["hidden"].chunk(2)[ranks.rank] if sequence_parallel else exact.gradients["hidden"]
            wanted = {"hidden": hidden, "lm_head_weight": exact.gradients["lm_head_weight"][mine],
                      "bias": exact.gradients["bias"][mine]}  # fmt: skip
            for name, gradient in got.gradients.items():
                assert gradient.dtype == torch.bfloat16
                scale = exact.gradients[name].abs().max()
                assert (gradient - wanted[name]).abs().max() <= 0.02 * scale, name
            ranks.everyones()


@cases(2, own_weights=[False, True])
def expected_upstream(ranks, own_weights):
    """As announced, another one, a tensor, 0."""
    group = ranks.group()
    for announced, upstream in ((4.0, 4.0), (4.0, -1.0), (torch.tensor(0.5), 0.5), (torch.tensor(0.0), 2.0), (2, 0.0)):
        check_split_linear(ranks, problem_of(UNEVEN[2]), WEIGHTS, own_weights=own_weights, group=group, chunk_size=5,
                           expected_upstream=announced, upstream=upstream)  # fmt: skip


@cases(2, needs=[(True, False, False), (False, True, False), (False, False, True), (True, True, False)])
def frozen_parameters(ranks, needs):
    for options in ({}, {"reduction": "none"}, {"sequence_parallel": True}):
        check_split_linear(ranks, problem_of(UNEVEN[2]), WEIGHTS, needs=needs, **options)


@cases(2)
def without_gradients(ranks):
    problem, group, mine = problem_of(UNEVEN[2]), ranks.group(), columns(UNEVEN[2], ranks.rank)
    expected = run_linear("eager", problem, WEIGHTS, reduction="none").loss
    hidden, head, bias = leaves(problem)
    with torch.no_grad():
        loss = pdl_linear_cross_entropy(
            hidden, head[mine], problem.targets, WEIGHTS, bias=bias[mine], group=group, reduction="none"
        )
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@cases(2, 3, reduction=["mean", "none"])
def nothing_counted(ranks, reduction):
    """Hidden states of nan, under an infinite upstream gradient too; and no row at all."""
    mine, group = columns(UNEVEN[ranks.size], ranks.rank), ranks.group()
    for rows in (6, 0):
        problem = make_problem(rows, V=V, ignored=range(rows))
        problem.hidden.fill_(torch.nan)
        for options in ({}, {"compact": False}, {"sequence_parallel": True}, {"label_smoothing": 0.1}):
            given = problem.hidden
            if options.get("sequence_parallel"):
                given = given.chunk(ranks.size)[ranks.rank] if rows else given
            local = Problem(given.clone(), problem.lm_head_weight[mine].clone(), problem.bias[mine].clone(),
                            problem.targets)  # fmt: skip
            got = run_linear("eager", local, WEIGHTS, reduction=reduction, return_stats=True, group=group,
                             upstream=-2.0, **options)  # fmt: skip
            assert (got.loss == 0).all()
            assert [float(number) for number in got.stats] == [0, 0, 0, 0]
            for name, gradient in got.gradients.items():
                assert (gradient == 0).all(), (name, options)
            ranks.everyones()


@cases(2, shares=["alike", "sequence"])
def rows_that_do_not_count_stay_at_0(ranks, shares):
    """Whatever their hidden states and the upstream gradient are, as in one process."""
    mine, group = columns(UNEVEN[2], ranks.rank), ranks.group()
    problem = problem_of(UNEVEN[2])
    silent = problem.targets == -100
    problem.hidden[silent] = torch.nan
    for upstream in (1.0, torch.inf):
        for compact in (None, False):
            given = problem.hidden.chunk(2)[ranks.rank].clone() if shares == "sequence" else problem.hidden
            local = Problem(given, problem.lm_head_weight[mine], problem.bias[mine], problem.targets)
            got = run_linear("eager", local, WEIGHTS, upstream=upstream, compact=compact, group=group,
                             sequence_parallel=shares == "sequence")  # fmt: skip
            rows = silent.chunk(2)[ranks.rank] if shares == "sequence" else silent
            assert (got.gradients["hidden"][rows] == 0).all(), (upstream, compact)
            assert got.gradients["lm_head_weight"].isfinite().all() == (upstream == 1.0)
            assert got.loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Sequence parallelism


@cases(2, 3, kind=["plain", "everything", "none", "not compact", "compact"], weights=OWN)
def sequence_parallel(ranks, kind, weights):
    problem = problem_of(UNEVEN[ranks.size])
    options = options_for(kind)
    check_split_linear(ranks, problem, WEIGHTS, sequence_parallel=True, own_weights=OWN[weights], **options)


@cases(2)
def sequence_parallel_with_more_dimensions(ranks):
    """(S / ranks, B, H), as Megatron lays it out; strided shares; int32 targets."""
    problem = make_problem(4, 3, V=V, ignored=(5,))
    check_split_linear(ranks, problem, WEIGHTS, sequence_parallel=True, return_stats=True, chunk_size=5)
    wide = torch.cat([problem.hidden, problem.hidden], -1)[..., : problem.hidden.shape[-1]]
    check_split_linear(ranks, problem._replace(hidden=wide, targets=problem.targets.int()), WEIGHTS, reduction="none",
                       sequence_parallel=True)  # fmt: skip
    transposed = problem.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    check_split_linear(ranks, problem._replace(hidden=transposed), WEIGHTS)


@cases(2, rows=[1, 5])
def sequence_parallel_refuses_odd_numbers(ranks, rows):
    """Of rows that do not split evenly, on every rank, in words, without waiting."""
    group = ranks.group()
    problem = make_problem(rows, V=V)
    mine = columns(UNEVEN[2], ranks.rank)
    share = torch.tensor_split(problem.hidden, 2)[ranks.rank]
    assert_every_rank_raises(
        ranks, ValueError,
        lambda: pdl_linear_cross_entropy(
            share, problem.lm_head_weight[mine], problem.targets, group=group, sequence_parallel=True
        ),
        f"targets have shape ({rows},)", "those of all ranks", same=False,
    )  # fmt: skip


@cases(2)
def sequence_parallel_refused(ranks):
    group, mine = ranks.group(), columns(UNEVEN[2], ranks.rank)
    problem = make_problem(4, V=V)
    head = problem.lm_head_weight[mine]
    for call, word in (
        (lambda: pdl_linear_cross_entropy(problem.hidden, head, problem.targets, sequence_parallel=True), "group=None"),
        (
            lambda: pdl_linear_cross_entropy(
                problem.hidden[0], head, problem.targets[0], sequence_parallel=True, group=group
            ),
            "accepted is (S / ranks, ..., H)",
        ),
    ):
        assert_every_rank_raises(ranks, ValueError, call, word)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, backward, other ways to run


@cases(2, reduction=["mean", "none"])
def row_sampling(ranks, reduction):
    """The same rows on every rank, those that one process keeps: so the gradients are its own, but for rounding."""
    problem, group = make_problem(40, V=V, ignored=(3,)), ranks.group()
    mine = columns(UNEVEN[2], ranks.rank)
    local = Problem(problem.hidden, problem.lm_head_weight[mine], problem.bias[mine], problem.targets)
    upstream = torch.linspace(-1, 1, 40) if reduction == "none" else 1.0
    for own_weights in (False, True):
        kept = []
        for seed in (5, torch.tensor(5), 6):
            options = {"row_sampling": 0.5, "seed": seed, "reduction": reduction, "upstream": upstream, "chunk_size": 7}
            table = own(WEIGHTS, UNEVEN[2], ranks.rank) if own_weights else WEIGHTS
            got = run_linear("eager", local, table, group=group, **options)
            single = run_linear("eager", problem, WEIGHTS, **options)
            torch.testing.assert_close(got.loss, single.loss, rtol=1e-5, atol=1e-6)
            for name, cut in (("hidden", slice(None)), ("lm_head_weight", mine), ("bias", mine)):
                torch.testing.assert_close(got.gradients[name], single.gradients[name][cut], rtol=1e-4, atol=1e-6)
            kept.append(got.gradients["hidden"].abs().sum(-1) > 0)
            assert 5 < kept[-1].sum() < 35
        assert torch.equal(kept[0], kept[1])
        assert not torch.equal(kept[0], kept[2])
        assert_same_bits(ranks.everyones(kept)[1 - ranks.rank], kept, "the rows kept on the other rank and here")
    assert_every_rank_raises(
        ranks, ValueError,
        lambda: pdl_linear_cross_entropy(*local[:2], local.targets, row_sampling=0.5, group=group),
        "row_sampling with a group and seed=None", "the same on every rank",
    )  # fmt: skip


@cases(2, share=["whole", "sequence"], compact=[None, False])
def backward_again(ranks, share, compact):
    """The same gradients once more, and for another upstream gradient; whatever became of the first ones."""
    problem, group, mine = problem_of(UNEVEN[2]), ranks.group(), columns(UNEVEN[2], ranks.rank)
    for reduction in ("mean", "none"):
        given = problem.hidden.chunk(2)[ranks.rank].clone() if share == "sequence" else problem.hidden
        tensors = leaves(Problem(given, problem.lm_head_weight[mine], problem.bias[mine], problem.targets))
        loss = pdl_linear_cross_entropy(
            *tensors[:2], problem.targets, own(WEIGHTS, UNEVEN[2], ranks.rank), bias=tensors[2], group=group,
            reduction=reduction, chunk_size=5, compact=compact, sequence_parallel=share == "sequence",
        ).sum()  # fmt: skip
        first = torch.autograd.grad(loss, tensors, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        for gradient in first:
            gradient.fill_(torch.nan)
        second = torch.autograd.grad(loss, tensors, retain_graph=True)
        third = torch.autograd.grad(loss, tensors, torch.tensor(-2.0))
        for one, two, three in zip(kept, second, third, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(three, -2 * one, rtol=1e-6, atol=1e-7)
        ranks.everyones()


@cases(2)
def second_derivatives_raise(ranks):
    problem, mine = problem_of(UNEVEN[2]), columns(UNEVEN[2], ranks.rank)
    tensors = leaves(Problem(problem.hidden, problem.lm_head_weight[mine], None, problem.targets))
    loss = pdl_linear_cross_entropy(*tensors[:2], problem.targets, group=ranks.group())
    first = torch.autograd.grad(loss, tensors[0], create_graph=True)[0]
    assert_every_rank_raises(ranks, RuntimeError, lambda: first.sum().backward(), "cannot be differentiated twice")


@cases(2, reentrant=[False, True], share=["whole", "sequence"])
def checkpoints(ranks, reentrant, share):
    problem, group, mine = problem_of(UNEVEN[2]), ranks.group(), columns(UNEVEN[2], ranks.rank)
    single = run_linear("eager", problem, WEIGHTS)
    half = share == "sequence"
    given = problem.hidden.chunk(2)[ranks.rank].clone() if half else problem.hidden
    tensors = leaves(Problem(given, problem.lm_head_weight[mine], problem.bias[mine], problem.targets))

    def loss_of(hidden, head, bias):
        return pdl_linear_cross_entropy(
            hidden, head, problem.targets, WEIGHTS, bias=bias, group=group, chunk_size=5, sequence_parallel=half
        )

    checkpoint(loss_of, *tensors, use_reentrant=reentrant).backward()
    hidden = single.gradients["hidden"].chunk(2)[ranks.rank] if half else single.gradients["hidden"]
    wanted = hidden, single.gradients["lm_head_weight"][mine], single.gradients["bias"][mine]
    for tensor, gradient in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-6)


@cases(2, share=["whole", "sequence"])
def autocast(ranks, share):
    """Products in bfloat16, gradients in the parameters' own float32, as one process has them."""
    problem, group, mine = problem_of(UNEVEN[2]), ranks.group(), columns(UNEVEN[2], ranks.rank)
    half = share == "sequence"
    given = problem.hidden.chunk(2)[ranks.rank].clone() if half else problem.hidden
    with torch.autocast("cpu", torch.bfloat16):
        local = Problem(given, problem.lm_head_weight[mine], problem.bias[mine], problem.targets)
        got = run_linear("eager", local, WEIGHTS, group=group, sequence_parallel=half, chunk_size=5)
        single = run_linear("eager", problem, WEIGHTS, chunk_size=5)
    torch.testing.assert_close(got.loss, single.loss, rtol=1e-3, atol=0)
    hidden = single.gradients["hidden"].chunk(2)[ranks.rank] if half else single.gradients["hidden"]
    wanted = {"hidden": hidden, **{name: single.gradients[name][mine] for name in ("lm_head_weight", "bias")}}
    for name, gradient in got.gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted[name]).abs().max() <= 0.02 * single.gradients[name].abs().max(), name


@cases(2)
def a_module(ranks):
    problem, group, mine = problem_of(UNEVEN[2]), ranks.group(), columns(UNEVEN[2], ranks.rank)
    head, bias = problem.lm_head_weight[mine], problem.bias[mine]
    module = PDLLinearCrossEntropyLoss(WEIGHTS, group=group, chunk_size=5)
    direct = pdl_linear_cross_entropy(
        problem.hidden, head, problem.targets, WEIGHTS, bias=bias, group=group, chunk_size=5
    )
    assert_same_bits(module(problem.hidden, head, problem.targets, bias=bias), direct, "module and function")


@cases(2)
def a_group_of_one_rank_is_the_plain_call(ranks):
    group = [ranks.group([rank]) for rank in range(ranks.size)][ranks.rank]
    problem = problem_of((6, 6, 5))
    for kind in KINDS:
        options = options_for(kind)
        plain = run_linear("eager", problem, WEIGHTS, **options)
        for sequence_parallel in (False, True):
            got = run_linear("eager", problem, WEIGHTS, group=group, sequence_parallel=sequence_parallel, **options)
            torch.testing.assert_close(got.loss, plain.loss, rtol=1e-6, atol=1e-7)
            for name, gradient in got.gradients.items():
                torch.testing.assert_close(gradient, plain.gradients[name], rtol=1e-5, atol=1e-6)


@cases(3)
def many_rows_in_chunks_of_their_own_size(ranks):
    """No chunk_size: ranks with other numbers of columns, or none, take the same chunks."""
    wide, split = 70_000, (60_000, 0, 10_000)
    problem = make_problem(300, V=wide, H=2, bias=False)
    mine, group = columns(split, ranks.rank), ranks.group()
    local = Problem(problem.hidden, problem.lm_head_weight[mine].clone(), None, problem.targets)
    got = run_linear("eager", local, group=group)
    expected = run_linear("eager", problem)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.gradients["hidden"], expected.gradients["hidden"], rtol=1e-4, atol=1e-7)
