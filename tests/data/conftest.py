"""What the tests of data share."""

import functools

import pytest


@pytest.fixture
def datasets():
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


@pytest.fixture
def trained(tmp_path):
    """A function that counts what TRL's SFTTrainer trains on, of the rows and with the options that it is given."""
    from helpers.trl_training import count_of_training

    return functools.partial(count_of_training, tmp_path)
