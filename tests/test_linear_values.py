"""Loss, gradients and statistics of the loss fused with the projection, against the float64 reference."""

import pytest
import torch
from helpers import INTERPRETED, make_weights
from linear_helpers import (
    Problem,
    Recorder,
    assert_equal,
    assert_same,
    check_linear,
    make_problem,
    run_linear,
    run_reference,
    run_torch,
)

from pdl_kernels import PDLLinearCrossEntropyLoss, pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.ops import products
from pdl_kernels.ops.linear_chunks import CHUNK_BYTES, CHUNK_ROWS, plan_chunk

N, H, V = 13, 8, 37
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
NAN, INF = torch.nan, torch.inf
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 6.0, "logit_scale": 0.7, "return_stats": True}


def signed_token_weights(device, rows=N):
    generator = torch.Generator().manual_seed(11)
    u = torch.randn(rows, generator=generator)
    u[3] = 0
    return u.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Every option, every dtype

CASES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "token_mean": {"reduction": "token_mean", "weights": "random"},
    "none": {"reduction": "none", "weights": "random"},
    "weights": {"weights": "random"},
    "weights over fourteen orders of magnitude": {"weights": "power_law"},
    "signed token weights": {"token_weights": True, "weights": "random"},
    "normalizer": {"normalizer": 5, "weights": "random"},
    "normalizer in a tensor": {"normalizer": torch.tensor(7.5, dtype=torch.float64), "token_weights": True},
    "label smoothing": {"label_smoothing": 0.2, "weights": "random"},
    "z_loss": {"z_loss": 0.05, "weights": "random"},
    "z_loss in a sum": {"z_loss": 0.05, "reduction": "sum", "token_weights": True},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 0.5},
    "statistics": {"return_stats": True, "weights": "random"},
    "everything": {**EVERYTHING, "weights": "random", "token_weights": True},
    "everything, one loss per token": {**EVERYTHING, "weights": "random", "token_weights": True, "reduction": "none"},
}


def case_options(name, device):
    options = dict(CASES[name])
    weights = make_weights(options.pop("weights", None), V, device)
    if options.get("token_weights"):
        options["token_weights"] = signed_token_weights(device)
    return weights, options


@pytest.mark.lesson("tests that compare a value with itself")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(backend, name, dtype, device):
    """No worse than F.linear and F.cross_entropy in the same dtype, with every third target ignored."""
    problem = make_problem(N, H=H, V=V, dtype=dtype, device=device, ignored=(1, 4, 7))
    weights, options = case_options(name, device)
    if options.get("reduction") == "none":
        generator = torch.Generator().manual_seed(17)
        options["upstream"] = torch.randn(N, generator=generator)
    check_linear(backend, problem, weights, chunk_size=5, **options)


@pytest.mark.parametrize("name", ["plain", "none", "everything", "everything, one loss per token"])
def test_float64(name, device):
    problem = make_problem(N, H=H, V=V, dtype=torch.float64, device=device, ignored=(1,))
    weights, options = case_options(name, device)
    got = check_linear("eager", problem, weights, chunk_size=4, **options)
    assert got.loss.dtype == torch.float64


@pytest.mark.parametrize("ignore_index", [-100, 5, 10**12, -1])
def test_ignore_index_inside_and_outside_the_vocabulary(backend, ignore_index, device):
    problem = make_problem(N, H=H, V=V, device=device, ignored=(0, 5, 12), ignore_index=ignore_index)
    got = check_linear(backend, problem, ignore_index=ignore_index, return_stats=True, chunk_size=4)
    assert got.stats.token_count == (problem.targets != ignore_index).sum() <= N - 3
    assert got.gradients["hidden"][problem.targets == ignore_index].count_nonzero() == 0


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_as_the_loss_on_logits(backend, bias, device):
    """In float32, where the logits are the same numbers up to rounding."""
    problem = make_problem(N, H=H, V=V, device=device, bias=bias, ignored=(2,))
    weights = make_weights("random", V, device)
    logits = torch.nn.functional.linear(*problem[:3])
    loss, stats = pdl_cross_entropy(logits, problem.targets, weights, backend=backend, return_stats=True)
    got = run_linear(backend, problem, weights, return_stats=True)
    torch.testing.assert_close(got.loss, loss, rtol=2e-6, atol=0)
    for ours, theirs in zip(got.stats, stats, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_padded_vocabulary_through_the_bias(backend, device):
    """A bias of -inf takes classes out; their weight gets a gradient of exactly 0."""
    problem = make_problem(N, H=H, V=V, device=device)
    problem.targets.remainder_(V - 4)
    problem.bias[-4:] = -INF
    got = run_linear(backend, problem, chunk_size=5)
    expected = run_reference(problem)
    torch.testing.assert_close(got.loss.double().cpu(), expected.loss, rtol=2e-6, atol=0)
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient.double().cpu(), expected.gradients[name], rtol=1e-5, atol=1e-7)
    assert got.gradients["lm_head_weight"][-4:].count_nonzero() == 0


def test_weight_and_hidden_of_any_strides(backend, device):
    base = make_problem(2, 9, H=H, V=V, device=device)
    weight = base.lm_head_weight.t().contiguous().t()  # (V, H), columns first
    for hidden in (
        base.hidden[:, -4:],
        base.hidden.transpose(0, 1),
        base.hidden[:1].expand(2, 9, H),
        base.hidden[:, ::2],
        base.hidden[:, 0],
        base.hidden.repeat_interleave(2, -1)[..., ::2],
    ):
        targets = base.targets.flatten()[: hidden.shape[:-1].numel()].view(hidden.shape[:-1])
        check_linear(backend, Problem(hidden, weight, base.bias, targets), chunk_size=5)


def test_misaligned_and_narrow_targets(backend, device):
    problem = make_problem(2, 5, H=H, V=V, device=device)
    labels = torch.cat([problem.targets[:, :1], problem.targets], 1).int()
    expected = run_linear(backend, problem)
    assert_equal(run_linear(backend, problem._replace(targets=labels[:, 1:])), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_token(backend, reduction, device):
    """hidden (H,), a 0-d target."""
    problem = make_problem(1, H=H, V=V, device=device)
    one = problem._replace(hidden=problem.hidden[0], targets=problem.targets[0])
    got = check_linear(backend, one, reduction=reduction, return_stats=True)
    assert got.loss.shape == ()
    assert got.gradients["hidden"].shape == (H,)


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_token(backend, reduction, shape, device):
    problem = make_problem(*shape, H=H, V=V, device=device)
    got = run_linear(backend, problem, reduction=reduction, return_stats=True)
    assert got.loss.shape == (shape if reduction == "none" else ())
    assert got.loss.count_nonzero() == 0
    for name, gradient in got.gradients.items():
        assert gradient.shape == getattr(problem, name).shape
        assert gradient.count_nonzero() == 0
    assert got.stats.token_count == got.stats.nll == 0


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


@pytest.mark.lesson("chunking changes the result")
@pytest.mark.lesson("losses of a split batch differ from the whole")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunk_size_changes_rounding_only(backend, reduction, device):
    """N = 20: a ragged last chunk, one row at a time, everything at once, and more than there is."""
    rows = 20
    problem = make_problem(rows, H=H, V=V, device=device, ignored=(2, 3))
    weights = make_weights("random", V, device)
    options = {"reduction": reduction, "token_weights": signed_token_weights(device, rows), "return_stats": True}
    whole = check_linear(backend, problem, weights, chunk_size=None, **options)
    for chunk_size in (1, 7, 13, rows, rows + 1):
        got = run_linear(backend, problem, weights, chunk_size=chunk_size, **options)
        assert_same(got, whole)
        torch.testing.assert_close(got.stats.nll, whole.stats.nll, rtol=2e-6, atol=0)
        assert got.stats.accuracy == whole.stats.accuracy


@pytest.mark.lesson("all tokens ignored")
@pytest.mark.parametrize("how", ["ignored", "token weights 0", "class weights 0"])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("compact", [None, False])
def test_nothing_to_average(backend, how, reduction, compact, device):
    """Loss 0 and still attached, gradients exactly 0, even with nan in the hidden states."""
    problem = make_problem(5, H=H, V=V, device=device)
    problem.hidden.fill_(NAN)
    weights, options = None, {}
    if how == "ignored":
        problem.targets.fill_(-100)
    elif how == "token weights 0":
        options["token_weights"] = torch.zeros(5, device=device)
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
    problem = make_problem(12, H=H, V=V, device=device, ignored=(4, 5, 6, 7))
    check_linear(backend, problem, chunk_size=4, compact=compact)
    first = make_problem(12, H=H, V=V, device=device, ignored=(0, 1, 2, 3))
    check_linear(backend, first, chunk_size=4, compact=compact)


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


@pytest.mark.parametrize("rows", [129, 300, 1025, 1281, 2048, 4097, 8192, 12_345])
@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "itemsize"), [(128, 10**6, 4), (512, 32_000, 4), (4096, 128_256, 2)]
)
def test_chunks_are_about_equally_long(rows, hidden_size, vocab_size, itemsize):
    step = plan_chunk(rows, hidden_size, vocab_size, itemsize)
    last = rows % step or step
    assert last >= step // 4, f"{rows} rows in chunks of {step}: the last one has {last}"


# ---------------------------------------------------------------------------------------------------------------------
# Rows that contribute nothing

DEAD = (0, 5, 6, 12)
LIVE = [i for i in range(N) if i not in DEAD]


def with_dead_rows(how, poison, device):
    """(problem, weights, options) with dead rows, and the same without these rows."""
    problem = make_problem(N, H=H, V=V, device=device)
    problem.targets[problem.targets == 3] = 4
    weights = make_weights("random", V, device) + 0.1
    u = torch.linspace(-1.0, 2.0, N, device=device)
    live = Problem(problem.hidden[LIVE].clone(), *problem[1:3], problem.targets[LIVE].clone())
    live_options = {"token_weights": u[LIVE].clone()}
    dead = list(DEAD)
    problem.hidden[dead] = poison
    if how == "ignored":
        problem.targets[dead] = -100
        u[dead] = NAN
    elif how == "token weight 0":
        u[dead] = 0
    else:
        weights[3] = 0
        problem.targets[dead] = 3
    return problem, weights, {"token_weights": u}, live, live_options


@pytest.mark.lesson("ignored rows are read")
@pytest.mark.parametrize("how", ["ignored", "token weight 0", "class weight 0"])
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [None, True, False])
def test_dead_rows_leave_no_trace(backend, how, poison, reduction, compact, device):
    """Exactly as without these rows where they are packed away; their own gradients are exactly 0."""
    problem, weights, options, live, live_options = with_dead_rows(how, poison, device)
    expected = run_linear(backend, live, weights, reduction=reduction, compact=True, **live_options)
    got = run_linear(backend, problem, weights, reduction=reduction, compact=compact, **options)
    hidden = got.gradients["hidden"]
    assert hidden[list(DEAD)].count_nonzero() == 0
    if reduction == "none":
        assert got.loss[list(DEAD)].count_nonzero() == 0
        got = got._replace(loss=got.loss[LIVE])
    got.gradients["hidden"] = hidden[LIVE]
    if compact is False:
        assert_same(got, expected)
    else:
        assert_equal(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compact", [None, False])
def test_class_weight_0_with_statistics(backend, reduction, compact, device):
    """Statistics need the row's logits, and may be nan with them; the gradients need nothing of the row."""
    problem, weights, options, live, live_options = with_dead_rows("class weight 0", NAN, device)
    expected = run_linear(backend, live, weights, reduction=reduction, **live_options)
    got = run_linear(backend, problem, weights, reduction=reduction, compact=compact, return_stats=True, **options)
    assert got.loss.isfinite().all()
    assert got.gradients["hidden"][list(DEAD)].count_nonzero() == 0
    for name in ("lm_head_weight", "bias"):
        torch.testing.assert_close(got.gradients[name], expected.gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["ignored", "token weight 0", "class weight 0"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dead_rows_are_not_multiplied(how, reduction, device):
    problem, weights, options, *_ = with_dead_rows(how, 0.0, device)
    passes = 2 if reduction == "none" else 1
    for compact, rows in ((None, len(LIVE)), (True, len(LIVE)), (False, N)):
        with Recorder() as recorder:
            run_linear("eager", problem, weights, reduction=reduction, compact=compact, chunk_size=4, **options)
        assert recorder.forward_rows(H, V) == passes * rows
        assert recorder.weight_rows(H, V) == rows
        assert recorder.hidden_rows(H, V) == rows


@pytest.mark.parametrize("option", [{"return_stats": True}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_class_weight_0_counts_where_something_else_needs_the_row(backend, option, device):
    problem, weights, options, *_ = with_dead_rows("class weight 0", 0.5, device)
    check_linear(backend, problem, weights, **option, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.lesson("two roundings of the gradient")
@pytest.mark.parametrize("upstream", [1.0, 0.25, 1 / 3, 0.0, 65536.0])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_upstream_scalars(backend, upstream, dtype, device):
    problem = make_problem(N, H=H, V=V, dtype=dtype, device=device, ignored=(4,))
    check_linear(backend, problem, make_weights("random", V, device), upstream=upstream, chunk_size=6)


def test_small_float16_gradients_do_not_underflow(backend, device):
    """Each row's logit gradient is below the smallest float16; loss scaling brings it back, in torch's float32 only."""
    problem = make_problem(N, H=H, V=V, dtype=torch.float16, device=device)
    options = {"normalizer": 2.0**27, "upstream": 2.0**20}
    got = run_linear(backend, problem, **options)
    expected = run_reference(problem, **options)
    for name, gradient in got.gradients.items():
        want = expected.gradients[name]
        error = (gradient.double().cpu() - want).abs().max() / want.abs().max()
        assert error < 2.0**-8, name


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_float16_z_loss_beside_tiny_weights(backend, reduction, device):
    """What keeps small weights from underflowing must not make the z-loss overflow."""
    problem = make_problem(N, H=H, V=V, dtype=torch.float16, device=device)
    options = {"normalizer": 13.0} if reduction == "mean" else {}
    weights = torch.full((V,), 1e-7, device=device)
    check_linear(backend, problem, weights, reduction=reduction, z_loss=0.1, **options)


def test_bfloat16_sums_are_kept_in_float32(device):
    """A weight gradient summed over chunks of one row in bfloat16 would lose a digit or more."""
    problem = make_problem(40, H=4, V=11, dtype=torch.bfloat16, device=device)
    fine = run_linear("eager", problem, chunk_size=1)
    expected = run_reference(problem)
    torchs = run_torch(problem)
    want = expected.gradients["lm_head_weight"]
    coarse = run_linear("eager", problem, chunk_size=1, accumulate_dtype=torch.bfloat16)
    errors = [(r.gradients["lm_head_weight"].cpu().double() - want).norm() for r in (fine, coarse, torchs)]
    assert errors[0] <= errors[2]
    assert errors[0] < errors[1] < 0.1 * want.norm()
    torch.testing.assert_close(coarse.loss, fine.loss)


@pytest.mark.skipif(not INTERPRETED, reason="the mixed product in plain torch is that of the CPU")
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64), (torch.float32,) * 2]
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("m", "k", "n"), [(20, 3, 5), (3, 20, 5), (16, 16, 1), (17, 17, 2), (1, 33, 4), (4, 0, 3)])
def test_add_product(dtypes, first, m, k, n, monkeypatch):
    """Shapes that end inside, at and beyond a block; what is in `total` must not matter the first time."""
    monkeypatch.setattr(products, "BLOCK", 8)
    narrow, wide = dtypes
    left, right = torch.randn(m, k).to(narrow), torch.randn(k, n).to(narrow)
    total = torch.full((m, n), NAN, dtype=wide) if first else torch.randn(m, n).to(wide)
    expected = left.double() @ right.double() + (0 if first else total.double())
    products.add_product(total, left, right, first=first)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_add_product_crosses_a_block_of_the_real_size():
    k = products.BLOCK + 1
    left, right = torch.ones(2, k, dtype=torch.bfloat16), torch.ones(k, 3, dtype=torch.bfloat16)
    for a, b, want in ((left, right, k), (right, left, 2 + 1 - 1)):
        total = torch.full((a.shape[0], b.shape[1]), NAN)
        if a is right:
            a, b = right.new_ones(k, 2), right.new_ones(2, 3)
            total = torch.full((k, 3), NAN)
        products.add_product(total, a, b, first=True)
        assert (total == want).all()


# ---------------------------------------------------------------------------------------------------------------------
# The module


def test_the_module_gives_the_functions_numbers(backend, device):
    problem = make_problem(N, H=H, V=V, device=device)
    weights = make_weights("random", V, device)
    u = signed_token_weights(device)
    criterion = PDLLinearCrossEntropyLoss(weights, reduction="mean", softcap=5.0, chunk_size=4, backend=backend)
    hidden, lm_head_weight, bias, targets = problem
    got = criterion(hidden, lm_head_weight, targets, bias, u, 6.0)
    expected = pdl_linear_cross_entropy(
        hidden, lm_head_weight, targets, weights,
        bias=bias, token_weights=u, normalizer=6.0, softcap=5.0, chunk_size=4, backend=backend,
    )  # fmt: skip
    assert torch.equal(got, expected)
    fixed = PDLLinearCrossEntropyLoss(weights, normalizer=torch.tensor(6.0), softcap=5.0, backend=backend)
    torch.testing.assert_close(fixed(hidden, lm_head_weight, targets, bias, u), expected)
    torch.testing.assert_close(fixed(hidden, lm_head_weight, targets, bias, u, normalizer=3), 2 * expected)


@pytest.mark.lesson("weights rounded with the model")
def test_the_modules_weights_stay_float32_and_out_of_checkpoints(device):
    table = torch.tensor([1.0, 1 / 3, 1e-7])
    criterion = PDLLinearCrossEntropyLoss(table.double(), reduction="sum")
    table.fill_(0)
    assert criterion.state_dict() == {}
    for move in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.to(device)):
        move(criterion)
        assert criterion.weights.dtype == torch.float32
        assert criterion.weights[1].item() == torch.tensor(1 / 3).item()
    assert criterion.weights.device.type == device.type
    shown = repr(criterion)
    assert shown.startswith("PDLLinearCrossEntropyLoss(weights=(3,)")
    for name in (
        "reduction='sum'",
        "chunk_size=None",
        "row_sampling=0.0",
        "compact=None",
        "accumulate_dtype=torch.float32",
    ):
        assert name in shown
