"""pdl-kernels plot."""

import os
import sys
from pathlib import Path

import pytest
from helpers.command_line import fail, files_here, run
from helpers.pictures import png_size


def test_plot(weights, counts):
    pytest.importorskip("matplotlib")
    before = files_here()
    run("plot", weights, counts, "--output", "plot.png")
    assert png_size("plot.png") == (1500, 500)
    assert files_here() - before == {"plot.png"}
    assert "which exists" in fail(2, "plot", weights, counts, "--output", "plot.png")
    run("plot", weights, counts, "--output", "plot.png", "--overwrite")
    assert "accepted are names that end in .png" in fail(2, "plot", weights, counts, "--output", "plot.pdf")
    assert "there is no file nowhere" in fail(2, "plot", "nowhere", counts, "--output", "other.png")
    assert not Path("other.png").exists()


def test_plot_that_cannot_be_written_leaves_nothing(weights, counts, monkeypatch):
    pytest.importorskip("matplotlib")

    def broken(*_):
        raise OSError(28, "No space left on device")

    before = files_here()
    monkeypatch.setattr(os, "replace", broken)
    assert "No space left" in fail(1, "plot", weights, counts, "--output", "plot.png")
    assert files_here() == before


def test_a_missing_package_of_one_command(counts, weights, monkeypatch):
    monkeypatch.delitem(sys.modules, "pdl_kernels.weights.plots", raising=False)
    monkeypatch.delattr("pdl_kernels.weights.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = fail(2, "plot", weights, counts, "--output", "plot.png")
    assert message == "error: matplotlib is not installed: pip install 'pdl-kernels[cli]'\n"
