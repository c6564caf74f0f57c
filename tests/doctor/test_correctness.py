"""One case of `pdl-kernels doctor --check`: what is right passes, and what is wrong is found."""

import os

import pytest
import torch

from pdl_kernels.doctor import calls, cases, correctness
from pdl_kernels.doctor.cases import RECIPES, Case
from pdl_kernels.doctor.correctness import check_case

CPU = torch.device("cpu")


def assert_right(found):
    assert (found["status"], found["problem"]) == ("right", None)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_eager_backend_is_right(recipe, dtype):
    found = check_case(Case(recipe, 9, 130, dtype), CPU, "eager")
    assert_right(found)
    assert 0 <= found["share_of_allowed"] <= 1
    assert (found["gradient_error"] is None) == (recipe == "forward alone")


@pytest.mark.parametrize(
    "recipe", ["plain", "read twice", "few rows", "every option", "linear", "columns with a stride"]
)
def test_the_triton_backend_is_right(device, recipe):
    pytest.importorskip("triton", reason="Triton is not installed")
    before = dict(os.environ)
    assert_right(check_case(Case(recipe, 4, 130, "bfloat16"), device, "triton"))
    assert dict(os.environ) == before, "forcing a kernel leaves nothing behind"


def with_wrong(monkeypatch, spoil):
    """`pdl_cross_entropy` whose loss and logits pass through `spoil`."""
    real = calls.pdl_cross_entropy

    def wrong(logits, *arguments, **options):
        return spoil(logits, lambda given: real(given, *arguments, **options))

    monkeypatch.setattr(calls, "pdl_cross_entropy", wrong)


class Spoiled(torch.autograd.Function):
    """The identity, whose gradient is changed at one row and column."""

    @staticmethod
    def forward(ctx, logits, row, column, change):
        ctx.where = row, column, change
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, upstream):
        row, column, change = ctx.where
        gradient = upstream.clone()
        gradient[row, column] = change(gradient[row, column])
        return gradient, None, None, None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, loss: loss(x) * 1.0001, "loss: "),
        (lambda x, loss: loss(Spoiled.apply(x, 0, 5, lambda g: g + 0.02)), "gradient: "),
        (lambda x, loss: loss(Spoiled.apply(x, 0, 5, lambda g: g * torch.nan)), "gradient: "),
        (lambda x, loss: loss(Spoiled.apply(x, 1, 5, lambda g: g + 1e-9)), "rows that do not count have a gradient"),
        (lambda x, loss: loss(Spoiled.apply(x, 0, 5, lambda g: g * (1 + 1e-6 * torch.rand(())))), "gave other bits"),
        (lambda x, loss: loss(x) + 0 * x[1].detach().sum(), "loss: inf"),
    ],
    ids=["loss", "one element", "nan", "ignored row", "bits", "reads an ignored row"],
)
def test_what_is_wrong_is_found(monkeypatch, spoil, message):
    with_wrong(monkeypatch, spoil)
    found = check_case(Case("plain", 9, 130, "float32"), CPU, "eager")
    assert found["status"] == "wrong"
    assert message in found["problem"]


def test_the_smallest_steps_of_float16_are_no_fault():
    """A gradient of 1e-7 has nothing else left: seen on a GPU, where torch's rounding was the luckier one."""
    step = 2.0**-24
    exact = torch.full((9, 130), 1.4 * step, dtype=torch.float64)

    def share(ours, dtype):
        errors = correctness._errors(exact, (ours * step).to(dtype), exact)
        limits = torch.finfo(dtype)
        return errors.worst_ratio(limits.eps / 2, limits.smallest_normal * limits.eps)

    nearest = torch.ones(9, 130, dtype=torch.float64)
    assert share(nearest, torch.float16) < 1
    assert share(nearest, torch.float32) > 1, "float32 has smaller steps"
    assert share(3 * nearest, torch.float16) > 1
    nearest[0, 0] = 3
    assert share(nearest, torch.float16) > 1, "one element, in the maximum norm"


def test_wrong_statistics_are_found(monkeypatch):
    real = calls.pdl_cross_entropy

    def wrong(*arguments, **options):
        loss, stats = real(*arguments, **options)
        return loss, stats._replace(nll=stats.nll * 1.001)

    monkeypatch.setattr(calls, "pdl_cross_entropy", wrong)
    assert "nll is" in check_case(Case("statistics and z-loss", 9, 130, "float32"), CPU, "eager")["problem"]
