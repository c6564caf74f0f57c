"""examples/train_plain_loop.py: short enough to copy, and exact however a step is cut."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.finetuning import EXAMPLES

PROGRAM = EXAMPLES / "train_plain_loop.py"
SIZES = "STEPS, MICRO_BATCHES, ROWS = 100, 4, 8"


@pytest.fixture(autouse=True)
def _one_thread():
    """A tiny model gains nothing from several, and beside other work they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(micro_batches, rows, steps=3):
    """What the program leaves behind; it takes its lines one after the other, so that the sizes say which it takes."""
    source = PROGRAM.read_text()
    assert SIZES in source
    source = source.replace(SIZES, f"STEPS, MICRO_BATCHES, ROWS = {steps}, {micro_batches}, {rows}")
    source = source.replace("import random\n", "")
    taken = 0

    def sample(lines, number):
        nonlocal taken
        taken += number
        return lines[taken - number : taken]

    names = {"random": SimpleNamespace(seed=lambda seed: None, sample=sample)}
    exec(compile(source, PROGRAM, "exec"), names)
    return names


def test_it_is_short():
    assert len(PROGRAM.read_text().splitlines()) <= 40


def test_micro_batches_of_unequal_size_make_the_step_of_one_big_batch(capsys):
    whole = run(1, 24)
    cut = run(6, 4)
    assert len({int((targets != -100).sum()) for _, targets in cut["micro_batches"]}) > 1
    for name in ("loss", "nll"):
        assert abs(whole[name] - cut[name]) < 1e-5
    for one, other in zip(whole["model"].parameters(), cut["model"].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step   1")]
    assert printed[0] == printed[1]


def test_it_learns(capsys):
    run(4, 8, steps=40)
    printed = [float(nll) for nll in re.findall(r"unweighted NLL ([\d.]+)", capsys.readouterr().out)]
    assert len(printed) == 5
    assert printed[-1] < printed[0] - 1
