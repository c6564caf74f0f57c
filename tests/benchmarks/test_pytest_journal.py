"""The journal of a test run: a line for each test when it has ended, also of a run that was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import inherited

ROOT = Path(__file__).resolve().parents[2]

FOUR_TESTS = """
import time
from pathlib import Path

import pytest


def test_passes():
    pass


def test_fails():
    assert 1 + 1 == 3


@pytest.fixture
def broken():
    raise OSError("no such thing")


def test_breaks(broken):
    pass


@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""
FOUR_LINES = [
    ("test_four.py::test_breaks", "failed"),
    ("test_four.py::test_fails", "failed"),
    ("test_four.py::test_passes", "passed"),
    ("test_four.py::test_skipped", "skipped"),
]
HANGS = """

def test_hangs():
    Path("begun").touch()
    time.sleep(100)
"""
PRINTED = (
    "failed: test_four.py::test_fails, call\n", "assert (1 + 1) == 3",
    "failed: test_four.py::test_breaks, setup\n", "OSError: no such thing",
)  # fmt: skip


def start_journaled(folder, tests, *arguments):
    """pytest on these tests, which writes journal.jsonl and output.txt."""
    (folder / "test_four.py").write_text(tests)
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_session.pytest_journal",
             "--journal", "journal.jsonl", *arguments, "test_four.py"],
            stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=inherited(PYTHONPATH=str(ROOT)),
            start_new_session=True,
        )  # fmt: skip


def journal_of(folder):
    """Names and outcomes, sorted: processes of xdist end their tests in any order."""
    path = folder / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert all(line.keys() == {"name", "outcome", "seconds"} for line in lines)
    return sorted((line["name"], line["outcome"]) for line in lines)


def in_how_many_processes(number):
    if number == "2":
        pytest.importorskip("xdist")
    return ("-n", number) if number != "1" else ()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_journal_has_a_line_for_each_test(tmp_path, processes):
    process = start_journaled(tmp_path, FOUR_TESTS, *in_how_many_processes(processes))
    assert process.wait(120) == 1
    assert journal_of(tmp_path) == FOUR_LINES
    output = (tmp_path / "output.txt").read_text()
    for text in PRINTED:
        assert text in output
    assert max(map(output.index, PRINTED)) < output.index("= FAILURES ="), "at once"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_that_is_killed_leaves_what_ended_before(tmp_path, processes):
    process = start_journaled(tmp_path, FOUR_TESTS + HANGS, *in_how_many_processes(processes))
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "begun").exists() and len(journal_of(tmp_path)) == 4) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert journal_of(tmp_path) == FOUR_LINES
    output = (tmp_path / "output.txt").read_text()
    for text in PRINTED:
        assert text in output
