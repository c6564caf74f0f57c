"""The module of the loss: the function's numbers, and weights that stay float32 and out of checkpoints."""

import pytest
import torch
from helpers import assert_error, make_logits, make_targets, make_weights, run_reference

from pdl_kernels import LossStats, PDLCrossEntropyLoss, pdl_cross_entropy

V = 20


@pytest.fixture
def inputs(device):
    return make_logits(2, 3, V, device=device), make_targets(2, 3, V=V, device=device)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0, "logit_scale": 0.5}]
)
def test_the_module_is_the_function(backend, options, inputs):
    logits, targets = inputs
    weights = make_weights("random", V, logits.device)
    u = torch.rand(2, 3, generator=torch.Generator().manual_seed(1)).to(logits.device)
    criterion = PDLCrossEntropyLoss(weights, backend=backend, return_stats=True, **options)
    loss, stats = criterion(logits, targets, token_weights=u)
    expected, expected_stats = pdl_cross_entropy(
        logits, targets, weights, token_weights=u, backend=backend, return_stats=True, **options
    )
    assert torch.equal(loss, expected)
    assert isinstance(stats, LossStats)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))
    oracle = run_reference(logits, targets, weights, token_weights=u, **options).loss
    torch.testing.assert_close(loss.cpu().double(), oracle, rtol=3e-6, atol=1e-6)


def test_the_modules_normalizer_and_the_calls(inputs):
    criterion = PDLCrossEntropyLoss(normalizer=2.0)
    by_construction, by_call = criterion(*inputs), criterion(*inputs, normalizer=4.0)
    assert by_construction.item() == pytest.approx(2 * by_call.item(), rel=1e-6)
    assert by_call.item() == pytest.approx(pdl_cross_entropy(*inputs, normalizer=4.0).item(), rel=1e-6)


@pytest.mark.lesson("weights rounded with the model")
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(device="cpu", dtype=torch.float16),
        lambda m: m.type(torch.float16),
        lambda m: m.half().float(),
    ],
    ids=["half", "bfloat16", "double", "to dtype", "to device and dtype", "type", "there and back"],
)
def test_the_modules_weights_stay_float32(cast):
    weights = torch.logspace(-7, 7, V)
    model = torch.nn.Sequential(torch.nn.Linear(3, V), PDLCrossEntropyLoss(weights))
    criterion = cast(model)[1]
    assert criterion.weights.dtype == torch.float32
    assert torch.equal(criterion.weights.cpu(), weights)


def test_the_modules_weights_move_but_are_not_saved():
    weights = torch.rand(V)
    criterion = PDLCrossEntropyLoss(weights)
    assert criterion.state_dict() == {}
    assert "weights" in dict(criterion.named_buffers())
    assert list(criterion.parameters()) == []
    criterion.load_state_dict({})
    assert criterion.to("meta").weights.is_meta
    half = PDLCrossEntropyLoss(weights)
    assert half.to("meta", torch.float16).weights.is_meta
    assert half.weights.dtype == torch.float32
    weights.zero_()
    assert PDLCrossEntropyLoss(weights + 1).weights.sum() == V
    assert criterion.to_empty(device="cpu").weights.shape == (V,)


def test_the_module_owns_its_weights(inputs):
    weights = torch.rand(V, device=inputs[0].device)
    criterion = PDLCrossEntropyLoss(weights)
    before = criterion(*inputs)
    weights.fill_(torch.nan)
    assert torch.equal(criterion(*inputs), before)


@pytest.mark.gpu
def test_the_modules_weights_follow_to_the_gpu(inputs):
    criterion = PDLCrossEntropyLoss(torch.rand(V)).cuda().half()
    assert criterion.weights.is_cuda
    assert criterion.weights.dtype == torch.float32
    assert criterion(*inputs).isfinite()


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (torch.ones(2, V), ValueError, ["weights", "(2, 20)"]),
        (torch.ones(V, dtype=torch.int64), TypeError, ["weights", "int64", "floating"]),
        ([1.0], TypeError, ["weights", "list"]),
        (torch.ones(V, requires_grad=True), NotImplementedError, ["weights", "grad"]),
    ],
)
def test_wrong_weights_of_the_module(weights, error, words):
    assert_error(error, lambda: PDLCrossEntropyLoss(weights), *words)


@pytest.mark.parametrize(
    ("normalizer", "reduction", "error"),
    [(-1.0, "mean", ValueError), (4.0, "sum", ValueError), ("4", "mean", TypeError)],
)
def test_wrong_normalizers_of_the_module_show_at_construction(normalizer, reduction, error):
    assert_error(error, lambda: PDLCrossEntropyLoss(normalizer=normalizer, reduction=reduction), "normalizer")


def test_the_module_can_be_printed():
    text = repr(PDLCrossEntropyLoss(torch.ones(V), label_smoothing=0.1, reduction="sum"))
    assert "label_smoothing=0.1" in text
    assert "reduction='sum'" in text
