"""What every test shares: the interpreter where there is no GPU, seeds, the two backends."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# Triton reads this when the kernels are defined, so it must be set before anything imports them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# The reference lives beside the package and is not installed with it.
ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    # numpy, under Triton's interpreter, reports every exp2 of a large negative number.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20250522)


@pytest.fixture(params=["eager", "triton", "triton, row on chip"])
def backend(request):
    """The backend to ask for. Both ways to form loss and gradient in Triton run: the row read twice, and held."""
    if request.param == "eager":
        return "eager"
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param != "triton":
        request.getfixturevalue("force_kernel")("single pass")
    return "triton"


@pytest.fixture
def force_kernel(monkeypatch):
    """A function that lets Triton form losses with the kernel of this name, for this test."""
    from pdl_kernels.ops import repeated_calls

    def force(name):
        monkeypatch.setenv("PDL_KERNELS_FORCE_KERNEL", name)
        repeated_calls.forget()

    yield force
    repeated_calls.forget()


@pytest.fixture
def forgotten_calls():
    """Calls are worked out anew in this test, which replaces what works them out, and after it."""
    from pdl_kernels.ops import repeated_calls

    repeated_calls.forget()
    yield
    repeated_calls.forget()


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
