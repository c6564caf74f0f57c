"""TRL's trainer in several processes: the gradient of all their batches at once, in one process."""

from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.trl_training import trl

RANKS = Path(__file__).parent / "ranks" / "trl_ranks.py"


@pytest.mark.trainers
@pytest.mark.parametrize(
    ("processes", "cases"), [(2, []), (3, ["text", "token weights", "packing"])], ids=["2, all cases", "3"]
)
def test_the_gradient_of_one_big_batch(processes, cases):
    """Each process checks it, with uneven numbers of targets: see trl_ranks.py."""
    assert trl is not None
    said = run_ranks(processes, RANKS, *cases)
    assert "packing [" in said[0]
