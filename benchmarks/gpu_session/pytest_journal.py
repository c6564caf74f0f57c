"""A pytest plugin: every result is written when it is there, so that a run that is ended early keeps what it found.

    python -m pytest -p benchmarks.gpu_session.pytest_journal --journal FILE

FILE gets a JSON line for each test (name, outcome, seconds); the text of a failure is printed at once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, metavar="FILE", help="append a JSON line for each test that has ended")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--journal")
    if path is not None and not hasattr(config, "workerinput"):  # of processes of xdist, the one that hears all
        config.pluginmanager.register(Journal(path, config), "journal")


class Journal:
    """One for a run."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self._config = config
        self._path = path
        self._seconds: dict[str, float] = defaultdict(float)
        self._outcomes: dict[str, str] = {}  # of tests that have not been torn down

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            terminal = self._config.pluginmanager.getplugin("terminalreporter")
            terminal.write(f"\nfailed: {report.nodeid}, {report.when}\n{report.longreprtext}\n", flush=True)
        if not report.passed:
            self._outcomes[report.nodeid] = report.outcome
        if report.when in ("setup", "call"):
            return
        outcome = self._outcomes.pop(report.nodeid, "passed")  # a test whose process died has no teardown, but a report
        self._write(name=report.nodeid, outcome=outcome, seconds=round(self._seconds.pop(report.nodeid), 2))

    def _write(self, **what: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(what) + "\n")
