"""examples/train_vocab_parallel.py: any number of processes prints the same losses."""

import os
import re
import subprocess
import sys

import torch
from helpers.finetuning import EXAMPLES
from helpers.ranks import run_ranks

PROGRAM = EXAMPLES / "train_vocab_parallel.py"


def curve_of(output):
    """[(loss, unweighted NLL)] of the lines that a program printed."""
    lines = re.findall(r"^step +\d+: loss ([\d.]+), unweighted NLL ([\d.]+)", output, re.MULTILINE)
    return [(float(loss), float(nll)) for loss, nll in lines]


def test_two_processes_have_the_curve_of_one():
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(PROGRAM)]
    alone = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    first, second = run_ranks(2, PROGRAM)
    assert "step" not in second
    curve, shared = curve_of(alone), curve_of(first)
    assert len(curve) == len(shared) == 11
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(curve), rtol=0, atol=1e-3)
    assert curve[-1][0] < curve[0][0] - 1, "it learns"
