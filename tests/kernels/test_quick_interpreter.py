"""The quicker interpreter of these tests computes what Triton's own does, and leaves the language as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import inherited, make_logits, make_targets, make_weights, quick_interpreter, run

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
replace = interpreter._patch_builtin
pytestmark = [
    pytest.mark.cpu_only(reason="kernels are compiled there"),
    pytest.mark.skipif(
        triton.__version__ not in quick_interpreter.READ, reason="this Triton's interpreter is left as it is"
    ),
]
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0}
# What Triton's own interpreter computes, in a process of its own: the replacements stay where they were made.
PLAINLY = """
import sys, torch
from helpers import make_logits, make_targets, make_weights, run
from pdl_kernels.kernels import launch, planner
import functools

kernel, options = sys.argv[1], eval(sys.argv[2])
with launch.planned_by(functools.partial(planner.plan_loss, only=kernel)):
    problem = make_logits(3, 300), make_targets(3, V=300, ignored=(1,)), make_weights("random", 300)
    result = run("triton", *problem, upstream=3.0, return_stats=True, **options)
torch.save([result.loss, result.gradient, *result.stats], sys.argv[3])
"""


@triton.jit
def refuse(x):
    tl.static_assert(False, "never")
    return x


@triton.jit
def refusing_kernel(x):
    tl.store(x, refuse(tl.load(x)))


@triton.jit
def overflowing_kernel(x, n):
    tl.store(x, n + n)


@pytest.mark.parametrize(
    ("kernel", "options"), [("two passes", EVERYTHING), ("slices", EVERYTHING), ("single pass", {"z_loss": 0.1})]
)
def test_it_computes_the_same_bits(kernel, options, force_kernel, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PLAINLY, kernel, repr(options), str(tmp_path / "plainly.pt")],
        env=inherited(TRITON_INTERPRET="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    force_kernel(kernel)
    problem = make_logits(3, 300), make_targets(3, V=300, ignored=(1,)), make_weights("random", 300)
    quickly = run("triton", *problem, upstream=3.0, return_stats=True, **options)
    for ours, plain in zip(
        [quickly.loss, quickly.gradient, *quickly.stats], torch.load(tmp_path / "plainly.pt"), strict=True
    ):
        assert torch.equal(ours, plain)


def test_the_language_is_prepared_once_a_launch(monkeypatch):
    asked, replaced = [], []
    quick = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: asked.append(function) or quick(function))
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *package: replaced.append(package) or replace(*package))
    run("triton", make_logits(4, 40), make_targets(4, V=40))
    assert len(asked) > 100
    assert len(replaced) < len(asked) / 2


def test_the_language_is_restored_after_a_launch_that_fails():
    assert tl.core.is_builtin(tl.load)
    with pytest.raises(interpreter.InterpreterError, match="never"):
        refusing_kernel[(2,)](torch.zeros(2))
    assert tl.core.is_builtin(tl.load)
    assert not interpreter._patch_lang.prepared


def test_integer_overflow_is_found():
    found = torch.zeros(1, dtype=torch.int32)
    overflowing_kernel[(1,)](found, 2**30 - 1)
    assert found.item() == 2**31 - 2
    with pytest.raises(interpreter.InterpreterError, match="int32 overflow detected for operation add"):
        overflowing_kernel[(1,)](found, 2**30)
