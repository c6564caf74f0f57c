"""power_law_weights: the bare formula."""

import pytest
import torch

import reference
from pdl_kernels import power_law_weights


def test_formula():
    counts = torch.tensor([0, 1, 10, 10**9])
    for alpha, eps in ((0.0, 1e-7), (0.4, 1.0), (1.0, 1e-7), (2.0, 0.5)):
        weights = power_law_weights(counts, alpha, eps)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), reference.power_law_weights(counts, alpha, eps), rtol=1e-7, atol=0)


def test_paper_defaults_make_an_unseen_token_own_the_batch():
    assert power_law_weights(torch.tensor([0, 5])).tolist() == pytest.approx([1e7, 0.2], rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "alpha", "eps", "message"),
    [
        (torch.tensor([1, -2]), 1.0, 1.0, r"counts\[1\] is -2"),
        (torch.tensor([1.0, float("nan")]), 1.0, 1.0, r"counts\[1\] is nan"),
        (torch.tensor([[1]]), 1.0, 1.0, r"shape \(1, 1\)"),
        (torch.tensor([1]), -1.0, 1.0, "alpha is -1.0"),
        (torch.tensor([1]), float("nan"), 1.0, "alpha is nan"),
        (torch.tensor([1]), 1.0, -1.0, "eps is -1.0"),
        (torch.tensor([3, 0]), 1.0, 0.0, "entry 1 .* not finite"),
    ],
)
def test_bad_input(counts, alpha, eps, message):
    with pytest.raises(ValueError, match=message):
        power_law_weights(counts, alpha, eps)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="counts are list"):
        power_law_weights([1, 2])
