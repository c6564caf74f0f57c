"""inplace=True: the gradient takes the place of the logits, and autograd hears of it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import make_logits, make_targets, run_reference
from helpers.autograd import N, V, assert_gradient, producer

from pdl_kernels import pdl_cross_entropy


@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.0])
@pytest.mark.parametrize("layout", ["contiguous", "without the last position", "transposed"])
def test_inplace_gradient(backend, upstream, layout, device):
    if layout == "contiguous":
        logits = make_logits(N, V, device=device)
    elif layout == "without the last position":
        logits = make_logits(2, 3, V, device=device)[:, :-1]
    else:
        logits = make_logits(2, 2, V, device=device).transpose(0, 1)
    targets = make_targets(*logits.shape[:-1], V=V, device=device, ignored=(1,))
    leaf = torch.empty_strided(logits.shape, logits.stride(), device=device).copy_(logits).requires_grad_()
    hidden = leaf * 1
    version = hidden._version
    loss = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    assert hidden._version > version
    assert not torch.equal(hidden, logits)  # the gradient has moved in
    expected = run_reference(logits, targets, upstream=upstream)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    loss.backward(torch.tensor(upstream, device=device))
    assert_gradient(leaf.grad, expected.gradient.to(device))
    assert leaf.grad[targets == -100].count_nonzero() == 0


def test_inplace_gradient_of_few_long_rows(backend, device):
    """Rows may be split over programs; the one that overwrites the target's column must not mislead the others."""
    long = 1100
    logits = make_logits(2, long, dtype=torch.float16, device=device)
    targets = torch.tensor([0, long - 1], device=device)
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, inplace=True, softcap=8.0, z_loss=0.01, backend=backend)
    (3 * loss).backward()
    expected = run_reference(logits, targets, softcap=8.0, z_loss=0.01, upstream=3.0)
    torch.testing.assert_close(leaf.grad.double(), expected.gradient.to(device), rtol=2**-9, atol=2**-20)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_inplace_and_out_of_place_agree_bitwise(backend, problem, smoothing):
    logits, targets, weights, _ = problem
    gradients = []
    for inplace in (False, True):
        leaf, hidden = producer(logits)
        loss = pdl_cross_entropy(
            hidden, targets, weights, label_smoothing=smoothing, inplace=inplace, return_stats=True, backend=backend
        )[0]
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.lesson("gradient written over shared logits")
@pytest.mark.parametrize("who", ["consumer", "producer"])
def test_inplace_is_seen_by_whoever_saved_the_logits(backend, problem, who):
    logits, targets, _, _ = problem
    leaf = logits.clone().requires_grad_()
    hidden = leaf.exp() if who == "producer" else leaf * 1  # exp saves its result, and the result is the logits
    other = hidden.square().sum() if who == "consumer" else 0.0  # square saves its input
    loss = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.lesson("gradient written over shared logits")
def test_a_second_inplace_loss_is_an_error_in_the_backward_of_the_first(backend, problem):
    logits, targets, _, _ = problem
    _, hidden = producer(logits)
    first = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    second = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_an_inplace_loss_after_another_loss(backend, problem):
    """The first loss, out of place, has its gradient already; its second backward must raise."""
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    first = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    second = pdl_cross_entropy(hidden, targets, reduction="sum", inplace=True, backend=backend)
    summed = run_reference(logits, targets, reduction="sum").gradient.float().to(logits.device)
    (first + second).backward(retain_graph=True)
    assert_gradient(leaf.grad, expected + summed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_second_backward_in_place_raises(backend, problem, upstream):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    loss = upstream * pdl_cross_entropy(hidden, targets, weights, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    assert_gradient(leaf.grad, upstream * expected)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    assert_gradient(leaf.grad, upstream * expected)


def test_inplace_logits_changed_before_backward(backend, problem):
    """The gradient lives in the logits; who writes over them must hear of it."""
    logits, targets, _, _ = problem
    _, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    hidden.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "kind", ["leaf", "view of a leaf", "slice of a leaf", "expanded", "overlapping windows", "detached leaf"]
)
def test_inplace_refusals(backend, kind, device):
    leaf = make_logits(4, V, device=device).requires_grad_()
    logits = {
        "leaf": lambda: leaf,
        "view of a leaf": lambda: leaf.view(2, 2, V),
        "slice of a leaf": lambda: leaf[1:],
        "expanded": lambda: (leaf[:1] * 1).expand(4, V),
        "overlapping windows": lambda: (leaf * 1).view(-1).unfold(0, V, 3),
        "detached leaf": lambda: leaf.detach().requires_grad_(),
    }[kind]()
    before = leaf.detach().clone()
    targets = make_targets(*logits.shape[:-1], V=V, device=device)
    with pytest.raises(ValueError, match="inplace=True"):
        pdl_cross_entropy(logits, targets, inplace=True, backend=backend)
    assert torch.equal(leaf, before)
    assert pdl_cross_entropy(logits, targets, backend=backend).isfinite()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "no requires_grad", "no_grad leaf"])
def test_inplace_touches_nothing_where_no_gradient_is_needed(backend, problem, how):
    logits, targets, weights, _ = problem
    expected = run_reference(logits, targets, weights).loss.item()
    mine = logits.clone()
    if how == "no requires_grad":
        loss = pdl_cross_entropy(mine, targets, weights, inplace=True, backend=backend)
    elif how == "inference_mode":
        with torch.inference_mode():
            mine = mine * 1
            loss = pdl_cross_entropy(mine, targets, weights, inplace=True, backend=backend)
    else:
        mine.requires_grad_()
        mine = mine if how == "no_grad leaf" else mine * 1
        with torch.no_grad():
            loss = pdl_cross_entropy(mine, targets, weights, inplace=True, backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert not loss.requires_grad
    assert torch.equal(mine, logits)
    assert how == "inference_mode" or mine._version == 0


def test_inplace_with_reduction_none(backend, problem):
    """Documented to be without effect: right, and as often as one likes."""
    logits, targets, weights, _ = problem
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, weights, reduction="none", inplace=True, backend=backend)
    upstream = torch.tensor([0.0, 1.0, -2.0])
    loss.backward(upstream.to(loss.device))
    expected = run_reference(logits, targets, weights, reduction="none", upstream=upstream).gradient
    assert_gradient(leaf.grad, expected.to(logits.device))


def test_inplace_through_a_model(backend, device):
    """A head, its output cut by one position, and an optimiser step: parameters get torch's gradients."""
    torch.manual_seed(1)
    head = torch.nn.Linear(8, V).to(device)
    hidden = torch.randn(2, 3, 8, device=device)
    labels = make_targets(2, 3, V=V, device=device)
    loss = pdl_cross_entropy(head(hidden)[:, :-1], labels[:, 1:], inplace=True, backend=backend)
    got = torch.autograd.grad(loss, list(head.parameters()))
    torchs = F.cross_entropy(head(hidden)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    for ours, expected in zip(got, torch.autograd.grad(torchs, list(head.parameters())), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_inplace_gradcheck_by_differences(backend, problem):
    """In place, with the loss's own finite differences as the yardstick."""
    logits, targets, weights, _ = problem
    leaf, hidden = producer(logits)
    pdl_cross_entropy(hidden, targets, weights, softcap=4.0, inplace=True, backend=backend).backward()
    direction = torch.randn(N, V, generator=torch.Generator().manual_seed(5)).to(logits.device)
    ahead, behind = (
        run_reference(logits.double() + step * direction, targets, weights, softcap=4.0).loss for step in (1e-5, -1e-5)
    )
    slope = ((ahead - behind) / 2e-5).item()
    assert (leaf.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)
