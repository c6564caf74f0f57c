"""Autograd through the fused linear loss: upstream gradients, further backwards, refusals, autocast, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from helpers import make_weights
from helpers.linear import (
    PARAMETERS,
    H,
    V,
    assert_same,
    check_linear,
    leaves,
    make_problem,
    make_token_weights,
    rows_for,
    run_linear,
    run_linear_reference,
)
from torch.utils.checkpoint import checkpoint

from pdl_kernels import pdl_linear_cross_entropy

N = 4
# Torch compares where the kept and the recomputed tensors are.
RECOMPUTED = pytest.mark.needs_driver(reason="a tensor that a matrix product keeps is on a CPU, as it really is")
AUTOCAST = pytest.mark.needs_driver(reason="autocast for a GPU leaves operators on a CPU alone")


def loss_of(backend, tensors, targets, **options):
    hidden, weight, bias = tensors
    return pdl_linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_size=3, backend=backend, **options)


GRADCHECKED = {
    "plain": {},
    "none": {"reduction": "none"},
    "token_mean, smoothing": {"reduction": "token_mean", "label_smoothing": 0.2},
    "normalizer, z_loss": {"normalizer": 3.0, "z_loss": 0.1},
    "sum, everything": {
        "reduction": "sum", "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1,
    },
    "none, everything": {
        "reduction": "none", "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1,
    },
    "not compact": {"compact": False},
}  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECKED)
@pytest.mark.parametrize("token_weights", [False, True], ids=["", "token weights"])
def test_gradcheck(name, token_weights, device):
    problem = make_problem(5, H=3, V=7, dtype=torch.float64, device=device, ignored=(1,))
    weights = make_weights("random", 7, device).double() + 0.1
    u = torch.tensor([-1.5, 1.0, 0.5, 0.0, 2.0], device=device) if token_weights else None

    def loss(hidden, weight, bias):
        return pdl_linear_cross_entropy(
            hidden, weight, problem.targets, weights,
            bias=bias, token_weights=u, chunk_size=2, backend="eager", **GRADCHECKED[name],
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaves(problem), check_undefined_grad=False)


UPSTREAM = {
    "per row": lambda: torch.randn(N),
    "zero in the first row": lambda: torch.tensor([0.0, 1.0, -2.0, 0.5]),
    "stride 0": lambda: torch.tensor(0.7).expand(N),
    "stride 3": lambda: torch.randn(3 * N)[::3],
    "zeros": lambda: torch.zeros(N),
}


@pytest.mark.lesson("rows scaled by the first upstream gradient")
@pytest.mark.lesson("upstream gradient with stride 0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", UPSTREAM)
def test_upstream_per_row(backend, kind, dtype, device):
    problem = make_problem(N, dtype=dtype, device=device, ignored=(2,))
    weights = make_weights("random", V, device) + 0.1
    upstream = UPSTREAM[kind]().to(device)
    tensors = leaves(problem)
    loss = loss_of(backend, tensors, problem.targets, weights=weights, reduction="none")
    assert loss.stride() == (1,)
    found = torch.autograd.grad(loss, tensors, upstream)
    expected = run_linear_reference(problem, weights, upstream=upstream.cpu(), reduction="none").gradients
    for gradient, want in zip(found, expected.values(), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-5
        assert (gradient.cpu().double() - want).abs().max() <= tolerance * want.abs().max()
    assert found[0][2].count_nonzero() == 0
    if kind == "zeros":
        assert all(gradient.count_nonzero() == 0 for gradient in found)


@pytest.mark.parametrize("consumer", ["sum", "mean of a slice", "weighted", "squared"])
def test_reductions_a_user_writes(consumer, device):
    problem = make_problem(2, 4, device=device, ignored=(5,))
    reduce = {
        "sum": lambda rows: rows.sum(),
        "mean of a slice": lambda rows: rows[:, 1:3].mean(),
        "weighted": lambda rows: (rows * torch.arange(8.0, device=device).view(2, 4)).sum(),
        "squared": lambda rows: rows.pow(2).sum(),
    }[consumer]
    tensors = leaves(problem)
    found = torch.autograd.grad(reduce(loss_of("eager", tensors, problem.targets, reduction="none")), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    rows = F.cross_entropy(F.linear(*exact).flatten(0, 1), problem.targets.flatten(), reduction="none").view(2, 4)
    for gradient, want in zip(found, torch.autograd.grad(reduce(rows), exact), strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_upstream_gradient_of_nothing(backend, reduction, dtype, device):
    """0 * inf must not appear where nothing is counted."""
    problem = make_problem(N, dtype=dtype, device=device, ignored=range(N))
    got = run_linear(backend, problem, upstream=torch.inf, reduction=reduction)
    assert all(gradient.count_nonzero() == 0 for gradient in got.gradients.values())


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0])
def test_every_backward_gives_the_same(backend, reduction, upstream, device):
    problem = make_problem(N, device=device, ignored=(1,))
    tensors = leaves(problem)
    loss = loss_of(backend, tensors, problem.targets, reduction=reduction)
    given = torch.full_like(loss, upstream)
    first, second, third = (torch.autograd.grad(loss, tensors, given, retain_graph=True) for _ in range(3))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert len({t.data_ptr() for t in (a, b, c)}) == 3, "a buffer was handed over twice"
    expected = run_linear_reference(problem, reduction=reduction, upstream=upstream)
    for gradient, want in zip(first, expected.gradients.values(), strict=True):
        torch.testing.assert_close(gradient.cpu().double(), want, rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_over_backwards(backend, device):
    """`.grad` shares the storage that was handed over; scaling it must not reach the next backward."""
    problem = make_problem(N, device=device)
    tensors = leaves(problem)
    loss = loss_of(backend, tensors, problem.targets)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    for t in tensors:
        t.grad.mul_(10)
    loss.backward(torch.full_like(loss, -3.0))
    for t, want in zip(tensors, once, strict=True):
        torch.testing.assert_close(t.grad, 7 * want, rtol=1e-5, atol=1e-6)


def test_a_second_backward_without_retain_graph_raises(device):
    problem = make_problem(N, device=device)
    tensors = leaves(problem)
    loss = loss_of("eager", tensors, problem.targets)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction, device):
    problem = make_problem(N, device=device)
    for number in range(3):
        tensors = leaves(problem)
        loss = loss_of("eager", tensors, problem.targets, reduction=reduction).sum()
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        assert gradients[number].isfinite().all()
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradients[number].pow(2).sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "vjp", "is_grads_batched"])
@pytest.mark.parametrize("number", [0, 1, 2], ids=PARAMETERS)
def test_functorch_transforms_raise(transform, number, device):
    problem = make_problem(N, device=device)

    def loss(x):
        tensors = [x if i == number else t for i, t in enumerate(problem[:3])]
        return loss_of("eager", tensors, problem.targets)

    def call():
        x = problem[number]
        if transform == "vmap":
            torch.func.vmap(loss)(x.expand(2, *x.shape))
        elif transform == "jvp":
            torch.func.jvp(loss, (x,), (torch.ones_like(x),))
        elif transform == "is_grads_batched":
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(loss(leaf), leaf, torch.ones(2, device=device), is_grads_batched=True)
        else:
            getattr(torch.func, transform)(loss)(x) if transform != "vjp" else torch.func.vjp(loss, x)

    with pytest.raises(RuntimeError, match="pdl_linear_cross_entropy does not support"):
        call()


@pytest.mark.parametrize("name", ["weights", "token_weights", "normalizer"])
def test_only_three_tensors_are_differentiable(name, device):
    hidden, weight, _, targets = make_problem(N, device=device)
    size = {"weights": (V,), "token_weights": (N,), "normalizer": ()}[name]
    with pytest.raises(NotImplementedError, match=name):
        pdl_linear_cross_entropy(hidden, weight, targets, **{name: torch.ones(size, device=device).requires_grad_()})


def test_hooks_see_and_replace_gradients(backend, device):
    problem = make_problem(N, device=device)
    expected = run_linear(backend, problem, chunk_size=3).gradients
    tensors = leaves(problem)
    seen = {}
    for name, tensor in zip(PARAMETERS, tensors, strict=True):
        tensor.register_hook(lambda gradient: 2 * gradient)
        tensor.register_post_accumulate_grad_hook(lambda t, name=name: seen.update({name: t.grad.clone()}))
    loss_of(backend, tensors, problem.targets).backward()
    for name in PARAMETERS:
        torch.testing.assert_close(seen[name], 2 * expected[name], rtol=1e-6, atol=0)


def test_inputs_are_untouched_and_guarded(backend, device):
    """The gradient is formed in forward; a second backward reads the saved tensors, whose change is an error."""
    problem = make_problem(N, device=device)
    before = [t.clone() for t in problem]
    tensors = leaves(problem)
    loss = loss_of(backend, tensors, problem.targets)
    loss.backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True))
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_statistics_are_not_attached(device):
    problem = make_problem(N, device=device)
    tensors = leaves(problem)
    loss, stats = loss_of("eager", tensors, problem.targets, return_stats=True)
    assert not any(s.requires_grad for s in stats)
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    stats.nll.zero_()
    stats.weight_sum.zero_()
    for gradient, want in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
        assert torch.equal(gradient, want)


@pytest.mark.parametrize("use_reentrant", [True, pytest.param(False, marks=RECOMPUTED)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_activation_checkpointing(use_reentrant, reduction, upstream, device):
    problem = make_problem(N, device=device)
    trunk = torch.randn(H, H, device=device).requires_grad_()
    results = []
    for checkpointed in (False, True):
        hidden, weight, bias = leaves(problem)
        trunk.grad = None

        def head_and_loss(hidden, weight=weight, bias=bias):
            return loss_of("eager", (torch.tanh(hidden @ trunk), weight, bias), problem.targets, reduction=reduction)

        loss = checkpoint(head_and_loss, hidden, use_reentrant=use_reentrant) if checkpointed else head_and_loss(hidden)
        (upstream * loss).sum().backward()
        results.append((hidden.grad, weight.grad, bias.grad, trunk.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast


@AUTOCAST
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_a_linear_would(backend, cast, reduction, device):
    """float32 tensors under autocast: the numbers of the rounded ones, and float32 gradients."""
    rows = rows_for(backend)
    problem = make_problem(rows, device=device, ignored=(1,))
    upstream = torch.linspace(-1, 2, rows) if reduction == "none" else 3.0
    options = {"reduction": reduction, "upstream": upstream}
    with torch.autocast(device.type, dtype=cast):
        got = run_linear(backend, problem, **options)
        logits_like = F.linear(*problem[:3])
    assert logits_like.dtype == cast
    assert got.loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in got.gradients.values())
    rounded = problem._replace(**{name: getattr(problem, name).to(cast) for name in PARAMETERS})
    plain = run_linear(backend, rounded, **options)
    assert torch.equal(got.loss, plain.loss)
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient.to(cast), plain.gradients[name], rtol=2e-2, atol=1e-7)
        # The sums are float32, so that more is left of them than the narrow dtype holds.
        assert (gradient != gradient.to(cast).float()).any(), name


@AUTOCAST
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_good_as_torchs(cast, device):
    problem = make_problem(40, H=16, V=101, device=device)
    with torch.autocast(device.type, dtype=cast):
        got = run_linear("eager", problem, chunk_size=7)
        tensors = leaves(problem)
        loss = F.cross_entropy(F.linear(*tensors), problem.targets)
    torchs = torch.autograd.grad(loss, tensors)
    expected = run_linear_reference(problem)
    assert (got.loss.cpu() - expected.loss).abs() <= 2.0**-8 * expected.loss
    for name, theirs in zip(PARAMETERS, torchs, strict=True):
        want = expected.gradients[name]
        ours, theirs_error = ((t.cpu().double() - want).norm() for t in (got.gradients[name], theirs))
        assert got.gradients[name].dtype == theirs.dtype
        assert ours <= 1.02 * theirs_error, name


def test_autocast_with_mixed_dtypes(device):
    """A trunk under autocast gives bfloat16 hidden states beside a float32 head; outside of it that is an error."""
    problem = make_problem(N, device=device)
    hidden, weight, bias = leaves(problem._replace(hidden=problem.hidden.bfloat16()))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss_of("eager", (hidden, weight, bias), problem.targets).backward()
    assert [t.grad.dtype for t in (hidden, weight, bias)] == [torch.bfloat16, torch.float32, torch.float32]
    with pytest.raises(TypeError, match=r"lm_head_weight is torch\.float32 and hidden torch\.bfloat16"):
        loss_of("eager", (hidden, weight, bias), problem.targets)


def test_backward_inside_and_outside_of_autocast(device):
    """Where backward runs changes nothing, whether it makes the logits again or not."""
    for reduction in ("mean", "none"):
        problem = make_problem(N, device=device)
        results = []
        for inside in (True, False):
            tensors = leaves(problem)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = loss_of("eager", tensors, problem.targets, reduction=reduction).sum()
                if inside:
                    results.append(torch.autograd.grad(loss, tensors))
            if not inside:
                results.append(torch.autograd.grad(loss, tensors))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float64_stays_float64_under_autocast(device):
    problem = make_problem(N, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run_linear("eager", problem)
    assert_same(got, run_linear("eager", problem), rtol=0, atol=0)
    check_linear("eager", problem, token_weights=make_token_weights(N, device))
