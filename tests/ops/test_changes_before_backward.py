"""What may change between the loss and its backward, and what then says that it changed."""

import pytest
import torch
from helpers import run_reference
from helpers.autograd import assert_gradient, producer

from pdl_kernels import pdl_cross_entropy


@pytest.mark.lesson("gradient written over shared logits")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_untouched(backend, problem, reduction):
    logits, targets, weights, _ = problem
    _, hidden = producer(logits)
    version = hidden._version
    loss = pdl_cross_entropy(hidden, targets, weights, reduction=reduction, backend=backend)
    (3 * loss.sum()).backward()
    assert torch.equal(hidden, logits)
    assert hidden._version == version


@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.0])
def test_logits_may_change_after_the_loss(backend, problem, upstream):
    """The first backward has its gradient already; the second needs the logits, and must say that they are gone."""
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    hidden.detach().mul_(-2)
    loss.backward(torch.tensor(upstream, device=logits.device), retain_graph=True)
    assert_gradient(leaf.grad, upstream * expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_may_change_after_the_loss(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    table = weights.clone()
    loss = pdl_cross_entropy(leaf, targets, table, backend=backend)
    table.fill_(torch.nan)
    (3 * loss).backward()
    assert_gradient(leaf.grad, 3 * expected)


def test_normalizer_may_change_after_the_loss(backend, problem):
    """An accumulation loop that reuses one tensor for its denominators."""
    logits, targets, _, _ = problem
    leaf = logits.clone().requires_grad_()
    normalizer = torch.tensor(4.0, device=logits.device)
    loss = pdl_cross_entropy(leaf, targets, normalizer=normalizer, backend=backend)
    normalizer.fill_(1000)
    (3 * loss).backward(retain_graph=True)
    expected = run_reference(logits, targets, normalizer=4.0, upstream=3.0).gradient.to(logits.device)
    assert_gradient(leaf.grad, expected)
    leaf.grad = None
    (3 * loss).backward()
    assert_gradient(leaf.grad, expected)


def test_saved_tensors_hooks_may_move_the_logits(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().numpy().copy(), lambda a: torch.from_numpy(a)):
        loss = pdl_cross_entropy(leaf, targets.cpu(), weights, backend=backend) if leaf.is_cpu else None
    if loss is None:
        pytest.skip("the hooks bring the tensors back to the CPU")
    for upstream in (3.0, 1.0):
        (gradient,) = torch.autograd.grad(upstream * loss, leaf, retain_graph=True)
        assert_gradient(gradient, upstream * expected)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}], ids=["mean", "none", "inplace"])
def test_changing_a_statistic_changes_no_gradient(backend, problem, options):
    logits, targets, weights, _ = problem
    gradients = []
    for change in (False, True):
        leaf, hidden = producer(logits)
        loss, stats = pdl_cross_entropy(hidden, targets, weights, backend=backend, return_stats=True, **options)
        if change:
            for value in stats:
                value.mul_(0)
        loss.sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_inplace_lets_the_targets_change_before_backward(backend, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    targets = targets.clone()
    loss = pdl_cross_entropy(hidden, targets, weights, backend=backend, inplace=True)
    targets.zero_()
    loss.backward()
    assert_gradient(leaf.grad, expected)
