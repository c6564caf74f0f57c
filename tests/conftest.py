"""What every test shares: the interpreter where there is no GPU, seeds, the two backends."""

import contextlib
import functools
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.utils import _device

pytest.register_assert_rewrite("helpers")

# Triton reads this when the kernels are defined, so it must be set before anything imports them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

EXECUTED = "ttsem" in sys.modules  # compiled kernels are executed on a CPU by ttsem: see ttsem_stand_in.py
if EXECUTED:
    import ttsem_stand_in  # before anything imports pdl_kernels, and the other helpers do

    ttsem_stand_in.complete_the_stand_in()

# torch finds out once which functions make tensors on a default device. transformers replaces torch.linspace while it
# loads a model: were that the first time, torch.device("meta") would not know the real one any more.
_device._device_constructors()

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def interpreter_problem():
    """Why Triton's interpreter cannot work here at all, or None."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return None
    versions = {name: tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")}
    if versions["triton"] < (3, 7) and versions["numpy"] >= (2, 4):
        return (
            f"Triton {metadata.version('triton')}'s interpreter, which runs kernels without a GPU, does not work with "
            f"numpy {metadata.version('numpy')}: install 'numpy<2.4'"
        )
    return None


# The reference lives beside the package and is not installed with it.
ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    problem = interpreter_problem()
    if problem is not None:
        pytest.exit(problem, returncode=4)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        from helpers import quick_interpreter

        quick_interpreter.speed_up()
    # numpy, under Triton's interpreter, reports every exp2 of a large negative number.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    """Tests run on a GPU where there is one; what only one of the two kinds of device can show is marked."""
    on_gpu = torch.cuda.is_available()  # ttsem says so too
    for item in items:
        only_cpu = item.get_closest_marker("cpu_only")
        needs_driver = item.get_closest_marker("needs_driver")
        if only_cpu is not None and on_gpu:
            item.add_marker(pytest.mark.skip(reason=f"only without a GPU: {only_cpu.kwargs['reason']}"))
        elif item.get_closest_marker("gpu") and (EXECUTED or not on_gpu):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif needs_driver is not None and EXECUTED:
            item.add_marker(pytest.mark.skip(reason=f"ttsem cannot do it: {needs_driver.kwargs['reason']}"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20250522)


TWO_READS, ON_CHIP = "triton", "triton, row on chip"
_held_no_row = set()  # node ids of tests that passed with TWO_READS, and that would be the same with ON_CHIP
_passed = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


@pytest.fixture(params=["eager", TWO_READS, ON_CHIP])
def backend(request):
    """The backend to ask for. Both ways to form loss and gradient in Triton run: the row read twice, and held on chip.

    Many options keep rows from being held, and then both ways are one. The run that reads rows twice asks the planner
    for each of its losses whether the other run would hold the row; if it would hold none, the other run is skipped.
    """
    if request.param == "eager":
        yield "eager"
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == ON_CHIP:
        if request.node.nodeid.replace(ON_CHIP, TWO_READS) in _held_no_row:
            pytest.skip("none of its rows can be held on chip: the run before was this one")
        request.getfixturevalue("force_kernel")("single pass")
        yield "triton"
        return
    from pdl_kernels.kernels import launch, planner

    could_hold = []

    def plan_and_ask(*shape, **options):
        forced = planner.plan_loss(*shape, **(options | {"only": planner.SINGLE_PASS}))
        could_hold.append(forced[0].kernel == planner.SINGLE_PASS)
        return planner.plan_loss(*shape, **options)

    with launch.planned_by(plan_and_ask):
        yield "triton"
    if request.node.stash.get(_passed, False) and not any(could_hold):
        _held_no_row.add(request.node.nodeid)


@pytest.fixture
def force_kernel():
    """A function that lets Triton form losses with the kernel of this name, for this test; see planner.plan_loss."""
    from pdl_kernels.kernels import launch, planner

    with contextlib.ExitStack() as stack:

        def force(name, **shape):
            stack.enter_context(launch.planned_by(functools.partial(planner.plan_loss, only=name, **shape)))

        yield force


@pytest.fixture
def on_the_device(device):
    """Tensors that a test makes without naming a device are on the one that the tests run on."""
    with device:
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
