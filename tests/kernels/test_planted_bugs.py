"""Bugs planted in copies of the kernels, and what notices them: kernels executed by ttsem, and Triton's interpreter.

Each run is a process of its own: a copy of the package with one line changed, and those of
tests/kernels/test_kernels.py that the change concerns. Part of `make test-compiled`, whose environment has ttsem.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import inherited

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed: make test-compiled"),
    pytest.mark.needs_driver(reason="it starts ttsem itself"),
    pytest.mark.timeout(300),
]

ROOT = Path(__file__).resolve().parents[2]
RACE = r"program instances .* both touch element \d+ of `{}`"
PAST_THE_END = r"reads \d+ element\(s\) past the end of the tensor passed as `{}`"
WRONG = r"AssertionError: {}"  # by comparison with float64
NEEDED = ("conftest.py", "ttsem_stand_in.py", "helpers", "kernels/test_kernels.py")


class Bug(NamedTuple):
    """A change of one file, and what is said of it."""

    file: str  # in pdl_kernels/kernels
    before: str
    after: str
    tests: str  # the -k of tests/kernels/test_kernels.py
    message: str  # what ttsem, or the comparison with float64 under it, says: a pattern
    seen_by_interpreter: bool | None  # None: by chance, of what the memory held before


BUGS = {
    "a mask one vector too wide": Bug(
        "tiles.py",
        "tl.store(interior + column_offsets(block, stride_column, VARIANT), values, mask=first < end)",
        "tl.store(interior + column_offsets(block, stride_column, VARIANT), values, mask=first <= end)",
        "two and float32 and 304",
        RACE.format("gradient"),
        seen_by_interpreter=False,
    ),
    "a load one vector too wide": Bug(
        "single_pass.py",
        "chunk = tl.load(pointers, mask=first < columns - CHUNK * SIZE, other=missing)",
        "chunk = tl.load(pointers, mask=first <= columns - CHUNK * SIZE, other=missing)",
        "single and bfloat16 and 1104",
        PAST_THE_END.format("logits"),
        seen_by_interpreter=True,
    ),
    "a store from another program": Bug(
        "row_kernels.py",
        "    tl.store(row_loss + row, loss)\n",
        "    tl.store(row_loss + row, loss)\n"
        "    if row > 0:\n        tl.store(row_loss + row - 1, tl.load(row_loss + row - 1))\n",
        "two and float32 and 304",
        RACE.format("row_loss"),
        seen_by_interpreter=False,
    ),
    "a gather without its guard": Bug(
        "row_math.py",
        "safe_y = tl.where(exists, y, 0).to(tl.int32)",
        "safe_y = y.to(tl.int32)",
        "no_class and 1103-two",
        PAST_THE_END.format("weights"),
        seen_by_interpreter=False,
    ),
    "a logit read after another program overwrote it": Bug(
        "row_kernels.py",
        "x_y = tl.load(logits_row + y.to(tl.int64) * stride_column, mask=owns, other=0.0).to(tl.float32)",
        "x_y = tl.load(logits_row + y.to(tl.int64) * stride_column).to(tl.float32)",
        "slices and place and softcap",
        RACE.format("(logits|gradient)"),
        seen_by_interpreter=False,
    ),
    "a logit read after this program overwrote it": Bug(
        "row_kernels.py",
        "                    stride_column, gradient_stride_column, logit_scale, softcap, VARIANT,\n"
        "                )  # fmt: skip\n        store_row_results(",
        "                    stride_column, gradient_stride_column, logit_scale, softcap, VARIANT,\n"
        "                )  # fmt: skip\n"
        "                x_y = tl.load(logits_row + y.to(tl.int64) * stride_column).to(tl.float32)\n"
        "        store_row_results(",
        "two and place and 0.25 and bfloat16",
        WRONG.format("loss: error"),
        seen_by_interpreter=True,
    ),
    "an uninitialised partial sum": Bug(
        "row_kernels.py",
        "        tl.store(slice_state + rows.to(tl.int64) * slices + position, row_sum)\n",
        "        if slice_index > 0:\n"
        "            tl.store(slice_state + rows.to(tl.int64) * slices + position, row_sum)\n",
        "slices and float32 and 1103 and rows",
        WRONG.format("loss: error nan"),
        seen_by_interpreter=None,
    ),
    "a wrong slice bound": Bug(
        "row_kernels.py",
        "    begin, end = slice_bounds(slice_index, slice_tiles, columns, VARIANT)\n    y, w_y, _, invalid",
        "    begin, end = slice_bounds(slice_index, slice_tiles, columns, VARIANT)\n"
        "    begin += tl.where(slice_index > 0, VARIANT.vector, 0)\n    y, w_y, _, invalid",
        "slices and float32 and 1103 and rows",
        WRONG.format("gradient: element"),
        seen_by_interpreter=None,
    ),
}


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "pdl_kernels", tmp_path / "pdl_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "reference", tmp_path / "reference", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests/kernels").mkdir(parents=True)
    for name in NEEDED:
        take = shutil.copytree if (ROOT / "tests" / name).is_dir() else shutil.copy
        take(ROOT / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run_tests(folder, chosen, *, executed):
    """The chosen tests of this copy; by ttsem, or in the interpreter."""
    pytest_command = [
        "pytest",
        "tests/kernels/test_kernels.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        "--tb",
        "short",
    ]
    command = [sys.executable, "-m", *(["ttsem.sanitize"] if executed else []), *pytest_command]
    environment = inherited(PYTHONPATH=str(folder), **({} if executed else {"TRITON_INTERPRET": "1"}))
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    output = done.stdout + done.stderr
    assert re.search(r"\d+ (passed|failed)", output), output[-3000:]
    return done.returncode, output


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(copy, name):
    bug = BUGS[name]
    path = copy / "pdl_kernels" / "kernels" / bug.file
    source = path.read_text()
    assert source.count(bug.before) == 1, "the line to change is not there"
    path.write_text(source.replace(bug.before, bug.after))
    status, output = run_tests(copy, bug.tests, executed=True)
    assert status == 1, output[-3000:]
    assert re.search(bug.message, output), output[-3000:]
    status, output = run_tests(copy, bug.tests, executed=False)
    if bug.seen_by_interpreter is not None:
        assert (status == 1) is bug.seen_by_interpreter, output[-3000:]


def test_without_a_bug_nothing_is_said(copy):
    chosen = " or ".join(f"({tests})" for tests in dict.fromkeys(bug.tests for bug in BUGS.values()))
    for executed in (True, False):
        status, output = run_tests(copy, chosen, executed=executed)
        assert status == 0, output[-3000:]


def test_the_copy_is_what_is_tested(copy):
    """Not the package that is installed."""
    (copy / "pdl_kernels" / "__init__.py").write_text("raise RuntimeError('this is the copy')\n")
    command = [sys.executable, "-c", "import pdl_kernels"]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy, env=environment, check=False)
    assert "this is the copy" in done.stderr
