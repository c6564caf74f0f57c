"""The power law: its bare formula and the recommended preset, against the formula in plain Python."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.weightings import COUNTS, OPTIONS, for_all
from hypothesis import assume
from hypothesis import strategies as st

import reference
from pdl_kernels import PowerLawWeighting, TokenCounts, pdl_cross_entropy, power_law_weights

ROOT = Path(__file__).resolve().parents[2]


# power_law_weights


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64])
def test_counts_of_every_dtype(dtype):
    weights = power_law_weights(torch.tensor([0, 1, 100], dtype=dtype), alpha=0.5, eps=1)
    assert weights.tolist() == pytest.approx([1, 2**-0.5, 101**-0.5], rel=1e-7)


def test_token_counts_are_counts():
    counts = TokenCounts(3).update([[1, 1, 2]], shift=False)
    assert torch.equal(power_law_weights(counts), power_law_weights(counts.counts))


# PowerLawWeighting


def test_the_recommended_preset():
    preset = PowerLawWeighting()
    assert preset == PowerLawWeighting(0.4, 1.0, normalize="token_mean", unseen=1.0, neutral_ids=(), clip=None)
    table = preset.table(torch.tensor([10**6, 10**3, 10, 0]))
    assert table[0] < 1 < table[1] < table[2]
    assert table[3] == 1


def test_the_papers_weighting_is_the_bare_formula():
    paper = PowerLawWeighting.paper()
    assert (paper.alpha, paper.eps, paper.normalize, paper.unseen, paper.clip) == (1.0, 1e-7, None, "formula", None)
    counts = torch.cat([torch.arange(50_000), torch.zeros(3), torch.tensor([1e12])])
    assert torch.equal(paper.table(counts), power_law_weights(counts, 1.0, 1e-7))
    assert torch.equal(paper.table(counts), power_law_weights(counts))
    assert paper.table(counts).max() == 1e7


@for_all(counts=COUNTS, options=OPTIONS, eps=st.sampled_from([0, 1.0]))
def test_alpha_0_gives_ones(counts, options, eps):
    assume(any(counts[:4]))
    options |= {
        "neutral_ids": (),
        "clip": None,
        "unseen": options["unseen"] if isinstance(options["unseen"], str) else 1,
    }
    assert PowerLawWeighting(0, eps, **options).table(torch.tensor(counts)).tolist() == [1] * len(counts)
    assert power_law_weights(torch.tensor(counts), 0, eps).tolist() == [1] * len(counts)


def test_the_mean_weight_of_a_target_is_1_in_the_loss():
    """What token_mean is for: equally hard tokens give the loss of plain cross entropy."""
    labels = torch.tensor([[3, 1, 1, 2, 1, 0, 1]])
    counts = TokenCounts(5).update(labels, shift=False)
    loss = pdl_cross_entropy(torch.zeros(1, 7, 5), labels, PowerLawWeighting().table(counts), reduction="token_mean")
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


def test_another_process_gives_the_same_bits():
    code = (
        "import torch; from pdl_kernels import PowerLawWeighting; "
        "print(PowerLawWeighting(0.37).table(torch.arange(70_000) ** 2).view(torch.int32).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert int(done.stdout) == PowerLawWeighting(0.37).table(torch.arange(70_000) ** 2).view(torch.int32).sum().item()
