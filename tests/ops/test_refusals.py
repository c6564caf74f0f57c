"""What is refused: second derivatives, functorch, forward mode, gradients of anything but the logits."""

import pytest
import torch
from helpers.autograd import N, V, assert_gradient, producer

from pdl_kernels import pdl_cross_entropy

DOUBLE = "differentiated twice|second derivative"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward_raises(backend, problem, reduction, inplace):
    logits, targets, weights, _ = problem
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, weights, reduction=reduction, inplace=inplace, backend=backend)
    # An upstream gradient that nobody expected: in place, the logits are written to once more.
    (gradient,) = torch.autograd.grad(3 * loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=DOUBLE):
        gradient.square().sum().backward()


def test_create_graph_alone_is_harmless(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    (gradient,) = torch.autograd.grad(3 * loss, leaf, create_graph=True)
    assert_gradient(gradient, 3 * expected)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "vjp", "is_grads_batched"])
def test_functorch_transforms_raise(backend, problem, transform):
    logits, targets, weights, _ = problem

    def loss(x):
        return pdl_cross_entropy(x, targets, weights, backend=backend)

    def call():
        if transform == "grad":
            torch.func.grad(loss)(logits)
        elif transform == "vmap":
            torch.func.vmap(loss)(logits.expand(2, N, V))
        elif transform == "jvp":
            torch.func.jvp(loss, (logits,), (torch.ones_like(logits),))
        elif transform == "jacrev":
            torch.func.jacrev(loss)(logits)
        elif transform == "vjp":
            torch.func.vjp(loss, logits)
        else:
            leaf = logits.clone().requires_grad_()
            upstream = torch.ones(2, device=logits.device)
            torch.autograd.grad(loss(leaf), leaf, upstream, is_grads_batched=True)

    with pytest.raises(RuntimeError, match=r"pdl_cross_entropy does not support|functorch"):
        call()


def test_forward_mode_raises_or_is_right(backend, problem):
    """Not named by the contract; what must not happen is a tangent that is wrong in silence."""
    logits, targets, weights, expected = problem
    tangent = torch.randn_like(logits)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, tangent)
        try:
            loss = pdl_cross_entropy(dual, targets, weights, backend=backend)
        except (RuntimeError, NotImplementedError):
            return
        got = torch.autograd.forward_ad.unpack_dual(loss).tangent
        assert got is not None, "the tangent was dropped"
        assert got.item() == pytest.approx((tangent * expected).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["weights", "token_weights", "normalizer"])
def test_only_the_logits_are_differentiable(backend, problem, name):
    logits, targets, _, _ = problem
    shape = {"weights": (V,), "token_weights": (N,), "normalizer": ()}[name]
    value = torch.ones(shape, device=logits.device, requires_grad=True)
    leaf = logits.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=name):
        pdl_cross_entropy(leaf, targets, **{name: value}, backend=backend)
    assert pdl_cross_entropy(leaf, targets, **{name: value.detach()}, backend=backend).requires_grad
