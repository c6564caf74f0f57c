"""Which cases and kernels there are: every kernel that can be chosen is run, and one that is not is a problem."""

import pytest
import torch

from pdl_kernels.doctor import cases, kernels
from pdl_kernels.doctor.cases import RECIPES
from pdl_kernels.doctor.check import Check, is_right, shares_of

CPU = torch.device("cpu")


def test_a_gpu_gets_every_recipe_vocabulary_and_dtype():
    found = cases.cases_for(132)
    assert {case.recipe for case in found} == set(RECIPES)
    assert {case.group for case in found} == {(size, dtype) for size in cases.VOCABULARIES for dtype in cases.DTYPES}
    assert {case.rows for case in found} == {cases.FEW_ROWS, 273}
    assert len(set(found)) == len(found)


def test_every_kernel_that_can_be_planned_is_in_the_cases():
    planner = pytest.importorskip("pdl_kernels.kernels.planner", exc_type=ImportError)
    h200 = planner.Device(132, 32, True, (9, 0))
    planned = {
        planner.plan_loss(case.rows, case.vocab_size, cases.DTYPES[case.dtype].itemsize, h200, (3, 9))[0].kernel
        for case in cases.cases_for(132)
    }
    assert planned == set(planner.KERNELS)


@pytest.mark.parametrize("processes", [1, 2, 16, 40])
def test_shares_are_whole_groups_and_lose_nothing(processes):
    found = cases.cases_for(132)
    shares = shares_of(found, processes)
    assert sorted(numbered for share in shares for numbered in share) == list(enumerate(found))
    homes = [{case.kernels for _, case in share} for share in shares]
    assert sum(map(len, homes)) == len(set().union(*homes)) == 72
    assert len(shares) == processes
    # What takes longest to compile is not all in one share.
    assert max(map(len, shares)) <= len(found) / processes + 9


def test_launches_are_heard():
    knobs = pytest.importorskip("triton", reason="Triton is not installed").knobs
    names = []
    with kernels.heard_launches(names):
        for hook in knobs.runtime.launch_enter_hook.calls:
            hook(type("Metadata", (), {"get": lambda self: {"name": "some_kernel"}})())
    assert names == ["some_kernel"]
    assert not knobs.runtime.launch_enter_hook.calls


# Which kernels they launch

HELD, SHORT = 262144, 1000  # vocabularies whose rows are held on chip, and not
KERNELS = {
    f"{name}_kernel"
    for name in ("denominators", "gradient_rows", "loss_rows", "merge_rows", "reduce_rows", "scale_rows", "slice_rows")
}


@pytest.fixture
def stub_h200(monkeypatch):
    """A function that lets the CPU pass for an H200, with this Triton."""
    launch = pytest.importorskip("pdl_kernels.kernels.launch", exc_type=ImportError)

    def stub(triton_version=(3, 9)):
        device = launch.Device(132, 32, True, (9, 0), 50 * 2**20)
        monkeypatch.setattr(launch, "device_of", lambda _: device)
        monkeypatch.setattr(launch, "TRITON_VERSION", triton_version)

    return stub


@pytest.mark.parametrize(
    ("vocab_size", "triton_version", "expected"),
    [
        (SHORT, (3, 9), KERNELS),
        (HELD, (3, 9), KERNELS | {"single_pass_rows_kernel"}),
        (HELD, (3, 6), KERNELS),
    ],
)
def test_the_kernels_to_see_are_those_that_are_planned(stub_h200, vocab_size, triton_version, expected):
    stub_h200(triton_version)
    assert kernels.kernels_to_see(CPU, cases.cases_for(132, [vocab_size])) == expected


def check_that_launches(monkeypatch, vocab_size, *names):
    """A finished check of an H200 whose every case was right and launched one of these kernels."""

    def answers(order):
        for number, _ in enumerate(order["cases"]):
            yield {"begin": number}
            launched = [names[number % len(names)]]
            yield {"end": number, "record": {"status": "right", "problem": None, "kernels": launched}}

    check = Check(CPU)
    check.backend, check.interpreted = "triton", False
    check.cases, check.shapes = cases.cases_for(132, [vocab_size]), []
    monkeypatch.setattr(check, "_answers", answers)
    return check.run()


@pytest.mark.parametrize(
    ("vocab_size", "missing"),
    [
        (SHORT, ()),
        (SHORT, ("merge_rows_kernel", "slice_rows_kernel")),
        (HELD, ()),
        (HELD, ("single_pass_rows_kernel",)),
    ],
)
def test_kernels_that_no_case_launched_are_a_problem(monkeypatch, stub_h200, vocab_size, missing):
    stub_h200()
    wanted = KERNELS | {"single_pass_rows_kernel"} if vocab_size == HELD else KERNELS
    launched = sorted(wanted - set(missing))
    document = check_that_launches(monkeypatch, vocab_size, *launched)
    assert document["kernels"] == launched
    assert document["problems"] == [f"kernels that no case launched: {', '.join(missing)}"] * bool(missing)
    assert is_right(document) == (not missing)
