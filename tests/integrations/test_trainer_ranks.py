"""Several processes that train together have the gradients and the logs of one process: see ranks/trainer_ranks.py."""

from pathlib import Path

import pytest
from helpers.ranks import run_ranks

pytest.importorskip("transformers")
RANKS = Path(__file__).parent / "ranks" / "trainer_ranks.py"
pytestmark = pytest.mark.trainers


@pytest.mark.parametrize("processes", [2, 3])
def test_trainer(processes, tmp_path):
    """By three routes: unequal rows and micro-batches, and a process that never has a target; two steps of each."""
    for said in run_ranks(processes, RANKS, "trainer", tmp_path):
        assert said.count("relative error of the gradient") == 3 * 2 * 2, said


def test_fully_shard():
    """FSDP2 by two routes, with and without an output layer of its own group and targets everywhere; two steps."""
    for said in run_ranks(2, RANKS, "fsdp"):
        assert said.count("relative error of the gradient") == 2 * 2 * 2 * 2, said
