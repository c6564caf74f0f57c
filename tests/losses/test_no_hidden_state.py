"""The same call gives the same bits, whatever the process did before: training that is resumed gives the same bits."""

import itertools

import pytest
import torch

from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = {
    "two passes": {"name": "two passes"},
    "slices": {"name": "slices"},
    "row held by 4 warps": {"name": "single pass", "warps": 4},
    "row held by 8 warps": {"name": "single pass", "warps": 8},
    "row held by 8 blocks of 4 warps": {"name": "single pass", "warps": 4, "ctas": 8},
}
UPSTREAM = (1.0, 0.3, -2.0, 65536.0)

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture(params=["eager", *TRITON])
def form(request, force_kernel):
    """The backend to ask for; every way that Triton has to form loss and gradient, with every number of warps."""
    if request.param == "eager":
        return "eager"
    pytest.importorskip("triton", reason="Triton is not installed")
    shape = dict(TRITON[request.param])
    if shape.get("ctas", 1) > 1 and torch.cuda.is_available():
        pytest.skip("which GPUs and versions of Triton compile clusters is the planner's to know")
    force_kernel(shape.pop("name"), **shape)
    return "triton"


def make(rows, vocab_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, vocab_size, generator=generator, device="cpu")).to(dtype)
    targets = torch.randint(vocab_size, (rows,), generator=generator, device="cpu")
    weights = torch.rand(vocab_size, generator=generator, device="cpu") + 0.1
    here = torch.get_default_device()
    return logits.to(here), targets.to(here), weights.to(here)


def outcome(problem, upstream, **options):
    """The loss, and the gradient of the logits for this upstream gradient."""
    logits, targets, weights = problem
    leaf = logits.detach().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    return loss.detach(), gradient


def other_losses(dtype, backend):
    """What a process may do between two calls: other shapes, options and upstream gradients, another kind of loss."""
    other = make(3, 130, dtype, seed=5)
    outcome(other, 7.0, backend=backend, reduction="sum", label_smoothing=0.1)
    outcome(other, 0.125, backend=backend, reduction="none")
    outcome(other, 3.0, backend=backend, expected_upstream=3.0)
    hidden = torch.ones(3, 8, dtype=dtype, requires_grad=True)
    pdl_linear_cross_entropy(hidden, torch.ones(130, 8, dtype=dtype), other[1], backend=backend).mul(5).backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_what_came_before(form, dtype):
    """Every order of the upstream gradients, with and without other losses in between."""
    problem = make(2, 1100, dtype, seed=4)
    first = {upstream: outcome(problem, upstream, backend=form) for upstream in UPSTREAM}
    orders = list(itertools.permutations(UPSTREAM))
    for number, order in enumerate(orders[:: 1 if form == "eager" or torch.cuda.is_available() else 12]):
        if number % 2:
            other_losses(dtype, form)
        for upstream in order:
            again = outcome(problem, upstream, backend=form)
            torch.testing.assert_close(again, first[upstream], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_losses_alive_at_once(form, dtype):
    """Of each, backward comes after forward of the other: the older one's gradient is its own."""
    logits, targets, weights = make(2, 1100, dtype, seed=4)
    alone = [outcome((logits, targets, weights), upstream, backend=form)[1] for upstream in (0.3, -2.0)]
    one, two = logits.detach().requires_grad_(), logits.detach().requires_grad_()
    first = pdl_cross_entropy(one, targets, weights, backend=form)
    second = pdl_cross_entropy(two, targets, weights, backend=form)
    (second * -2.0).backward()
    (first * 0.3).backward()
    assert torch.equal(one.grad, alone[0])
    assert torch.equal(two.grad, alone[1])
