"""The suite as a program, for the tests that run it."""

import dataclasses
import gc
import json

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import bandwidth, peers, suite


@pytest.fixture
def run_and_plot(monkeypatch, tmp_path):
    """Run the program on tiny shapes, without what takes seconds; returns (exit status, document or None)."""
    gc.freeze()  # the suite collects garbage after every case: what other tests left would be looked through each time
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(bandwidth, "REPEATS", 1)
    monkeypatch.setattr(suite, "measure_host", lambda: {"problem": "not in this test"})
    monkeypatch.setattr(suite.memory, "peaks_on_cpu", lambda *_: ({}, "not in this test"))

    def run_program(*arguments):
        threads = ["--threads", str(torch.get_num_threads())]
        status = program.main([*arguments, *threads, "--out", str(tmp_path)])
        files = sorted(tmp_path.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return status, json.loads(files[-1].read_text()) if files else None

    yield run_program
    gc.unfreeze()


@pytest.fixture
def run(run_and_plot, monkeypatch):
    """The same without plots, which take most of the time of a tiny run."""
    monkeypatch.setattr(program, "write_plots", lambda document, path: [])
    return run_and_plot


@pytest.fixture
def replace_contender(monkeypatch):
    """A function that changes fields of the contender of this name, for this test."""

    def replace(name, **changes):
        changed = dataclasses.replace(peers.CONTENDERS[name], **changes)
        monkeypatch.setitem(peers.CONTENDERS, name, changed)

    return replace


@pytest.fixture
def _older_torch(monkeypatch):
    """A torch before 2.13, which lacks the operation of one of the contenders."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
