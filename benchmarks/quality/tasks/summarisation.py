"""Summarisation: what the docstrings of Python and of seven scientific packages say, and their first sentences.

The packages' files are read and never imported. Their authors wrote the sentences as summaries of what follows.
"""

from __future__ import annotations

import itertools
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks.quality.tasks import docstrings, installed
from benchmarks.quality.tasks.pairs import Pair, Task

# What pip calls a package -> what Python imports. The order decides which of two near twins is kept.
PACKAGES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "sympy": "sympy",
    "scikit-learn": "sklearn",
    "networkx": "networkx",
    "statsmodels": "statsmodels",
}


def versions() -> dict[str, str]:
    """Python's version and the packages'."""
    return {"python": platform.python_version(), **installed.versions(PACKAGES)}


def load() -> list[Pair]:
    """The pairs of the standard library and of all packages, without repeats, in a fixed order."""
    installed.require(PACKAGES, "pip install")
    return docstrings.without_repeats(candidates())


def candidates() -> Iterator[Pair]:
    """Every pair, repeats included."""
    folders = {"python": Path(sysconfig.get_path("stdlib"))}
    folders |= {module: installed.package_folder(module) for module in PACKAGES.values()}
    return itertools.chain.from_iterable(docstrings.module_pairs(folder, name) for name, folder in folders.items())


TASK = Task(
    name="summarisation",
    title="Summarisation",
    instruction="Summarise this documentation in one sentence.",
    source=(
        "docstrings of the standard library of Python (PSF-2.0) and of the pip packages numpy, scipy, pandas, sympy, "
        "scikit-learn, networkx and statsmodels (BSD-3-Clause)"
    ),
    load=load,
    prompt_tokens=176,
    new_tokens=32,
    faithful=True,
)
