"""What only a GPU can show: memory, repetition, waiting for the device, CUDA graphs, more than 2**31 logits."""

import pytest
import torch
from helpers import make_logits, make_targets, run, run_reference
from helpers.autograd import N, assert_gradient, producer
from helpers.autograd import V as FEW_CLASSES

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


@pytest.mark.gpu
@pytest.mark.lesson("synchronisation on the hot path")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_synchronisation(upstream, inplace, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    upstream = torch.tensor(upstream, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = pdl_cross_entropy(
            hidden, targets, weights, token_weights=torch.ones(N, device="cuda"), return_stats=True, inplace=inplace
        )
        loss.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_gradient(leaf.grad, upstream * expected)


@pytest.mark.gpu
@pytest.mark.lesson("synchronisation on the hot path")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_cuda_graph(problem, upstream):
    """Replays see other targets, weights and normalizers, and other upstream gradients met in between."""
    logits, targets, weights, _ = problem
    leaf = logits.clone().requires_grad_()
    normalizer = torch.tensor(7.0, device="cuda")

    def step():
        loss = pdl_cross_entropy(leaf, targets, weights, normalizer=normalizer)
        return torch.autograd.grad(upstream * loss, leaf)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    for replay in range(3):
        targets.copy_(targets.roll(replay))
        weights.copy_(weights.roll(replay))
        normalizer.fill_(7.0 + replay)
        exact = run_reference(logits, targets, weights, normalizer=normalizer).gradient
        gradient.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_gradient(gradient, upstream * exact.to(gradient.device))


@pytest.mark.gpu
@pytest.mark.lesson("32-bit offsets")
def test_more_than_2_to_the_31_logits():
    rows, V = 2**15 + 8, 2**16
    if torch.cuda.mem_get_info()[0] < 3 * rows * V * 2:
        pytest.skip("needs 13 GB of GPU memory")
    logits = torch.zeros(rows, V, dtype=torch.bfloat16, device="cuda")
    logits[-1, 7] = 5.0
    targets = torch.full((rows,), 7, device="cuda")
    targets[:-2] = -100
    leaf = logits.requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, reduction="none", backend="triton")
    expected = run_reference(logits[-2:].detach().clone(), targets[-2:], reduction="none")
    torch.testing.assert_close(loss[-2:].detach().cpu().double(), expected.loss, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(gradient[-2:].cpu().double(), expected.gradient, rtol=2**-7, atol=1e-7)
    assert gradient[0].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.lesson("launch on the current device")
def test_the_tensors_device_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    logits, targets = make_logits(N, FEW_CLASSES, device=device), make_targets(N, V=FEW_CLASSES, device=device)
    with torch.cuda.device(0):
        got = run("triton", logits, targets)
    assert got.loss.device == device
    assert_gradient(got.gradient, run_reference(logits, targets).gradient.to(device))
