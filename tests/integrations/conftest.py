"""What the tests of the training frameworks share: `--record FILE` writes which of them passed, with which versions."""

import gc
import json
import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

FRAMEWORKS = ("torch", "transformers", "trl", "accelerate", "peft", "lightning", "torchtitan")
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


@pytest.fixture(scope="module")
def quick():
    """One thread, for models too small for two, which wait for each other; and less garbage to look through: each
    training collects it, and what is there already is none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def batch():
    """Rows of unequal length for the tiny models of transformers."""
    models = pytest.importorskip("helpers.trainer_models", reason="it needs transformers")
    return models.collate(models.make_rows())


@pytest.fixture
def model():
    models = pytest.importorskip("helpers.trainer_models", reason="it needs transformers")
    return models.sharp_model("llama")
