"""What the documentation shows runs as written."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import pdl_kernels

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "pdl_kernels").rglob("*.py"))
    if "    >>> " in path.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
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
