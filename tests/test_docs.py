"""What the documentation shows runs as written."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import pdl_kernels
from pdl_kernels import (
    calibration,
    description,
    frequency,
    functional,
    linear,
    modules,
    other_weightings,
    weighting,
)

DOCUMENTED = (calibration, description, frequency, functional, linear, modules, other_weightings, weighting)

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("module", DOCUMENTED, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    names = {**vars(pdl_kernels), "torch": torch}
    results = doctest.testmod(module, extraglobs=names)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/weights.md"])
def test_snippets(page, tmp_path, monkeypatch):
    """Each runs as written, one after the other in one namespace per page."""
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippets
    names: dict[str, object] = {"__name__": "snippet"}
    for snippet in snippets:
        exec(snippet, names)
    assert names["logits"].grad.abs().sum() > 0


def test_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([\w.-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets
