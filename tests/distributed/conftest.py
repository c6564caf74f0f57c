"""What the tests of a split vocabulary share."""

import pytest
from helpers.rank_cases import Outcomes


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory):
    """What became of the cases that ranks have run, of those that are selected."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base  # by all workers of pytest-xdist
    return Outcomes(request.session.items, shared)
