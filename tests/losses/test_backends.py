"""Which backend runs, and what is said where the one that was asked for cannot."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_error

from pdl_kernels import pdl_cross_entropy

V = 20


@pytest.mark.needs_driver(reason="its tensors all say that they are on a GPU")
def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = lambda: pdl_cross_entropy(torch.zeros(2, V), torch.zeros(2, dtype=torch.int64), backend="triton")  # noqa: E731
    assert_error(RuntimeError, call, "backend='triton'", "CPU", "TRITON_INTERPRET=1")


def test_triton_takes_no_float64(device):
    logits, targets = torch.zeros(2, V, device=device).double(), torch.zeros(2, dtype=torch.int64, device=device)
    call = lambda: pdl_cross_entropy(logits, targets, backend="triton")  # noqa: E731
    assert_error(RuntimeError, call, "backend='triton'", "float64", "float16", "bfloat16", "float32")
    assert pdl_cross_entropy(logits, targets).dtype == torch.float64  # "auto" knows


@pytest.mark.lesson("fused path switched off in silence")
def test_auto_on_a_cpu_is_eager_and_imports_no_triton():
    program = (
        "import sys, torch, pdl_kernels\n"
        "pdl_kernels.pdl_cross_entropy(torch.zeros(2, 5), torch.tensor([1, 2]))\n"
        "assert 'triton' not in sys.modules, 'Triton was imported'\n"
        "assert not [name for name in sys.modules if name.startswith('pdl_kernels.kernels')]\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)


@pytest.mark.lesson("fused path switched off in silence")
def test_without_triton_nothing_falls_back_in_silence():
    """A machine without Triton: the package works, and backend="triton" says why it cannot."""
    program = (
        "import sys, os\n"
        "sys.modules['triton'] = None\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch, pdl_kernels\n"
        "inputs = torch.zeros(2, 5), torch.tensor([1, 2])\n"
        "pdl_kernels.pdl_cross_entropy(*inputs)\n"
        "try:\n"
        "    pdl_kernels.pdl_cross_entropy(*inputs, backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'Triton' in str(error) and 'import' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('it ran')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.lesson("fused path switched off in silence")
def test_versions_that_are_too_old_are_refused():
    program = (
        "import os\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch\n"
        "right, torch.__version__ = torch.__version__, '2.10.1+cpu'\n"
        "try:\n"
        "    import pdl_kernels\n"
        "except ImportError as error:\n"
        "    assert '2.11' in str(error) and '2.10.1' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('old torch was accepted')\n"
        "torch.__version__ = right\n"
        "import triton, pdl_kernels\n"
        "triton.__version__ = '3.5.1'\n"
        "try:\n"
        "    pdl_kernels.pdl_cross_entropy(torch.zeros(2, 5), torch.tensor([1, 2]), backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert '3.6' in str(error) and '3.5.1' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('old Triton was accepted')\n"
    )
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
