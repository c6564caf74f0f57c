"""Split columns where tensors are traced, where they hold no data, in Triton's interpreter; and gradcheck."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import make_logits, make_weights, quick_interpreter, run_reference
from helpers.linear import make_problem, run_linear_reference
from helpers.rank_cases import Cases
from helpers.vocabulary import (
    UNEVEN,
    V,
    assert_every_rank_raises,
    border_targets,
    check_split,
    check_split_linear,
    columns,
    everything,
    own,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy

cases = Cases()
SPLIT = UNEVEN[2]
WEIGHTS = make_weights("random", V)
OWN = {"whole": False, "own": True}


def table_of(ranks, weights):
    return own(WEIGHTS, SPLIT, ranks.rank) if weights == "own" else WEIGHTS if weights == "whole" else None


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@cases(2, weights=["own"])
def compiled(ranks, weights):
    """One graph for any number of rows, with statistics, smoothing and a denominator; in place without effect."""
    torch._dynamo.reset()
    group, mine, table = ranks.group(), columns(SPLIT, ranks.rank), table_of(ranks, weights)

    def loss_of(logits, targets, n):
        loss, stats = pdl_cross_entropy(
            logits * 1, targets, table, group=group, normalizer=n, label_smoothing=0.1, return_stats=True, inplace=True
        )
        rows = pdl_cross_entropy(logits * 1, targets, table, group=group, reduction="none", z_loss=0.01)
        return loss + rows.sum(), stats

    fast = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8):
        whole = make_logits(rows, V, seed=rows)
        targets = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(rows))
        targets[1] = -100
        leaf = whole[:, mine].clone().requires_grad_()
        loss, stats = fast(leaf, targets, torch.tensor(float(rows)))
        loss.backward()
        reference = WEIGHTS if weights != "none" else None
        one = run_reference(whole, targets, reference, normalizer=float(rows), label_smoothing=0.1)
        other = run_reference(whole, targets, reference, reduction="none", z_loss=0.01)
        torch.testing.assert_close(loss.detach().double(), one.loss + other.loss.sum(), rtol=1e-6, atol=0)
        expected = (one.gradient + other.gradient)[:, mine]
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(stats.nll.double(), one.stats.nll if one.stats else stats.nll.double())
        assert stats.token_count == rows - 1


@cases(2)
def compiled_linear(ranks):
    torch._dynamo.reset()
    group, mine = ranks.group(), columns(SPLIT, ranks.rank)

    def loss_of(hidden, head, bias, targets):
        options = {"bias": bias, "group": group, "chunk_size": 3}
        loss = pdl_linear_cross_entropy(hidden, head, targets, WEIGHTS, label_smoothing=0.1, **options)
        rows = pdl_linear_cross_entropy(hidden, head, targets, WEIGHTS, reduction="none", **options)
        return 2 * loss + rows.sum()

    fast = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8):
        problem = make_problem(rows, V=V, seed=rows, ignored=(1,))
        leaves = [problem.hidden, problem.lm_head_weight[mine], problem.bias[mine]]
        leaves = [tensor.clone().requires_grad_() for tensor in leaves]
        loss = fast(*leaves, problem.targets)
        loss.backward()
        one = run_linear_reference(problem, WEIGHTS, label_smoothing=0.1)
        other = run_linear_reference(problem, WEIGHTS, reduction="none")
        torch.testing.assert_close(loss.detach().double(), 2 * one.loss + other.loss.sum(), rtol=1e-6, atol=0)
        for leaf, name, cut in zip(leaves, one.gradients, (slice(None), mine, mine), strict=True):
            expected = (2 * one.gradients[name] + other.gradients[name])[cut]
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs, and tensors without data


@cases(2)
def make_fx_graphs(ranks):
    """Recorded with the values of one call, right for those of another."""
    group, mine = ranks.group(), columns(SPLIT, ranks.rank)
    targets = border_targets(SPLIT)
    N = len(targets)

    def gradient_of(logits, table, n):
        leaf = logits.detach().requires_grad_()
        loss = pdl_cross_entropy(leaf, targets, table, group=group, normalizer=n, softcap=9.0)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    n = torch.tensor(3.0)
    for table in (WEIGHTS, own(WEIGHTS, SPLIT, ranks.rank)):
        graph = make_fx(gradient_of)(make_logits(N, V, seed=1)[:, mine].contiguous(), table, n)
        names = [str(node.target) for node in graph.graph.nodes]
        assert sum("sharded_cross_entropy" in name for name in names) == 2, names
        whole = make_logits(N, V, seed=2)
        loss, gradient = graph(whole[:, mine].contiguous(), table, n)
        expected = run_reference(whole, targets, WEIGHTS, normalizer=3.0, softcap=9.0)
        torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), expected.gradient[:, mine], rtol=1e-5, atol=1e-7)


@cases(2)
def without_data(ranks):
    """Shapes and dtypes as with data, and nothing is sent: one rank alone may do it."""
    group, mine = ranks.group(), columns(SPLIT, ranks.rank)
    width = mine.stop - mine.start
    if ranks.rank == 1:
        with FakeTensorMode():
            for reduction in ("mean", "none"):
                for dtype in (torch.float32, torch.bfloat16, torch.float64):
                    leaf = torch.randn(2, 3, width, dtype=dtype, requires_grad=True)
                    targets = torch.randint(V, (2, 3))
                    loss, stats = pdl_cross_entropy(
                        leaf, targets, torch.ones(V), reduction=reduction, group=group, return_stats=True
                    )
                    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                    assert loss.shape == (() if reduction == "mean" else (2, 3))
                    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                    assert (gradient.shape, gradient.dtype) == (leaf.shape, dtype)
                    assert stats.nll.shape == ()
            for sequence_parallel in (False, True):
                hidden = torch.randn(2, 3, 8, requires_grad=True)
                head = torch.randn(width, 8, requires_grad=True)
                targets = torch.randint(V, (4 if sequence_parallel else 2, 3))
                loss = pdl_linear_cross_entropy(
                    hidden, head, targets, torch.ones(V), group=group, sequence_parallel=sequence_parallel
                )
                found = torch.autograd.grad(loss, (hidden, head))
                assert [tensor.shape for tensor in found] == [hidden.shape, head.shape]
        meta = torch.empty(4, width, device="meta", requires_grad=True)
        loss = pdl_cross_entropy(meta, torch.empty(4, dtype=torch.int64, device="meta"), group=group)
        assert torch.autograd.grad(loss, meta)[0].shape == meta.shape
    check_split(ranks, make_logits(3, V), torch.tensor([0, 10, 16]), torch.ones(V), group=group)


# ---------------------------------------------------------------------------------------------------------------------
# gradcheck: the whole logits are on every rank and all ranks nudge the same element at the same time, so that the
# numbers of collectives stay equal. What the ranks' backward passes give of it is added up.


class _Replicated(torch.autograd.Function):
    """The identity on what every rank has; its gradient is the sum of what the ranks' parts say."""

    @staticmethod
    def forward(ctx, whole, group):
        ctx.group = group
        return whole.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


@cases(3, weights=["none", *OWN])
def gradcheck(ranks, weights):
    split = (2, 1, 2)
    mine, group = columns(split, ranks.rank), ranks.group()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([0, -100, 4, 2])
    whole = torch.rand(5, dtype=torch.float64, generator=generator) + 0.1
    table = {"none": None, "whole": whole, "own": own(whole, split, ranks.rank)}[weights]
    u = torch.tensor([1.0, 2.0, -0.5, 3.0])
    for options in ({"reduction": "none"}, everything(4) | {"token_weights": u, "return_stats": False}):
        assert torch.autograd.gradcheck(
            lambda z, o=options: pdl_cross_entropy(
                _Replicated.apply(z, group)[:, mine], targets, table, group=group, **o
            ),
            logits,
            atol=1e-7,
            rtol=1e-5,
        )


@cases(2, weights=["own"])
def gradcheck_linear(ranks, weights):
    split = (2, 3)
    mine, group = columns(split, ranks.rank), ranks.group()
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((4, 2), (5, 2), (5,))
    )
    targets = torch.tensor([0, -100, 4, 2])
    whole = torch.rand(5, dtype=torch.float64, generator=generator) + 0.1
    table = {"none": None, "whole": whole, "own": own(whole, split, ranks.rank)}[weights]

    def loss_of(hidden, head, bias, **options):
        parts = [_Replicated.apply(tensor, group)[mine] for tensor in (head, bias)]
        return pdl_linear_cross_entropy(
            hidden, parts[0], targets, table, bias=parts[1], group=group, chunk_size=2, **options
        )

    for options in ({"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.1}, {"reduction": "none"}):
        assert torch.autograd.gradcheck(
            lambda *tensors, o=options: loss_of(*tensors, **o), (hidden, head, bias), atol=1e-7, rtol=1e-5
        )


# ---------------------------------------------------------------------------------------------------------------------
# Triton's interpreter, which is slow: few rows


@cases(2, weights=["none", "whole"])
@cases(3, weights=["own"])
def triton(ranks, weights):
    quick_interpreter.speed_up()
    split = {2: (9, 8), 3: (7, 0, 10)}[ranks.size]
    targets = torch.tensor([0, -100, 16, 8])
    logits = make_logits(4, V)
    logits[1] = torch.nan
    clean = logits.nan_to_num()
    keywords = {"split": split, "own_weights": OWN.get(weights, False), "backend": "triton", "given": logits}
    table = None if weights == "none" else WEIGHTS + 0.1
    check_split(ranks, clean, targets, table, return_stats=True, upstream=-2.0, **keywords)
    upstream = torch.tensor([0.0, 1.0, 2.0, -1.0])
    check_split(ranks, clean, targets, table, reduction="none", upstream=upstream, **keywords)
    u = torch.tensor([1.0, 1.0, -0.5, 2.0])
    check_split(
        ranks, clean, targets, table, **keywords, **everything(4) | {"token_weights": u, "label_smoothing": 0.2}
    )
    # A rank without columns has no maximum that could hide those of the others.
    options = {"return_stats": True, "given": logits - 512}
    check_split(ranks, clean - 512, targets, table, **keywords | options)


@cases(2, dtype=[torch.bfloat16, torch.float16])
def triton_in_half_precision(ranks, dtype):
    quick_interpreter.speed_up()
    logits, targets = make_logits(3, V, dtype=dtype), torch.tensor([0, 16, 9])
    check_split(ranks, logits, targets, WEIGHTS + 0.1, split=(9, 8), backend="triton", own_weights=True)


@cases(2)
def triton_extreme_rows(ranks):
    quick_interpreter.speed_up()
    targets = torch.tensor([0, 7, 3])
    logits = make_logits(3, V)
    logits[:, 9:] = -torch.inf  # all of the second rank
    logits[2, :9] = torch.finfo(torch.float32).min
    keywords = {"split": (9, 8), "backend": "triton", "return_stats": True}
    check_split(ranks, logits, targets, **keywords)
    padded = torch.where(torch.arange(V) < 9, 1.5, 0.0)
    check_split(ranks, logits, targets, padded, label_smoothing=0.1, **keywords)


@cases(2)
def triton_in_place_is_seen_by_whoever_saved_the_logits(ranks):
    """Kernels write without autograd's knowledge, so that it has to be told."""
    quick_interpreter.speed_up()
    leaf = make_logits(2, V)[:, columns(SPLIT, ranks.rank)].clone().requires_grad_()
    logits = leaf.exp()  # which saves its result
    loss = pdl_cross_entropy(logits, torch.tensor([0, 16]), group=ranks.group(), backend="triton", inplace=True)
    assert_every_rank_raises(ranks, RuntimeError, loss.backward, "modified by an inplace operation", same=False)


@cases(2)
def triton_linear(ranks):
    quick_interpreter.speed_up()
    problem = make_problem(4, V=V, ignored=(1,))
    for own_weights in (False, True):
        check_split_linear(ranks, problem, WEIGHTS, own_weights=own_weights, backend="triton", chunk_size=3,
                           label_smoothing=0.1)  # fmt: skip
    check_split_linear(ranks, problem, None, backend="triton", reduction="none")
    assert F.linear(problem.hidden, problem.lm_head_weight).shape == (4, V)
