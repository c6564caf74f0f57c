"""`pdl-kernels doctor --check` runs cases in processes that may break, hang or be late: each is a finding."""

import itertools
import json

import pytest
import torch

from pdl_kernels import backends
from pdl_kernels.doctor import cases, worker
from pdl_kernels.doctor import check as checking
from pdl_kernels.doctor.cases import RECIPES
from pdl_kernels.doctor.check import Check, is_right, shares_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _eager_backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def _only_float32(monkeypatch):
    monkeypatch.setattr(cases, "DTYPES", {"float32": torch.float32})


# ---------------------------------------------------------------------------------------------------------------------
# The worker itself, with cases that break it

BREAKING_WORKER = """
import os
from pdl_kernels.doctor import worker
real = worker.check_case
def check_case(case, device, backend):
    with open({log!r}, "a") as log:
        print(os.getpid(), case.recipe, file=log)
    if case.recipe == "in place":
        os.kill(os.getpid(), 11)
    if case.recipe == "per token":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if case.recipe == "forward alone":
        raise ValueError("no")
    return real(case, device, backend)
worker.check_case = check_case
worker.main()
"""


@pytest.mark.usefixtures("_only_float32")
def test_a_case_that_crashes_or_breaks_the_device_is_a_finding(monkeypatch, tmp_path):
    log = tmp_path / "log"
    monkeypatch.setattr(checking, "WORKER", ("-c", BREAKING_WORKER.format(log=str(log))))
    saved = []
    check = Check(CPU, [130], save=lambda document: saved.append(json.dumps(document)))
    check.shapes = []
    document = check.run()
    status = {case["recipe"]: (case["status"], case.get("problem")) for case in document["cases"]}
    assert set(status) == set(RECIPES)
    assert status.pop("in place") == ("failed", "the process ended with SIGSEGV: no message")
    cuda_error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert status.pop("per token") == ("failed", cuda_error)
    assert status.pop("forward alone") == ("failed", "ValueError: no")
    assert set(status.values()) == {("right", None)}
    assert document["complete"]
    assert not is_right(document)
    assert len(saved) >= len(RECIPES), "saved as it goes"
    assert json.loads(saved[-1]) == document

    # Each case ran once, in order. Another process followed the crash and the error of the device, and nothing else.
    runs = [line.split(" ", 1) for line in log.read_text().splitlines()]
    recipes = [recipe for _, recipe in runs]
    assert recipes == [case.recipe for _, case in shares_of(check.cases, 1)[0]]
    assert [case["number"] for case in document["cases"]] == list(range(len(check.cases)))
    ended = [before for (process, before), (after, _) in itertools.pairwise(runs) if process != after]
    assert ended == ["in place", "per token"]
    assert len({process for process, _ in runs}) == 3


@pytest.mark.usefixtures("_only_float32")
def test_the_worker_that_the_command_starts():
    check = Check(CPU, [130])
    check.cases, check.shapes = check.cases[:1], []
    document = check.run()
    assert [(case["recipe"], case["status"]) for case in document["cases"]] == [("plain", "right")]
    assert is_right(document)


def test_a_triton_that_cannot_run_is_a_problem(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "triton_problem", lambda device, dtype: "Triton is gone")
    check = Check(CPU, [130])
    assert check.backend == "eager"
    assert check.document["problems"] == ["the Triton backend cannot run: Triton is gone"]


@pytest.mark.parametrize(
    ("message", "fatal"),
    [
        ("CUDA error: device-side assert triggered", True),
        ("HIP error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [HIP]: Code: 1, Messsage: invalid argument", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("shapes do not fit", False),
    ],
)
def test_errors_after_which_a_process_can_launch_nothing(message, fatal):
    assert worker.is_fatal(RuntimeError(message)) == fatal


@pytest.mark.usefixtures("_only_float32")
def test_a_worker_that_cannot_start_is_a_finding(monkeypatch):
    monkeypatch.setattr(checking, "WORKER", ("-c", "import sys; sys.exit('no such thing')"))
    document = Check(CPU, [130]).run()
    assert {case["status"] for case in document["cases"]} == {"failed"}
    assert "status 1: no such thing" in document["cases"][0]["problem"]
    assert "measuring ended early" in document["problems"][0]


# ---------------------------------------------------------------------------------------------------------------------
# Time and interruptions, with a worker that answers at once

QUICK_WORKER = """
import json, sys, time
order = json.load(sys.stdin)
def tell(**answer):
    print(json.dumps(answer), flush=True)
for number, (recipe, *_) in enumerate(order.get("cases", ())):
    tell(begin=number)
    if recipe == {hangs!r}:
        time.sleep(1000)
    tell(end=number, record={{"status": "right", "problem": None}})
for number, (vocab_size, dtype) in enumerate(order.get("shapes", ())):
    tell(end=number, record={{"vocab_size": vocab_size, "dtype": dtype}})
"""


@pytest.fixture
def _quick_worker(monkeypatch):
    monkeypatch.setattr(checking, "WORKER", ("-c", QUICK_WORKER.format(hangs=None)))


@pytest.mark.usefixtures("_only_float32")
def test_a_case_that_hangs_is_a_finding(monkeypatch):
    monkeypatch.setattr(checking, "WORKER", ("-c", QUICK_WORKER.format(hangs="read twice")))
    document = Check(CPU, [130], case_seconds=4).run()
    status = {case["recipe"]: (case["status"], case["problem"]) for case in document["cases"]}
    assert set(status) == set(RECIPES)
    assert status.pop("read twice") == ("failed", "it did not end within 4 s")
    assert set(status.values()) == {("right", None)}
    assert document["complete"]
    assert not is_right(document)


@pytest.mark.usefixtures("_quick_worker")
def test_what_has_no_time_left_is_not_run():
    document = Check(CPU, [130], seconds=0).run()
    assert {case["status"] for case in document["cases"]} == {"not run"}
    assert not is_right(document)


@pytest.mark.usefixtures("_quick_worker")
def test_the_time_ends_in_the_middle_of_a_process():
    check = Check(CPU, [130], seconds=1e9)

    def later(steps):
        check.deadline = 0.0  # the first result comes when the time is over

    check.progress = later
    document = check.run()
    status = [case["status"] for case in document["cases"]]
    assert status == ["right"] + ["not run"] * (len(status) - 1)
    assert {case["problem"] for case in document["cases"][1:]} == {"the time was over"}
    assert document["speed"] == []
    assert "3 of 3 shapes were not timed: the time was over (--seconds)" in document["notes"]


@pytest.mark.usefixtures("_quick_worker")
def test_times_that_end_early_are_said():
    check = Check(CPU, [130], seconds=1e9)
    steps = iter(range(1, 1000))

    def later(step):
        if next(steps) == len(check.cases) + 1:  # the first shape
            check.deadline = 0.0

    check.progress = later
    document = check.run()
    assert len(document["speed"]) == 1
    assert "2 of 3 shapes were not timed: the time was over (--seconds)" in document["notes"]
    assert is_right(document), "times are no part of the verdict"


@pytest.mark.usefixtures("_quick_worker")
def test_an_interruption_is_not_taken_for_the_end_of_the_time(monkeypatch):
    check = Check(CPU, [130])

    def interrupted(steps):
        check.workers.stop()
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check.run()
    check.progress = lambda steps: None
    check._check_share([(1, check.cases[1])])
    assert check.document["cases"][-1]["problem"] == "it was interrupted"
    assert not check.document["complete"]
