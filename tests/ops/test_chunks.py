"""How the fused loss takes the tokens in chunks, and which of them it leaves out of the products."""

import pytest
import torch
from helpers import make_weights
from helpers.linear import (
    Problem,
    Products,
    V,
    assert_equal,
    assert_same,
    check_linear,
    make_problem,
    make_token_weights,
    rows_for,
    run_linear,
)

from pdl_kernels.ops import products
from pdl_kernels.ops.chunks import CHUNK_BYTES, CHUNK_ROWS, plan_chunk

NAN, INF = torch.nan, torch.inf


@pytest.mark.lesson("chunking changes the result")
@pytest.mark.lesson("losses of a split batch differ from the whole")
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
def test_chunk_size_changes_rounding_only(backend, reduction, device):
    """A ragged last chunk, one row at a time, everything at once, and more than there is."""
    rows = rows_for(backend, 20)
    problem = make_problem(rows, device=device, ignored=(4,))
    weights = make_weights("random", V, device)
    upstream = torch.linspace(-1, 1, rows) if reduction == "none" else 1.0
    options = {"reduction": reduction, "token_weights": make_token_weights(rows, device), "return_stats": True}
    whole = check_linear(backend, problem, weights, upstream=upstream, chunk_size=None, **options)
    for chunk_size in (1, 7, 13, rows, rows + 1) if rows == 20 else (1, 2, rows + 1):
        got = run_linear(backend, problem, weights, upstream=upstream, chunk_size=chunk_size, **options)
        assert_same(got, whole)
        torch.testing.assert_close(got.stats.nll, whole.stats.nll, rtol=2e-6, atol=0)
        assert got.stats.accuracy == whole.stats.accuracy


@pytest.mark.parametrize("chunk_size", [1, 7, 13, 20, 21])
def test_as_many_products_as_chunks(chunk_size):
    """19 rows contribute; each chunk is multiplied once, and none has more rows than asked for."""
    problem = make_problem(20, ignored=(4,))
    with Products() as done:
        run_linear("eager", problem, chunk_size=chunk_size)
    forward = [m for m, k, n in done.shapes if (k, n) == (problem.hidden.shape[-1], V)]
    assert forward == [min(chunk_size, 19 - start) for start in range(0, 19, chunk_size)]
    assert done.hidden_rows == done.weight_rows == 19


@pytest.mark.lesson("all tokens ignored")
@pytest.mark.parametrize("how", ["ignored", "token weights 0", "class weights 0"])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("compact", [None, False])
def test_nothing_to_average(backend, how, reduction, compact, device):
    """Loss 0 and still attached, gradients exactly 0, even with nan in the hidden states."""
    problem = make_problem(3, device=device)
    problem.hidden.fill_(NAN)
    weights, options = None, {}
    if how == "ignored":
        problem.targets.fill_(-100)
    elif how == "token weights 0":
        options["token_weights"] = torch.zeros(3, device=device)
    else:
        weights = torch.zeros(V, device=device)
    got = run_linear(backend, problem, weights, reduction=reduction, compact=compact, chunk_size=2, **options)
    assert got.loss.count_nonzero() == 0
    assert set(got.gradients) == {"hidden", "lm_head_weight", "bias"}
    for name, gradient in got.gradients.items():
        assert gradient.shape == getattr(problem, name).shape
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("compact", [None, True, False])
def test_a_chunk_wholly_ignored(backend, compact, device):
    for ignored in ((0, 1), (2, 3), (4, 5)):
        problem = make_problem(6, device=device, ignored=ignored)
        check_linear(backend, problem, chunk_size=2, compact=compact)


def test_plan_chunk_keeps_its_bounds():
    for rows in (1, 127, 128, 129, 1000, 2048, 8192, 100_000):
        for hidden_size in (16, 512, 4096, 8192):
            for vocab_size in (10, 32_000, 128_256, 262_144, 10**6):
                for itemsize in (2, 4, 8):
                    step = plan_chunk(rows, hidden_size, vocab_size, itemsize)
                    case = (rows, hidden_size, vocab_size, itemsize, step)
                    limit = max(CHUNK_BYTES, vocab_size * hidden_size)
                    assert 1 <= step <= max(rows, CHUNK_ROWS), case
                    assert step * vocab_size * itemsize <= limit or step <= CHUNK_ROWS, case


def test_plan_chunk_of_no_rows_is_a_chunk():
    assert plan_chunk(0, 512, 32_000, 4) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Rows that contribute nothing

ROWS = 7
DEAD = [0, 4, 6]
LIVE = [1, 2, 3, 5]
HOW = ["ignored", "token weight 0", "class weight 0"]


def with_dead_rows(how, poison, device):
    """(problem, weights, options) with dead rows, and the problem and options without these rows."""
    problem = make_problem(ROWS, device=device)
    problem.targets[problem.targets == 3] = 4
    weights = make_weights("random", V, device) + 0.1
    u = torch.linspace(0.5, 2.0, ROWS, device=device)
    live = Problem(problem.hidden[LIVE].clone(), *problem[1:3], problem.targets[LIVE].clone())
    live_options = {"token_weights": u[LIVE].clone()}
    problem.hidden[DEAD] = poison
    if how == "ignored":
        problem.targets[DEAD] = -100
        u[DEAD] = NAN
    elif how == "token weight 0":
        u[DEAD] = 0
    else:
        weights[3] = 0
        problem.targets[DEAD] = 3
    return problem, weights, {"token_weights": u}, live, live_options


@pytest.mark.lesson("ignored rows are read")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [None, True, False])
def test_dead_rows_leave_no_trace(how, poison, reduction, compact, device):
    """As without these rows; their own gradients are exactly 0."""
    check_dead_rows("eager", how, poison, reduction, compact, device)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("compact", [None, False])
def test_dead_rows_leave_no_trace_in_triton(how, compact, device):
    check_dead_rows("triton", how, NAN, "mean", compact, device)


def check_dead_rows(backend, how, poison, reduction, compact, device):
    problem, weights, options, live, live_options = with_dead_rows(how, poison, device)
    expected = run_linear(backend, live, weights, reduction=reduction, compact=True, **live_options)
    got = run_linear(backend, problem, weights, reduction=reduction, compact=compact, **options)
    hidden = got.gradients["hidden"]
    assert hidden[DEAD].count_nonzero() == 0
    if reduction == "none":
        assert got.loss[DEAD].count_nonzero() == 0
        got = got._replace(loss=got.loss[LIVE])
    got.gradients["hidden"] = hidden[LIVE]
    if compact is not False and reduction == "none":
        assert_equal(got, expected)
    else:  # the denominator and the loss are sums over all rows, in another order
        assert_same(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [None, True, False])
def test_class_weight_0_with_statistics(backend, reduction, compact, device):
    """Statistics need the row's logits, and may be nan with them; the gradients need nothing of the row."""
    problem, weights, options, live, live_options = with_dead_rows("class weight 0", NAN, device)
    expected = run_linear(backend, live, weights, reduction=reduction, **live_options)
    got = run_linear(backend, problem, weights, reduction=reduction, compact=compact, return_stats=True, **options)
    assert got.loss.isfinite().all()
    assert got.gradients["hidden"][DEAD].count_nonzero() == 0
    for name in ("lm_head_weight", "bias"):
        torch.testing.assert_close(got.gradients[name], expected.gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [None, True, False])
def test_dead_rows_are_not_multiplied(how, reduction, compact, device):
    problem, weights, options, *_ = with_dead_rows(how, 0.0, device)
    rows = ROWS if compact is False else len(LIVE)
    with Products() as done:
        run_linear("eager", problem, weights, reduction=reduction, compact=compact, chunk_size=3, **options)
    assert done.logit_rows == (2 * rows if reduction == "none" else rows)
    assert done.weight_rows == done.hidden_rows == rows


def test_statistics_cost_no_backward_product(device):
    """Rows of class weight 0 are in the statistics, and in no gradient."""
    problem, weights, options, *_ = with_dead_rows("class weight 0", 0.5, device)
    with Products() as done:
        check_linear("eager", problem, weights, return_stats=True, **options)
    with Products() as done:
        run_linear("eager", problem, weights, return_stats=True, **options)
    assert done.logit_rows == ROWS
    assert done.weight_rows == done.hidden_rows == len(LIVE)


@pytest.mark.parametrize("option", ["return_stats", "label_smoothing", "z_loss"])
@pytest.mark.parametrize("compact", [None, False])
def test_class_weight_0_counts_where_something_else_needs_the_row(backend, option, compact, device):
    value = True if option == "return_stats" else 0.1
    problem, weights, options, *_ = with_dead_rows("class weight 0", 0.5, device)
    check_linear(backend, problem, weights, compact=compact, **{option: value}, **options)


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compact_changes_rounding_only(reduction, dtype, device):
    problem = make_problem(13, dtype=dtype, device=device, ignored=(0, 1, 6, 12))
    options = {"reduction": reduction, "token_weights": make_token_weights(13, device), "return_stats": True}
    packed, unpacked, default = (
        run_linear("eager", problem, chunk_size=4, compact=c, **options) for c in (True, False, None)
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_same(packed, unpacked, rtol=tolerance, atol=tolerance / 10)
    assert_equal(packed, default)
    assert packed.stats.token_count == unpacked.stats.token_count == 8


# ---------------------------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float64), (torch.float32,) * 2],
    ids=["bf16 in f32", "f16 in f64", "f32"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(20, 3, 5), (3, 20, 5), (16, 16, 1), (17, 17, 2), (1, 33, 4), (33, 1, 4), (4, 0, 3)]
)
def test_add_product(dtypes, first, m, k, n, monkeypatch):
    """Shapes that end inside, at and beyond a block; what is in `total` must not matter the first time."""
    monkeypatch.setattr(products, "BLOCK", 8)
    narrow, wide = dtypes
    left, right = torch.randn(m, k).to(narrow), torch.randn(k, n).to(narrow)
    total = torch.full((m, n), NAN, dtype=wide) if first else torch.randn(m, n).to(wide)
    expected = left.double() @ right.double() + (0 if first else total.double())
    products.add_product(total, left, right, first=first)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
