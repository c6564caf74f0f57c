"""What the loss is divided by: numbers and tensors of every kind, zero, and what is no denominator."""

import pytest
import torch
from helpers import (
    assert_within_torch,
    make_logits,
    make_targets,
    make_weights,
    run,
    run_reference,
    run_torch,
)

INF = torch.inf
V = 37


@pytest.mark.lesson("normalizer counted in a half dtype")
@pytest.mark.parametrize(
    "normalizer",
    [
        3,
        0.5,
        torch.tensor(4.0),
        torch.tensor(4099, dtype=torch.int64),  # no half dtype holds 4099
        torch.tensor(3, dtype=torch.int32),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor(2.5, dtype=torch.float16),
        torch.tensor(1 / 3, dtype=torch.float64),
        torch.tensor(7, dtype=torch.uint8),
        torch.tensor(True),
    ],
    ids=lambda value: str(value) if not isinstance(value, torch.Tensor) else str(value.dtype),
)
def test_normalizer_kinds(backend, normalizer, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    weights = make_weights("random", V, device)
    as_number = float(normalizer)
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    got = run(backend, logits, targets, weights, normalizer=normalizer, z_loss=0.01)
    expected = run_reference(logits, targets, weights, normalizer=as_number, z_loss=0.01)
    torchs = run_torch(logits, targets, weights, normalizer=as_number, z_loss=0.01)
    assert_within_torch(got.loss, expected.loss, torchs.loss, "loss")
    assert_within_torch(got.gradient, expected.gradient, torchs.gradient, "gradient")


def test_normalizer_tensor_on_the_cpu_serves_logits_anywhere(backend, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    loss = run(backend, logits, targets, normalizer=torch.tensor(8.0)).loss
    expected = run_reference(logits, targets, normalizer=8.0).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor(0, dtype=torch.int64)])
def test_normalizer_zero_gives_zero(backend, zero, z_loss, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    normalizer = zero.to(device) if isinstance(zero, torch.Tensor) else zero
    got = run(backend, logits, targets, normalizer=normalizer, z_loss=z_loss, upstream=2.0)
    assert got.loss.item() == 0
    assert got.gradient.count_nonzero() == 0


@pytest.mark.parametrize(("value", "name"), [(-2.0, "negative"), (INF, "inf"), (torch.nan, "nan")])
def test_normalizer_tensor_that_is_no_denominator_propagates(backend, value, name, device):
    logits = make_logits(3, V, device=device)
    targets = make_targets(3, V=V, device=device, ignored=(1,))
    got = run(backend, logits, targets, normalizer=torch.tensor(value, device=device))
    summed = run_reference(logits, targets, reduction="sum")
    if name == "nan":
        assert got.loss.isnan()
        assert got.gradient[[0, 2]].isnan().all()  # the ignored row has a test of its own
    else:
        assert got.loss.item() == pytest.approx(summed.loss.item() / value, rel=1e-6)
        torch.testing.assert_close(got.gradient.cpu().double(), summed.gradient / value, rtol=1e-5, atol=1e-7)


@pytest.mark.lesson("0 * -inf")
def test_an_ignored_row_stays_zero_under_a_nan_normalizer(backend, device):
    logits = make_logits(3, V, device=device)
    targets = make_targets(3, V=V, device=device, ignored=(1,))
    got = run(backend, logits, targets, normalizer=torch.tensor(torch.nan, device=device))
    assert got.gradient[1].count_nonzero() == 0
