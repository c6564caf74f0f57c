"""The numbers that kernels read by name are cheap to compare, and compared."""

import importlib
import pkgutil

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl

from pdl_kernels import kernels
from pdl_kernels.kernels.constants import Constant

MODULES = [importlib.import_module(f"{kernels.__name__}.{one.name}") for one in pkgutil.iter_modules(kernels.__path__)]


def test_every_global_of_a_kernel_is_cheap_to_compare():
    found = {
        f"{module.__name__}.{name}": type(value)
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, tl.constexpr)
    }
    assert len(found) > 20
    assert {name: kind for name, kind in found.items() if kind is not Constant} == {}


@pytest.mark.parametrize(
    ("other", "differs"), [(Constant(3), False), (tl.constexpr(3), False), (3, False), (Constant(4), True), (4, True)]
)
def test_a_changed_global_is_seen(other, differs):
    assert (Constant(3) != other) is differs
    assert bool(other != Constant(3)) is differs  # as Triton asks


def test_a_global_that_is_gone_is_seen():
    assert (object() != Constant(3)) is True
