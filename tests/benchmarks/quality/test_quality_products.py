"""Products of bfloat16 numbers on CPUs without instructions for them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.quality.products import PRODUCTS, ProductsInFloat32, multiplied_by, products

CPU = torch.device("cpu")
KINDS = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear with a bias": lambda x, w, b: F.linear(x, w, b),
    "mm": lambda x, w, b: x @ w.T,
    "bmm": lambda x, w, b: torch.bmm(x[None], w.T[None]),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w.T[None], alpha=0.5),
}


class Recorder(TorchDispatchMode):
    """Keeps the types in which products were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            self.dtypes += [value.dtype for value in args if isinstance(value, Tensor)]
        return function(*args, **(kwargs or {}))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


X, W, B = numbers(50, 64), numbers(30, 64, seed=1), numbers(30, seed=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_product_is_computed_in_float32_and_rounded(kind, inference):
    exact = KINDS[kind](X.double(), W.double(), B.double())
    with Recorder() as recorder, ProductsInFloat32(), torch.inference_mode() if inference else nullcontext():
        found = KINDS[kind](X, W, B)
    assert recorder.dtypes
    assert set(recorder.dtypes) == {torch.float32}
    assert found.dtype == torch.bfloat16
    assert (found != exact.to(torch.bfloat16)).double().mean() < 0.01  # where the sum is half way between two numbers
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_gradients_under_autocast_are_computed_in_float32_too():
    weight = W.float().requires_grad_()
    with Recorder() as recorder, ProductsInFloat32():
        with torch.autocast("cpu", torch.bfloat16):
            product = F.linear(X.float(), weight)
        product.float().square().sum().backward()
    assert product.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert len(recorder.dtypes) == 4, "a product there and one back"
    assert set(recorder.dtypes) == {torch.float32}
    expected = 2 * product.double().T @ X.double()
    torch.testing.assert_close(weight.grad.double(), expected, rtol=2**-8, atol=1e-3)


def test_products_of_other_types_stay_as_they_are():
    for dtype in (torch.float64, torch.float16):
        with Recorder() as recorder, ProductsInFloat32():
            assert F.linear(X.to(dtype), W.to(dtype)).dtype == dtype
        assert set(recorder.dtypes) == {dtype}


@pytest.mark.parametrize(
    ("amx", "avx512", "multiplier"),
    [(True, False, "the hardware"), (False, True, "the hardware"), (False, False, "float32, rounded")],
)
def test_what_multiplies_is_told_and_used(monkeypatch, amx, avx512, multiplier):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert multiplied_by(CPU, torch.bfloat16) == multiplier
    assert isinstance(products(CPU, torch.bfloat16), ProductsInFloat32) == (multiplier == "float32, rounded")
    for device, dtype in ((CPU, torch.float32), (torch.device("cuda"), torch.bfloat16)):
        assert multiplied_by(device, dtype) == "the hardware"
        assert not isinstance(products(device, dtype), ProductsInFloat32)
