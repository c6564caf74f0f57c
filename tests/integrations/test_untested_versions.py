"""Versions of the frameworks that nobody has tested: one warning for each, by whatever door a user comes in."""

import warnings
from importlib import metadata

import pytest
import torch

from pdl_kernels.integrations import versions
from pdl_kernels.integrations.versions import TESTED, warn_if_untested

INSTALLED = metadata.version
W = torch.ones(64)
each_framework = pytest.mark.parametrize("framework", TESTED)


@pytest.fixture
def installed(monkeypatch):
    """A function that has a framework installed in another version."""
    warn_if_untested.cache_clear()

    def install(framework, version):
        def found(name):
            return version if name == framework else INSTALLED(name)

        monkeypatch.setattr(versions.metadata, "version", found)

    yield install
    warn_if_untested.cache_clear()


def moved(version, by):
    """The version that is so many minor releases away."""
    major, minor = map(int, version.split(".")[:2])
    return f"{major}.{minor + by}"


def texts_of(call):
    """The warnings about versions in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "pdl_kernels was tested with" in str(one.message)]


@each_framework
@pytest.mark.parametrize("ending", ["", ".0", ".7", ".1.post2"])
def test_a_version_that_was_tested(ending, framework, installed):
    for version in TESTED[framework]:
        warn_if_untested.cache_clear()
        installed(framework, version + ending)
        assert texts_of(lambda: warn_if_untested(framework)) == []


@each_framework
@pytest.mark.parametrize("ending", ["", ".9", ".0.dev0", ".0rc1", ".0+cpu"])
def test_a_version_that_was_not_tested(ending, framework, installed):
    """There is one warning, which names the framework, what was tested and what is installed."""
    oldest, newest = TESTED[framework]
    for version in (moved(oldest, -1), moved(newest, 1)):
        warn_if_untested.cache_clear()
        installed(framework, version + ending)
        texts = texts_of(lambda: [warn_if_untested(framework) for _ in range(3)])
        assert len(texts) == 1
        tested = oldest if oldest == newest else f"{oldest} to {newest}"
        assert f"tested with {framework} {tested}, and {version}{ending} is installed" in texts[0]


@pytest.mark.parametrize(
    ("version", "warned"),
    [("5.9.1", True), ("5.100.0", True), ("4.22.0", True), ("6.22.0", True), ("6.0.0", True), ("5.22.3", False)],
)
def test_versions_are_compared_as_numbers(version, warned, installed, monkeypatch):
    monkeypatch.setitem(TESTED, "transformers", ("5.21", "5.24"))
    installed("transformers", version)
    assert bool(texts_of(lambda: warn_if_untested("transformers"))) == warned


def test_each_framework_has_a_warning_of_its_own(installed, monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "999.0")
    texts = texts_of(lambda: [warn_if_untested(framework) for framework in [*TESTED, *TESTED]])
    assert len(texts) == len(TESTED)
    for framework, text in zip(TESTED, texts, strict=True):
        assert f"tested with {framework} " in text


# ---------------------------------------------------------------------------------------------------------------------
# Where users come in


def by_loss_function(folder):
    from pdl_kernels.integrations.transformers import pdl_loss_function

    pdl_loss_function(W)


def by_compute_loss(folder):
    from pdl_kernels.integrations.transformers import pdl_compute_loss

    pdl_compute_loss(W)


def by_linear_loss(folder):
    from helpers.trainer_models import make_model

    from pdl_kernels.integrations.transformers import use_pdl_linear_loss

    use_pdl_linear_loss(make_model("llama"), W)


def by_sft_trainer(folder):
    pytest.importorskip("trl")
    from helpers.trl_trainers import TEXTS, make_trainer

    make_trainer(folder, TEXTS)


def by_lightning(folder):
    pytest.importorskip("lightning")
    from helpers.lightning_training import Model

    Model()


DOORS = [
    (by_loss_function, "transformers"),
    (by_compute_loss, "transformers"),
    (by_linear_loss, "transformers"),
    (by_sft_trainer, "trl"),
    (by_lightning, "lightning"),
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("door", "framework"), DOORS)
def test_each_door_warns(door, framework, installed, tmp_path):
    pytest.importorskip("transformers")
    installed(framework, moved(TESTED[framework][1], 1))
    texts = texts_of(lambda: (door(tmp_path), door(tmp_path)))
    assert [f"tested with {framework} " in text for text in texts] == [True]
    installed(framework, TESTED[framework][1])
    warn_if_untested.cache_clear()
    assert texts_of(lambda: door(tmp_path)) == []


def test_the_warning_shows_the_users_line(installed):
    pytest.importorskip("transformers")
    installed("transformers", "999.0")
    with pytest.warns(UserWarning, match="999.0 is installed") as caught:
        by_loss_function(None)
    assert caught[0].filename == __file__
