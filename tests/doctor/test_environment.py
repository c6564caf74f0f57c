"""Which backend would run, and why: the explanation agrees with the choice."""

import pytest
import torch

from pdl_kernels import backends


@pytest.mark.parametrize("triton", [None, "Triton cannot be imported (gone)"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:pdl_kernels runs its slower")
def test_explanations_agree_with_the_choice(monkeypatch, triton, device, dtype):
    monkeypatch.setattr(backends, "triton_import_problem", lambda: triton)
    chosen, why = backends.explain_auto(torch.device(device), dtype)
    assert chosen == backends.choose_backend("auto", torch.device(device), dtype)
    if device == "cuda" and dtype != torch.float64:
        assert why == (triton or "the fused kernels run on this device")
