"""The loss fused with the output projection: values, gradients, packing, sampling, compilation."""

import pytest
import torch

import reference
from pdl_kernels import PDLLinearCrossEntropyLoss, pdl_linear_cross_entropy
from pdl_kernels.ops.linear_chunks import plan_chunk
from pdl_kernels.ops.products import BLOCK, add_product

N, H, V = 23, 16, 77
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest element


def make(dtype=torch.float32, rows=N):
    hidden = torch.randn(rows, H).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(V, H)).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    targets = torch.randint(V, (rows,))
    return hidden, weight, bias, targets


def relative_error(value, expected):
    return ((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


OPTIONS = {
    "plain": {},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "softcap, scale and statistics": {"softcap": 5.0, "logit_scale": 1.5, "return_stats": True},
    "not compact": {"compact": False},
    "chunks of 7": {"chunk_size": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_against_float64(dtype, reduction, options, backend, device):
    hidden, weight, bias, targets = make(dtype)
    targets[3] = targets[9] = -100
    table, token_weights = 2 * torch.rand(V), torch.randn(N)
    table[targets[5]] = 0
    on = [t.detach().to(device).requires_grad_() for t in (hidden, weight, bias)]
    result = pdl_linear_cross_entropy(
        on[0], on[1], targets.to(device), table.to(device), bias=on[2], token_weights=token_weights.to(device),
        reduction=reduction, backend=backend, **options,
    )  # fmt: skip
    loss = result[0] if isinstance(result, tuple) else result
    upstream = torch.randn(N) if reduction == "none" else torch.tensor(1 / 3)
    gradients = torch.autograd.grad(loss, on, upstream.to(device), retain_graph=True)
    again = torch.autograd.grad(loss, on, upstream.to(device))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))

    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    known = {k: v for k, v in options.items() if k in ("label_smoothing", "z_loss", "softcap", "logit_scale")}
    expected, stats = reference.reference_cross_entropy(
        exact[0] @ exact[1].T + exact[2], targets, table, token_weights=token_weights, reduction=reduction, **known
    )
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for value, right in zip((loss, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(value.detach().cpu(), right.detach()) <= TOLERANCE[dtype]
    if isinstance(result, tuple):
        assert result[1].nll.item() == pytest.approx(stats.nll.item(), rel=3 * TOLERANCE[dtype])
        assert result[1].token_count.item() == stats.token_count.item()


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_gradients_only_where_needed(needs, backend, device):
    tensors = [t.detach().to(device).requires_grad_(bool(n)) for t, n in zip(make()[:3], needs, strict=True)]
    targets = torch.randint(V, (N,), device=device)
    loss = pdl_linear_cross_entropy(tensors[0], tensors[1], targets, bias=tensors[2], chunk_size=5, backend=backend)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    assert [t.grad is not None for t in tensors] == [bool(n) for n in needs]


@pytest.mark.parametrize("compact", [None, True, False])
def test_rows_that_do_not_count_may_hold_nan(compact, backend, device):
    hidden, weight, _, targets = make()
    targets[[2, 7, 8]] = -100
    with torch.no_grad():
        hidden[[2, 7, 8]] = float("nan")
    on = [t.detach().to(device).requires_grad_() for t in (hidden, weight)]
    pdl_linear_cross_entropy(*on, targets.to(device), compact=compact, backend=backend).backward()
    kept = targets != -100
    clean = [t.detach().clone().requires_grad_() for t in (hidden[kept], weight)]
    torch.nn.functional.cross_entropy(clean[0] @ clean[1].T, targets[kept]).backward()
    torch.testing.assert_close(on[1].grad.cpu(), clean[1].grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(on[0].grad.cpu()[kept], clean[0].grad, rtol=1e-5, atol=1e-7)
    assert (on[0].grad.cpu()[~kept] == 0).all()


def test_nothing_counted(backend, device):
    hidden, weight, _, _ = (t.detach().to(device) for t in make())
    hidden.requires_grad_()
    loss = pdl_linear_cross_entropy(hidden, weight, torch.full((N,), -100, device=device), backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()


def test_the_compiler_sees_one_operator():
    hidden, weight, _, targets = make()
    compiled = torch.compile(pdl_linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        losses = [f(hidden, weight, targets, reduction=reduction) for f in (compiled, pdl_linear_cross_entropy)]
        first, second = (torch.autograd.grad(0.5 * loss.sum(), (hidden, weight)) for loss in losses)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_float16_gradients_survive_loss_scaling():
    """At 1 / denominator they are below float16's smallest number; their products are not formed there."""
    hidden, weight, _, targets = make(torch.float16)
    loss = pdl_linear_cross_entropy(hidden, weight, targets, normalizer=1e6)
    gradient = torch.autograd.grad(loss, weight, torch.tensor(65536.0))[0]
    exact = weight.detach().double().requires_grad_()
    logits = hidden.detach().double() @ exact.T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 1e6
    right = torch.autograd.grad(expected, exact)[0] * 65536
    assert relative_error(gradient, right) < 2e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_sampling_is_unbiased(reduction):
    hidden, weight, _, targets = make(rows=60)
    table = 10 * torch.rand(V) ** 6
    exact_loss = pdl_linear_cross_entropy(hidden, weight, targets, table, reduction=reduction)
    exact = torch.autograd.grad(exact_loss.sum(), (hidden, weight))
    mean = [torch.zeros_like(t) for t in exact]
    seeds = 400
    for seed in range(seeds):
        loss = pdl_linear_cross_entropy(
            hidden, weight, targets, table, reduction=reduction, row_sampling=0.2, seed=seed
        )
        assert torch.allclose(loss, exact_loss, rtol=1e-5)
        for total, gradient in zip(mean, torch.autograd.grad(loss.sum(), (hidden, weight)), strict=True):
            total += gradient / seeds
    for a, b in zip(mean, exact, strict=True):
        assert relative_error(a, b.double()) < 5e-3


def test_double_backward_is_refused():
    hidden, weight, _, targets = make()
    loss = pdl_linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
        ({"row_sampling": 1.0}, ValueError, "row_sampling is 1.0"),
        ({"row_sampling": 0.1, "z_loss": 0.1}, ValueError, "z_loss"),
        ({"accumulate_dtype": torch.int32}, TypeError, "accumulate_dtype"),
        ({"lm_head_weight": torch.nn.Linear(H, V)}, TypeError, "module.weight"),
        ({"lm_head_weight": torch.empty(0)}, ValueError, "no elements"),
        ({"lm_head_weight": torch.zeros(V, H, dtype=torch.bfloat16)}, TypeError, "one dtype for all"),
        ({"lm_head_weight": torch.zeros(V, H + 1)}, ValueError, "hidden has shape"),
        ({"weight": torch.ones(V)}, TypeError, "torch's weight= is called weights="),
    ],
)
def test_errors(change, error, message):
    hidden, weight, _, targets = make()
    arguments = {"hidden": hidden, "lm_head_weight": weight, "targets": targets, **change}
    with pytest.raises(error, match=message):
        pdl_linear_cross_entropy(**arguments)


def test_plan_chunk_keeps_its_bound():
    for rows in (1, 100, 2049, 16384):
        for hidden_size, vocab_size, itemsize in ((512, 32000, 4), (4096, 128256, 2), (64, 262144, 4)):
            chunk = plan_chunk(rows, hidden_size, vocab_size, itemsize)
            most = max(64 * 2**20, vocab_size * hidden_size, 128 * vocab_size * itemsize)
            assert chunk >= 1
            assert chunk * vocab_size * itemsize <= most


@pytest.mark.parametrize("shape", [(BLOCK + 3, 5, 7), (5, BLOCK + 3, 7)])
def test_products_accumulate_wider_than_their_operands(shape):
    m, k, n = shape
    left, right = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    total = torch.full((m, n), float("nan"))
    add_product(total, left, right, first=True)
    add_product(total, left, right, first=False)
    torch.testing.assert_close(total.double(), 2 * left.double() @ right.double(), rtol=1e-5, atol=1e-3)


def test_module():
    hidden, weight, _, targets = make()
    table = torch.rand(V)
    criterion = PDLLinearCrossEntropyLoss(table, reduction="token_mean", chunk_size=4)
    expected = pdl_linear_cross_entropy(hidden, weight, targets, table, reduction="token_mean")
    torch.testing.assert_close(criterion.bfloat16()(hidden, weight, targets), expected)
    assert criterion.weights.dtype == torch.float32
    assert not criterion.state_dict()
