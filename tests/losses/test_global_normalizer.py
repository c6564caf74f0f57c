"""The one denominator of a step: its value, and that the parts of a step add up to one big batch."""

from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks

from pdl_kernels import global_normalizer, pdl_cross_entropy

RANKS = Path(__file__).resolve().parents[1] / "distributed" / "ranks"
TARGETS = [torch.tensor([[3, 1, -100]]), torch.tensor([[2], [0]]), torch.tensor([], dtype=torch.int32)]
U = [torch.tensor([[2.0, 0.0, torch.nan]]), torch.tensor([[-3.0], [1.0]]), torch.tensor([])]
W = torch.tensor([0.5, 1e7, 2.0, 0.0])


@pytest.mark.parametrize(
    ("weights", "token_weights", "expected"),
    [
        (None, None, 4),
        (W, None, 0.0 + 1e7 + 2 + 0.5),
        (None, U, 2 + 3 + 1),
        (W, U, 0 * 2 + 2 * 3 + 0.5),
    ],
    ids=["counted tokens", "weights", "token weights", "both"],
)
def test_the_value(weights, token_weights, expected):
    found = global_normalizer(TARGETS, weights=weights, token_weights=token_weights)
    assert found.dtype == torch.float64
    assert found.dim() == 0
    assert found.item() == expected
    one = torch.cat([t.reshape(-1).long() for t in TARGETS])
    u = None if token_weights is None else torch.cat([t.reshape(-1) for t in token_weights])
    assert global_normalizer(one, weights=weights, token_weights=u) == found


def test_another_ignore_index():
    assert global_normalizer(torch.tensor([0, 1, 1, 2]), ignore_index=1) == 2
    assert global_normalizer(torch.tensor([0, -100]), weights=torch.ones(1), ignore_index=-100) == 1


def test_no_micro_batch():
    assert global_normalizer([]) == 0


def test_parts_add_up_to_the_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(4, (12,), generator=generator)
    u = torch.randn(12, generator=generator)
    cuts = [slice(0, 2), slice(2, 9), slice(9, 12)]
    n = global_normalizer([targets[cut] for cut in cuts], weights=W, token_weights=[u[cut] for cut in cuts])
    parts = [pdl_cross_entropy(logits[cut], targets[cut], W, token_weights=u[cut], normalizer=n) for cut in cuts]
    whole = pdl_cross_entropy(logits, targets, W, token_weights=u)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"targets": [torch.tensor([4])], "weights": W}, IndexError, "targets[0] is 4"),
        ({"targets": torch.tensor([1.0])}, TypeError, "targets are torch.float32"),
        ({"targets": TARGETS, "token_weights": U[:2]}, ValueError, "token_weights are 2 and targets 3 tensors"),
        ({"targets": TARGETS[0], "token_weights": U[1]}, ValueError, "token_weights have shape (2, 1)"),
        ({"targets": TARGETS[0], "weights": torch.ones(2, 2)}, ValueError, "weights have shape (2, 2)"),
        ({"targets": TARGETS[0], "weights": torch.ones(4, dtype=torch.int64)}, TypeError, "weights are torch.int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(arguments, error, words):
    with pytest.raises(error) as raised:
        global_normalizer(**arguments)
    assert words in str(raised.value)


def test_ranks_with_unequal_shares():
    """A rank with several micro-batches, one with a single one, and one with none."""
    said = run_ranks(3, RANKS / "normalizer_ranks.py")
    assert all("as one big batch" in text for text in said)
