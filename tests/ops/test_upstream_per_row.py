"""Upstream gradients per row: of any stride, of the reductions that users write, and infinite ones."""

import pytest
import torch
import torch.nn.functional as F
from helpers import make_logits, make_targets, make_weights, run_reference
from helpers.autograd import V, assert_gradient

from pdl_kernels import pdl_cross_entropy


class _Upstream(torch.autograd.Function):
    """The identity, whose backward sends exactly the tensor it was given."""

    @staticmethod
    def forward(ctx, loss, upstream):
        ctx.upstream = upstream
        return loss.clone()

    @staticmethod
    def backward(ctx, _):
        return ctx.upstream, None


@pytest.mark.lesson("rows scaled by the first upstream gradient")
@pytest.mark.lesson("upstream gradient with stride 0")
@pytest.mark.parametrize(
    "kind", ["zero first", "stride 0", "strided", "offset", "reversed by index", "half", "transposed"]
)
def test_upstream_per_row(backend, kind, device):
    logits = make_logits(2, 2, V, device=device)
    targets = make_targets(2, 2, V=V, device=device)
    weights = make_weights("random", V, device) + 0.1
    upstream = {
        "zero first": torch.tensor([[0.0, 2.0], [-1.0, 0.5]], device=device),
        "stride 0": torch.tensor(1.5, device=device).expand(2, 2),
        "strided": torch.arange(8.0, device=device)[::2].view(2, 2),
        "offset": torch.arange(10.0, device=device)[3:7].view(2, 2),
        "reversed by index": torch.arange(4.0, device=device).flip(0).view(2, 2),
        "half": torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device).expand(2, 2),
        "transposed": torch.arange(4.0, device=device).view(2, 2).t(),
    }[kind]
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, reduction="none", backend=backend)
    assert loss.shape == (2, 2)
    _Upstream.apply(loss, upstream).sum().backward()
    expected = run_reference(logits, targets, weights, reduction="none", upstream=upstream.cpu())
    assert_gradient(leaf.grad, expected.gradient.to(device))


@pytest.mark.lesson("upstream gradient with stride 0")
@pytest.mark.lesson("rows scaled by the first upstream gradient")
@pytest.mark.parametrize("consumer", ["sum", "first rows", "every second", "masked", "weighted"])
def test_reductions_a_user_writes(backend, consumer, device):
    logits, targets = make_logits(4, V, device=device), make_targets(4, V=V, device=device)

    def reduce(loss):
        return {
            "sum": lambda: loss.sum(),
            "first rows": lambda: loss[:2].mean(),
            "every second": lambda: loss[1::2].sum(),
            "masked": lambda: loss[torch.tensor([False, True, True, False], device=device)].mean(),
            "weighted": lambda: (loss * torch.tensor([0.0, 1.0, -2.0, 0.5], device=device)).sum(),
        }[consumer]()

    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    reduce(pdl_cross_entropy(leaf, targets, reduction="none", backend=backend)).backward()
    reduce(F.cross_entropy(other, targets, reduction="none")).backward()
    assert other.grad.abs().max() > 0.01
    assert_gradient(leaf.grad, other.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_denominator_of_zero_survives_an_infinite_upstream_gradient(backend, device, reduction):
    leaf = torch.randn(3, 7, device=device, requires_grad=True)
    targets = torch.tensor([0, 1, 2], device=device)
    options = {"normalizer": 0.0} if reduction == "mean" else {"token_weights": torch.zeros(3, device=device)}
    loss = pdl_cross_entropy(leaf, targets, backend=backend, reduction=reduction, z_loss=0.1, **options)
    loss.backward(torch.full_like(loss, float("inf")))
    assert leaf.grad.count_nonzero() == 0
