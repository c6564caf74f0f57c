"""What the documentation shows runs as written."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import pdl_kernels
from pdl_kernels import functional, modules, weighting

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("module", [functional, modules, weighting], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    names = {**vars(pdl_kernels), "torch": torch}
    results = doctest.testmod(module, extraglobs=names)
    assert results.attempted > 0
    assert results.failed == 0


def test_readme_snippets():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        names: dict[str, object] = {}
        exec(snippet, names)
        assert names["logits"].grad.abs().sum() > 0


def test_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([\w.-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets
