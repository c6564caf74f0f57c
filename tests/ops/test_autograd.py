"""What the loss promises as a citizen of autograd, on both backends."""

import pytest
import torch
from helpers import make_logits, make_targets, make_weights, run, run_reference
from helpers.autograd import N, V, assert_gradient, producer

from pdl_kernels import pdl_cross_entropy


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_leaf_through_a_view_with_many_upstream_gradients(backend, reduction, problem):
    """.grad may share the storage of the first gradient; no later backward may touch that."""
    logits, targets, weights, _ = problem
    expected = run_reference(logits, targets, weights, reduction=reduction).gradient.float().to(logits.device)
    leaf = logits.clone().view(-1).requires_grad_()
    loss = pdl_cross_entropy(leaf.view(N, V), targets, weights, reduction=reduction, backend=backend)
    seen = []
    for upstream in (1.0, 3.0, 0.0, 0.5, 1.0):
        leaf.grad = None
        loss.backward(torch.full_like(loss, upstream), retain_graph=True)
        assert_gradient(leaf.grad.view(N, V), upstream * expected)
        seen.append((leaf.grad, leaf.grad.clone()))
    for kept, copied in seen:  # none of them changed after it was handed over
        assert torch.equal(kept, copied)


def test_the_first_upstream_gradient_is_not_one(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    for upstream in (3.0, 1.0, 0.0, 1.0):
        leaf.grad = None
        loss.backward(torch.tensor(upstream, device=leaf.device), retain_graph=True)
        assert_gradient(leaf.grad, upstream * expected)


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_autograd_grad_twice(backend, problem, upstream):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = upstream * pdl_cross_entropy(leaf, targets, weights, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert_gradient(first, upstream * expected)
    assert_gradient(second, upstream * expected)
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_gradients_accumulate_over_backwards(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert_gradient(leaf.grad, times * expected)


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("change", ["clip", "zero"])
def test_grad_changed_in_place_between_two_backwards(backend, problem, change):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    loss.backward(retain_graph=True)
    if change == "clip":
        norm = torch.nn.utils.clip_grad_norm_([leaf], 1e-3)
        left = expected * (1e-3 / norm)
    else:
        leaf.grad.zero_()
        left = torch.zeros_like(expected)
    loss.backward()
    assert_gradient(leaf.grad, left + expected)
    assert torch.equal(leaf, logits)  # the logits are not what was changed


def test_hooks_see_and_replace_the_gradient(backend, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    seen = []
    hidden.register_hook(lambda gradient: seen.append(gradient.clone()))
    hidden.register_hook(lambda gradient: gradient.mul_(2))  # in place, which autograd does not forbid
    loss = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    loss.backward(retain_graph=True)
    assert_gradient(seen[0], expected)
    assert_gradient(leaf.grad, 2 * expected)
    loss.backward()
    assert_gradient(seen[1], expected)
    assert_gradient(leaf.grad, 4 * expected)


@pytest.mark.lesson("gradient written over shared logits")
def test_two_losses_on_one_tensor(backend, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    ours = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    again = pdl_cross_entropy(hidden, targets, reduction="sum", backend=backend)
    torchs = hidden.square().sum()
    (ours + 2 * again + 3 * torchs).backward()
    summed = run_reference(logits, targets, reduction="sum").gradient.float().to(logits.device)
    assert_gradient(leaf.grad, expected + 2 * summed + 6 * logits)


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradients_of_the_statistics_do_not_exist(backend, problem, inplace):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    loss, stats = pdl_cross_entropy(hidden, targets, weights, return_stats=True, inplace=inplace, backend=backend)
    assert all(not value.requires_grad and value.dim() == 0 for value in stats)
    assert all(value.device == logits.device for value in stats)
    loss.backward()
    assert_gradient(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0}], ids=["plain", "all"])
def test_autocast_leaves_the_numbers_alone(backend, problem, dtype, options):
    logits, targets, weights, _ = problem
    plain = run(backend, logits, targets, weights, upstream=3.0, **options)
    with torch.autocast(logits.device.type, dtype=dtype):
        cast = run(backend, logits, targets, weights, upstream=3.0, **options)
    assert cast.loss.dtype == torch.float32
    assert torch.equal(cast.loss, plain.loss)
    assert torch.equal(cast.gradient, plain.gradient)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"reduction": "token_mean", "label_smoothing": 0.2},
        {"normalizer": 3.0, "z_loss": 0.1},
        {"reduction": "sum", "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1},
        {"reduction": "none", "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("token_weights", [False, True])
def test_gradcheck(options, token_weights, device):
    logits = make_logits(3, 7, device=device, spread=1.0).double().requires_grad_()
    targets = make_targets(3, V=7, device=device, ignored=(1,))
    weights = make_weights("random", 7, device).double() + 0.1
    u = torch.tensor([-1.5, 1.0, 0.5], device=device) if token_weights else None

    def loss(x):
        return pdl_cross_entropy(x, targets, weights, token_weights=u, backend="eager", **options)

    assert torch.autograd.gradcheck(loss, (logits,), check_undefined_grad=False)


@pytest.mark.parametrize(("rows", "V"), [(4, 37), (2, 1100)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bitwise_deterministic(backend, rows, V, reduction, device):
    logits, targets = make_logits(rows, V, device=device), make_targets(rows, V=V, device=device)
    weights = make_weights("random", V, device) + 0.1
    options = {"z_loss": 0.1, "return_stats": True, "upstream": 3.0, "reduction": reduction}
    first = run(backend, logits, targets, weights, **options)
    again = run(backend, logits.clone(), targets.clone(), weights, **options)
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.gradient, again.gradient)
    assert all(torch.equal(a, b) for a, b in zip(first.stats, again.stats, strict=True))


def test_threads_do_not_change_the_result(device):
    logits, targets = make_logits(64, 500, device=device), make_targets(64, V=500, device=device)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run("eager", logits, targets, upstream=3.0))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0].gradient, results[1].gradient, rtol=1e-6, atol=1e-9)
