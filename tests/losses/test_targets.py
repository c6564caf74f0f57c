"""Targets: their dtype, their layout, and the ones that are ignored."""

import pytest
import torch
from helpers import (
    check_against_reference,
    make_logits,
    make_targets,
    make_weights,
    signed_token_weights,
)

V = 37


def test_int32_targets(backend, device):
    logits = make_logits(4, V, device=device)
    targets = make_targets(4, V=V, device=device, dtype=torch.int32, ignored=(1,))
    check_against_reference(backend, logits, targets, make_weights("random", V, device), return_stats=True)


@pytest.mark.lesson("misaligned targets")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_targets_weights_and_token_weights_that_are_slices(backend, dtype, device):
    batch, length = 2, 3
    labels = make_targets(batch, length + 1, V=V, dtype=dtype, device=device, ignored=(5,))
    token_weights = signed_token_weights(batch, length + 1, device=device)
    weights = make_weights("random", 2 * V, device)[1::2]
    logits = make_logits(batch, length, V, device=device)
    targets = labels[:, 1:]
    assert not targets.is_contiguous()
    check_against_reference(backend, logits, targets, weights, token_weights=token_weights[:, :-1])
    flat = labels.view(-1)[1:4]  # contiguous, but not on 16 bytes
    assert flat.data_ptr() % 16 != 0
    check_against_reference(backend, logits[0], flat, weights, token_weights=token_weights.view(-1)[1:4])


@pytest.mark.lesson("gather at ignore_index")
@pytest.mark.parametrize("ignore_index", [-100, 5, -1, 10**6, -(2**40)])
def test_ignore_index(backend, ignore_index, device):
    logits = make_logits(4, V, device=device)
    targets = make_targets(4, V=V, device=device, ignored=(0, 2), ignore_index=ignore_index)
    targets[1] = 5 if ignore_index != 5 else 6
    got = check_against_reference(
        backend, logits, targets, make_weights("random", V, device) + 0.5, ignore_index=ignore_index, return_stats=True
    )
    assert got.stats.token_count.item() == 2
    assert got.gradient[[0, 2]].count_nonzero() == 0


@pytest.mark.parametrize("ignore_index", [2**32, 2**32 + 5, -(2**32) + 5])
def test_ignore_index_beyond_int32_ignores_no_int32_target(backend, ignore_index, device):
    """Reduced to 32 bits these would be 0 and 5."""
    logits = make_logits(3, V, device=device)
    targets = torch.tensor([0, 5, 7], dtype=torch.int32, device=device)
    got = check_against_reference(backend, logits, targets, ignore_index=ignore_index, return_stats=True)
    assert got.stats.token_count.item() == 3
