"""What the tests of the training frameworks share: `--record FILE` writes which of them passed, with which versions."""

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest

FRAMEWORKS = ("torch", "transformers", "trl", "accelerate", "peft", "lightning", "torchtitan", "datasets")
outcomes = {}


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="add outcomes and versions to this JSON file")


def pytest_runtest_logreport(report):
    """Also of the workers of pytest-xdist, which report to the process that has the option."""
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid.split("@")[0]] = report.outcome


def pytest_sessionfinish(session):
    path = session.config.getoption("--record", None)
    if path is None or hasattr(session.config, "workerinput"):
        return
    from pdl_kernels.weights.files import replace_file

    found = json.loads(Path(path).read_text()) if Path(path).exists() else {"versions": {}, "outcomes": {}}
    found["python"] = platform.python_version()
    for name in FRAMEWORKS:
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    integrations = {test: outcome for test, outcome in outcomes.items() if "tests/integrations/" in test}
    found["outcomes"] = dict(sorted((found["outcomes"] | integrations).items()))
    replace_file(path, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


@pytest.fixture(autouse=True)
def quiet_progress(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
