"""Loss, gradients and statistics of the loss fused with the projection, against the float64 reference."""

import pytest
import torch
from helpers import make_weights
from helpers.linear import (
    H,
    Problem,
    V,
    assert_equal,
    assert_same,
    check_linear,
    make_problem,
    make_token_weights,
    rows_for,
    run_linear,
    run_linear_reference,
    run_linear_torch,
)

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 6.0, "logit_scale": 0.7, "return_stats": True}

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


def case_options(name, rows, device):
    options = dict(CASES[name])
    weights = make_weights(options.pop("weights", None), V, device)
    if options.get("token_weights"):
        options["token_weights"] = make_token_weights(rows, device)
    if options.get("reduction") == "none":
        options["upstream"] = torch.randn(rows, generator=torch.Generator().manual_seed(17))
    return weights, options


def _dtypes_by_backend():
    """Every case in every dtype on the eager backend, which forms the same products and chunks as Triton's.

    The interpreter is slow: there one dtype a case, in turn, and all three where nothing is asked for and where
    everything is. Kernels convert what they load to float32 and round what they store, whatever the options are: dtype
    and option meet nowhere else.
    """
    for position, name in enumerate(CASES):
        for dtype in HALF_AND_SINGLE:
            backends = ["eager"]
            if name in ("plain", "everything") or dtype == HALF_AND_SINGLE[position % 3]:
                backends += ["triton", "triton, row on chip"]
            for backend in backends:
                yield pytest.param(backend, name, dtype, id=f"{backend}-{name}-{dtype}")


@pytest.mark.lesson("tests that compare a value with itself")
@pytest.mark.parametrize(("backend", "name", "dtype"), list(_dtypes_by_backend()), indirect=["backend"])
def test_against_the_reference(backend, name, dtype, device):
    """No worse than F.linear and F.cross_entropy in the same dtype."""
    rows = rows_for(backend)
    problem = make_problem(rows, dtype=dtype, device=device, ignored=(1,) if rows == 5 else (1, 4, 7))
    weights, options = case_options(name, rows, device)
    check_linear(backend, problem, weights, chunk_size=rows // 2, **options)


@pytest.mark.parametrize("name", ["plain", "sum", "none", "everything", "everything, one loss per token"])
def test_float64(name, device):
    problem = make_problem(13, dtype=torch.float64, device=device, ignored=(1,))
    weights, options = case_options(name, 13, device)
    got = check_linear("eager", problem, weights, chunk_size=4, **options)
    assert got.loss.dtype == torch.float64


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"upstream": 1 / 3}], ids=["plain", "s", "a third"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_half_dtypes_on_average(dtype, options, device):
    """Over many problems luck averages out, and no rounding more than torch's is allowed."""
    weights = make_weights("random", 101, device)
    squares = {}  # (tensor, order): [[ours, torch's], ...], squared relative errors
    for seed in range(16):
        problem = make_problem(32, H=16, V=101, dtype=dtype, device=device, seed=seed, ignored=(1, 4))
        got = run_linear("eager", problem, weights, chunk_size=5, **options)
        expected = run_linear_reference(problem, weights, **options)
        torchs = run_linear_torch(problem, weights, **options)
        for name, want in {"loss": expected.loss, **expected.gradients}.items():
            values = [r.loss if name == "loss" else r.gradients[name] for r in (got, torchs)]
            for order in (torch.inf, 2):
                norms = [torch.linalg.vector_norm((t.cpu().double() - want).reshape(-1), order) for t in values]
                size = torch.linalg.vector_norm(want.reshape(-1), order)
                squares.setdefault((name, order), []).append([(norm / size).item() ** 2 for norm in norms])
    for case, pairs in squares.items():
        ours, torchs_error = torch.tensor(pairs, dtype=torch.float64).mean(0).sqrt().tolist()
        assert ours <= torchs_error + 1e-6, case


@pytest.mark.parametrize("ignore_index", [-100, 5, 10**12, -1])
def test_ignore_index_inside_and_outside_the_vocabulary(backend, ignore_index, device):
    problem = make_problem(rows_for(backend), device=device, ignored=(0, 3), ignore_index=ignore_index)
    got = check_linear(backend, problem, ignore_index=ignore_index, return_stats=True, chunk_size=4)
    assert got.stats.token_count == (problem.targets != ignore_index).sum()
    assert got.gradients["hidden"][problem.targets == ignore_index].count_nonzero() == 0


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_same_as_the_loss_on_logits(backend, bias, device):
    """In float32, where the logits are the same numbers up to rounding."""
    problem = make_problem(rows_for(backend), device=device, bias=bias, ignored=(2,))
    weights = make_weights("random", V, device)
    logits = torch.nn.functional.linear(*problem[:3])
    loss, stats = pdl_cross_entropy(logits, problem.targets, weights, backend=backend, return_stats=True)
    got = run_linear(backend, problem, weights, return_stats=True)
    torch.testing.assert_close(got.loss, loss, rtol=2e-6, atol=0)
    for ours, theirs in zip(got.stats, stats, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_padded_vocabulary_through_the_bias(backend, device):
    """A bias of -inf takes classes out; their weights get a gradient of exactly 0."""
    problem = make_problem(rows_for(backend), device=device)
    problem.targets.remainder_(V - 4)
    problem.bias[-4:] = -torch.inf
    got = check_linear(backend, problem, chunk_size=4)
    assert got.gradients["lm_head_weight"][-4:].count_nonzero() == 0


LAYOUTS = {
    "the last positions": lambda hidden: hidden[:, -2:],
    "sequence first": lambda hidden: hidden.transpose(0, 1),
    "expanded": lambda hidden: hidden[:1].expand(2, 3, H),
    "every other position": lambda hidden: hidden[:, ::2],
    "every other feature": lambda hidden: hidden.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.lesson("transposed logits")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_strides(backend, layout, reduction, device):
    """Hidden states of any strides, a weight of columns first, a bias and targets with gaps."""
    base = make_problem(2, 3, device=device)
    hidden = LAYOUTS[layout](base.hidden)
    targets = base.targets.repeat_interleave(2, 1)[:, ::2].flatten()[: hidden[..., 0].numel()].view(hidden.shape[:-1])
    weight = base.lm_head_weight.t().contiguous().t()
    bias = base.bias.repeat_interleave(3)[::3]
    assert not weight.is_contiguous()
    check_linear(backend, Problem(hidden, weight, bias, targets), chunk_size=4, reduction=reduction)


@pytest.mark.lesson("misaligned targets")
def test_misaligned_and_narrow_targets(backend, device):
    problem = make_problem(2, 2, device=device)
    labels = torch.cat([problem.targets[:, :1], problem.targets], 1).int()
    assert_equal(run_linear(backend, problem._replace(targets=labels[:, 1:])), run_linear(backend, problem))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_token(backend, reduction, device):
    """hidden (H,), a 0-d target."""
    problem = make_problem(1, device=device)
    one = problem._replace(hidden=problem.hidden[0], targets=problem.targets[0])
    got = check_linear(backend, one, reduction=reduction, return_stats=True)
    assert got.loss.shape == ()
    assert got.gradients["hidden"].shape == (H,)


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=["0", "2x0"])
def test_no_token(backend, reduction, shape, device):
    problem = make_problem(*shape, device=device)
    got = run_linear(backend, problem, reduction=reduction, return_stats=True)
    assert got.loss.shape == (shape if reduction == "none" else ())
    assert got.loss.count_nonzero() == 0
    for name, gradient in got.gradients.items():
        assert gradient.shape == getattr(problem, name).shape
        assert gradient.count_nonzero() == 0
    assert got.stats.token_count == got.stats.nll == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_weights(backend, reduction, device):
    """The output layer is the embedding: its gradient has both shares."""
    embedding = make_problem(1, device=device).lm_head_weight
    tokens = torch.tensor([3, 3, 8, 20, 36], device=device)
    targets = torch.tensor([8, 20, 36, 3, 0], device=device)
    upstream = torch.linspace(-1, 2, 5, device=device)
    gradients = []
    for dtype, loss_of in (
        (torch.float32, lambda h, w: pdl_linear_cross_entropy(h, w, targets, reduction=reduction, backend=backend)),
        (torch.float64, lambda h, w: torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction=reduction)),
    ):
        tied = embedding.detach().to(dtype).requires_grad_()
        loss = loss_of(torch.tanh(tied[tokens]), tied)
        (loss if reduction == "mean" else (loss * upstream).sum()).backward()
        gradients.append(tied.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert gradients[0][8].abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.lesson("two roundings of the gradient")
@pytest.mark.parametrize("upstream", [0.0, 0.25, 1 / 3, -3.0])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_upstream_scalars(backend, upstream, dtype, device):
    problem = make_problem(rows_for(backend), dtype=dtype, device=device, ignored=(4,))
    got = check_linear(backend, problem, make_weights("random", V, device), upstream=upstream, chunk_size=3)
    if upstream == 0:
        assert all(gradient.count_nonzero() == 0 for gradient in got.gradients.values())


def test_small_float16_gradients_do_not_underflow(backend, device):
    """Each row's logit gradient is below the smallest float16; loss scaling brings it back, in torch's float32 only."""
    problem = make_problem(rows_for(backend), dtype=torch.float16, device=device)
    options = {"normalizer": 2.0**27, "upstream": 2.0**20}
    got = run_linear(backend, problem, **options)
    expected = run_linear_reference(problem, **options)
    for name, gradient in got.gradients.items():
        want = expected.gradients[name]
        error = (gradient.double().cpu() - want).abs().max() / want.abs().max()
        assert error < 2.0**-8, name


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_float16_z_loss_beside_tiny_weights(backend, reduction, device):
    """What keeps small weights from underflowing must not make the z-loss overflow."""
    problem = make_problem(rows_for(backend), dtype=torch.float16, device=device)
    options = {"normalizer": 13.0} if reduction == "mean" else {}
    weights = torch.full((V,), 1e-7, device=device)
    check_linear(backend, problem, weights, reduction=reduction, z_loss=0.1, **options)


@pytest.mark.parametrize("accumulate_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_accumulate_dtype(accumulate_dtype, dtype, device):
    """Whatever the sums' dtype, the gradients have the parameters', and are right to the coarser of both."""
    problem = make_problem(13, dtype=dtype, device=device)
    got = run_linear("eager", problem, chunk_size=4, accumulate_dtype=accumulate_dtype)
    coarsest = max(torch.finfo(torch.promote_types(dtype, accumulate_dtype)).eps, torch.finfo(dtype).eps)
    for name, want in run_linear_reference(problem).gradients.items():
        assert got.gradients[name].dtype == dtype
        error = (got.gradients[name].cpu().double() - want).norm() / want.norm()
        assert error <= 8 * coarsest, name


@pytest.mark.cpu_only(reason="the sums of the libraries on a GPU have orders of their own")
def test_bfloat16_sums_are_kept_in_float32():
    """A weight gradient summed over chunks of one row in bfloat16 would lose a digit or more."""
    problem = make_problem(200, H=4, V=11, dtype=torch.bfloat16)
    want = run_linear_reference(problem).gradients["lm_head_weight"]
    results = [
        run_linear("eager", problem, chunk_size=1),
        run_linear("eager", problem, chunk_size=1, accumulate_dtype=torch.bfloat16),
        run_linear_torch(problem),
    ]
    fine, coarse, torchs = ((r.gradients["lm_head_weight"].double() - want).norm() for r in results)
    assert fine <= 1.05 * torchs
    assert coarse > 3 * fine
    assert_same(results[0]._replace(gradients={}), results[1]._replace(gradients={}))
