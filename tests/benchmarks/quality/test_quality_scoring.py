"""NLL and accuracy by prompt and bucket, against a slow computation."""

import numpy as np
import pytest
import torch
from helpers.quality import V, make_encoded, make_model, target_logits

from benchmarks.quality import scoring
from benchmarks.quality.decoding import Transform
from benchmarks.quality.encoding import run_below
from benchmarks.quality.scoring import BUCKETS, assign_buckets, find_targets, score

FREQUENT, MEDIUM, RARE = range(3)


@pytest.mark.parametrize(
    ("counts", "buckets"),
    [
        ([0, 50, 30, 10, 10], [RARE, FREQUENT, MEDIUM, MEDIUM, RARE]),  # before them: 100, 0, 50, 80 and 90 %
        ([49, 41, 10], [FREQUENT, FREQUENT, RARE]),
        ([51, 38, 11], [FREQUENT, MEDIUM, MEDIUM]),
        ([1, 0, 0], [FREQUENT, RARE, RARE]),
        ([25, 25, 25, 25], [FREQUENT, FREQUENT, MEDIUM, MEDIUM]),  # equal counts: in the order of their ids
    ],
)
def test_a_type_is_in_the_bucket_where_the_more_frequent_ones_end(counts, buckets):
    assert assign_buckets(torch.tensor(counts)).tolist() == buckets


def test_large_counts_are_shared_out_exactly():
    counts = torch.tensor([10**12 + 1, 10**12, 1])
    assert assign_buckets(counts).tolist() == [FREQUENT, MEDIUM, RARE]
    assert BUCKETS == ("frequent", "medium", "rare")


@pytest.fixture
def _small_pieces(monkeypatch):
    """Several batches of prompts in mixed order, and pieces of the logits that split batches and references."""
    monkeypatch.setattr(scoring, "batches_of_similar_length", lambda lengths: [[3, 0], [1, 5, 4], [6, 2]])
    monkeypatch.setattr(scoring, "ROWS_AT_A_TIME", 5)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("trained_layers", [2, None])
def test_sums_are_those_of_a_slow_computation(trained_layers):
    model, whole = make_model(trained_layers)
    encoded = make_encoded(7, targets=6)
    bucket_of = torch.arange(V) % 3
    bias = torch.linspace(-3, 3, V)
    transforms = {"natural": Transform(), "shifted": Transform(bias), "hot": Transform(bias / 2, temperature=1.7)}
    targets = find_targets(model, run_below(model, encoded, "tests"))
    scores, tokens = score(model, targets, transforms, bucket_of, len(encoded))

    assert list(scores) == list(transforms)
    expected_tokens = np.zeros((7, 3), dtype=np.int64)
    expected = {name: (np.zeros((7, 3)), np.zeros((7, 3), dtype=np.int64)) for name in transforms}
    for prompt, one in enumerate(encoded):
        for target, row in zip(one.targets, target_logits(whole, one).double(), strict=True):
            bucket = target % 3
            expected_tokens[prompt, bucket] += 1
            for name, changed in (("natural", row), ("shifted", row + bias), ("hot", (row + bias / 2) / 1.7)):
                nll, correct = expected[name]
                nll[prompt, bucket] -= float(changed.log_softmax(-1)[target])
                correct[prompt, bucket] += int(changed.argmax()) == target
    assert np.array_equal(tokens, expected_tokens)
    for name, (nll, correct) in expected.items():
        np.testing.assert_allclose(scores[name].nll, nll, rtol=1e-4, atol=1e-4)
        assert np.array_equal(scores[name].correct, correct)
        assert (scores[name].nll.dtype, scores[name].correct.dtype) == (np.float64, np.int64)


@pytest.mark.usefixtures("_small_pieces")
def test_a_hit_is_a_target_that_is_the_likeliest_token():
    """Each reference is made of the model's own greedy choices, but for the last token."""
    model, whole = make_model()
    encoded = make_encoded(7, targets=1)
    for one in encoded:
        one.targets[0] = int(target_logits(whole, one)[0].argmax())
    targets = find_targets(model, run_below(model, encoded, "tests"))
    scores, tokens = score(model, targets, {"natural": Transform()}, torch.zeros(V, dtype=torch.int64), 7)
    assert tokens.tolist() == [[2, 0, 0]] * 7
    assert (scores["natural"].correct[:, 0] >= 1).all()
    assert scores["natural"].correct.sum() < 14


def test_targets_belong_to_their_prompts():
    model, _ = make_model()
    encoded = make_encoded(7, targets=6)
    targets = find_targets(model, run_below(model, encoded, "tests"))
    for prompt, one in enumerate(encoded):
        assert targets.labels[targets.prompts == prompt].tolist() == one.targets
    assert targets.states.dtype == torch.float32


def test_states_are_float32_where_the_model_computes_in_bfloat16():
    model, _ = make_model(dtype=torch.bfloat16)
    targets = find_targets(model, run_below(model, make_encoded(3), "tests"))
    assert targets.states.dtype == torch.float32
    assert {logits.dtype for logits, _ in targets.logits(model)} == {torch.float32}
