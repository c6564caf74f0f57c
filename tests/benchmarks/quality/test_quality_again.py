"""What docs/evidence.md says of a model that was made again, on another machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from benchmarks.quality import records

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
NAME = "dialogue/pdl-0.25-seed{}.json.xz"
PAGE = " ".join((ROOT / "docs" / "evidence.md").read_text().split())


def mean_nll(record: dict) -> np.ndarray:
    """Of each variant (natural, half undone, undone), overall and by bucket."""
    tokens = np.array(record["tokens"]).sum(0)
    sums = np.array([np.array(found).sum(0) / 1000 for found in record["nll"].values()])
    return np.concatenate([sums.sum(1, keepdims=True) / tokens.sum(), sums / tokens], 1)


def equal_texts(one: dict, other: dict, mode: str) -> int:
    texts = (record["texts"][f"natural {mode}"]["texts"] for record in (one, other))
    return sum(first == second for first, second in zip(*texts, strict=True))


def test_the_page_says_how_far_a_model_made_again_is_from_the_first():
    first, seed_1, seed_2 = (records.read(RESULTS / "cpu" / NAME.format(seed)) for seed in range(3))
    again = records.read(RESULTS / "again" / NAME.format(0))
    for name in ("settings", "held_out_digest", "tokens", "seed", "arm"):
        assert again[name] == first[name]
    assert again["learning_rate"]["chosen"] == first["learning_rate"]["chosen"]
    assert again["environment"]["products"] == "float32, rounded"
    assert "Xeon" in first["environment"]["device"]
    assert "EPYC" in again["environment"]["device"]

    change = np.abs(mean_nll(again) - mean_nll(first)).max()
    of_seeds = max(np.abs(mean_nll(one) - mean_nll(first)).max() for one in (seed_1, seed_2))
    greedy, other_1, other_2 = (equal_texts(first, one, "greedy") for one in (again, seed_1, seed_2))
    sampled = equal_texts(first, again, "sampled")
    texts = len(again["texts"]["natural greedy"]["texts"])
    assert f"at most {change:.4f} nats from the first one's, overall and in each bucket" in PAGE
    assert f"another seed's are up to {of_seeds:.3f}" in PAGE
    assert f"{greedy} of {texts} greedy texts are the same word for word" in PAGE
    assert f"against {other_1} and {other_2} with the other seeds" in PAGE
    assert f"{sampled} of the sampled ones" in PAGE
