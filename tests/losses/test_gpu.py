"""What only a GPU can show and no other file asks: memory, repetition, the eager backend on a device."""

import pytest
import torch

from pdl_kernels import pdl_cross_entropy

pytestmark = pytest.mark.gpu
ROWS, V = 2048, 32000


def made_by_a_model(dtype=torch.bfloat16):
    leaf = torch.randn(ROWS, V, device="cuda", dtype=dtype, requires_grad=True)
    return leaf, leaf * 1.0


def peak_extra_bytes(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("inplace", "gradients"), [(False, 1), (True, 0)])
def test_peak_memory(inplace, gradients):
    _, logits = made_by_a_model()
    targets, weights = torch.randint(V, (ROWS,), device="cuda"), torch.rand(V, device="cuda")

    def run():
        loss = pdl_cross_entropy(logits, targets, weights, inplace=inplace)
        torch.autograd.grad(loss, logits)

    size = logits.numel() * logits.element_size()
    assert peak_extra_bytes(run) <= gradients * size + 0.02 * size


def test_peak_memory_without_gradient():
    _, logits = made_by_a_model()
    targets = torch.randint(V, (ROWS,), device="cuda")
    with torch.no_grad():
        extra = peak_extra_bytes(lambda: pdl_cross_entropy(logits, targets))
    assert extra <= 0.02 * logits.numel() * logits.element_size()


@pytest.mark.parametrize("rows", [3, ROWS], ids=["slices", "whole rows"])
def test_fifty_runs_give_the_same_bits(rows):
    leaf = torch.randn(rows, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets, weights = torch.randint(V, (rows,), device="cuda"), torch.rand(V, device="cuda")

    def run():
        loss = pdl_cross_entropy(leaf, targets, weights)
        return loss.detach(), torch.autograd.grad(loss, leaf, torch.tensor(0.25, device="cuda"))[0]

    first = run()
    for _ in range(50):
        again = run()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 30.0}, {"reduction": "none"}])
def test_eager_backend_on_a_gpu_equals_triton(options):
    leaf, logits = made_by_a_model(torch.float32)
    targets, weights = torch.randint(V, (ROWS,), device="cuda"), torch.rand(V, device="cuda")
    targets[::3] = -100
    results = []
    for backend in ("eager", "triton"):
        loss = pdl_cross_entropy(logits, targets, weights, backend=backend, **options)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-8)


def test_eager_backend_on_a_gpu_waits_for_nothing():
    _, logits = made_by_a_model()
    targets, weights = torch.randint(V, (ROWS,), device="cuda"), torch.rand(V, device="cuda")
    upstream = torch.tensor(0.25, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = pdl_cross_entropy(logits, targets, weights, backend="eager", return_stats=True, normalizer=3.0)
        torch.autograd.grad(loss, logits, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
