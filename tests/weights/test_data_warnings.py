"""Which special tokens are named as heavy; the rest is tested through `pdl-kernels weights`."""

import pytest
import torch

from pdl_kernels.weights.data_warnings import special_token_warnings


@pytest.mark.parametrize(("weight", "warned"), [(2.0, False), (6.0, True)])
def test_only_the_heaviest_hundredth_of_the_types_is_heavy(weight, warned):
    weights = torch.ones(400)
    weights[:10] = 5.0
    weights[10] = weight  # above the mean; among the four heaviest or not
    found = special_token_warnings([10], weights, torch.ones(400), 1.0, str)
    assert [text.startswith("special tokens are among the heaviest types: 10, ") for text in found] == [True] * warned
