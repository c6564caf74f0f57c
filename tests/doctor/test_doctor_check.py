"""`pdl-kernels doctor --check`: that it finds what is wrong, and that whatever breaks is a finding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import inherited

from pdl_kernels.doctor import cases, correctness, worker
from pdl_kernels.doctor import check as checking
from pdl_kernels.doctor.cases import RECIPES, Case
from pdl_kernels.doctor.check import Check, is_right
from pdl_kernels.doctor.correctness import check_case

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def assert_right(found):
    assert (found["status"], found["problem"]) == ("right", None)


# ---------------------------------------------------------------------------------------------------------------------
# One case


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_eager_backend_is_right(recipe, dtype):
    found = check_case(Case(recipe, 9, 130, dtype), CPU, "eager")
    assert_right(found)
    assert 0 <= found["share_of_allowed"] <= 1
    assert (found["gradient_error"] is None) == (recipe == "forward alone")


@pytest.mark.parametrize(
    "recipe", ["plain", "read twice", "few rows", "every option", "linear", "columns with a stride"]
)
def test_the_triton_backend_is_right(device, recipe):
    pytest.importorskip("triton", reason="Triton is not installed")
    before = dict(os.environ)
    assert_right(check_case(Case(recipe, 4, 130, "bfloat16"), device, "triton"))
    assert dict(os.environ) == before, "forcing a kernel leaves nothing behind"


def with_wrong(monkeypatch, spoil):
    """`pdl_cross_entropy` whose loss and logits pass through `spoil`."""
    real = correctness.pdl_cross_entropy

    def wrong(logits, *arguments, **options):
        return spoil(logits, lambda given: real(given, *arguments, **options))

    monkeypatch.setattr(correctness, "pdl_cross_entropy", wrong)


class Spoiled(torch.autograd.Function):
    """The identity, whose gradient is changed at one row and column."""

    @staticmethod
    def forward(ctx, logits, row, column, change):
        ctx.where = row, column, change
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, upstream):
        row, column, change = ctx.where
        gradient = upstream.clone()
        gradient[row, column] = change(gradient[row, column])
        return gradient, None, None, None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, loss: loss(x) * 1.0001, "loss: "),
        (lambda x, loss: loss(Spoiled.apply(x, 0, 5, lambda g: g + 0.02)), "gradient: "),
        (lambda x, loss: loss(Spoiled.apply(x, 0, 5, lambda g: g * torch.nan)), "gradient: "),
        (lambda x, loss: loss(Spoiled.apply(x, 1, 5, lambda g: g + 1e-9)), "rows that do not count have a gradient"),
        (lambda x, loss: loss(Spoiled.apply(x, 0, 5, lambda g: g * (1 + 1e-6 * torch.rand(())))), "gave other bits"),
        (lambda x, loss: loss(x) + 0 * x[1].detach().sum(), "loss: inf"),
    ],
    ids=["loss", "one element", "nan", "ignored row", "bits", "reads an ignored row"],
)
def test_what_is_wrong_is_found(monkeypatch, spoil, message):
    with_wrong(monkeypatch, spoil)
    found = check_case(Case("plain", 9, 130, "float32"), CPU, "eager")
    assert found["status"] == "wrong"
    assert message in found["problem"]


def test_the_smallest_steps_of_float16_are_no_fault():
    """A gradient of 1e-7 has nothing else left: seen on a GPU, where torch's rounding was the luckier one."""
    step = 2.0**-24
    exact = torch.full((9, 130), 1.4 * step, dtype=torch.float64)

    def share(ours, dtype):
        errors = correctness._errors(exact, (ours * step).to(dtype), exact)
        limits = torch.finfo(dtype)
        return errors.worst_ratio(limits.eps / 2, limits.smallest_normal * limits.eps)

    nearest = torch.ones(9, 130, dtype=torch.float64)
    assert share(nearest, torch.float16) < 1
    assert share(nearest, torch.float32) > 1, "float32 has smaller steps"
    assert share(3 * nearest, torch.float16) > 1
    nearest[0, 0] = 3
    assert share(nearest, torch.float16) > 1, "one element, in the maximum norm"


def test_wrong_statistics_are_found(monkeypatch):
    real = correctness.pdl_cross_entropy

    def wrong(*arguments, **options):
        loss, stats = real(*arguments, **options)
        return loss, stats._replace(nll=stats.nll * 1.001)

    monkeypatch.setattr(correctness, "pdl_cross_entropy", wrong)
    assert "nll is" in check_case(Case("statistics and z-loss", 9, 130, "float32"), CPU, "eager")["problem"]


def test_launches_are_heard():
    knobs = pytest.importorskip("triton", reason="Triton is not installed").knobs
    names = []
    with correctness.heard_launches(names):
        for hook in knobs.runtime.launch_enter_hook.calls:
            hook(type("Metadata", (), {"get": lambda self: {"name": "some_kernel"}})())
    assert names == ["some_kernel"]
    assert not knobs.runtime.launch_enter_hook.calls


# ---------------------------------------------------------------------------------------------------------------------
# Which cases


def test_a_gpu_gets_every_recipe_vocabulary_and_dtype():
    found = cases.cases_for(132)
    assert {case.recipe for case in found} == set(RECIPES)
    assert {case.group for case in found} == {(size, dtype) for size in cases.VOCABULARIES for dtype in cases.DTYPES}
    assert {case.rows for case in found} == {cases.FEW_ROWS, 273}
    assert len(set(found)) == len(found)


def test_every_kernel_that_can_be_planned_is_in_the_cases():
    planner = pytest.importorskip("pdl_kernels.kernels.planner", exc_type=ImportError)
    h200 = planner.Device(132, 32, True, (9, 0))
    kernels = {
        planner.plan_loss(case.rows, case.vocab_size, cases.DTYPES[case.dtype].itemsize, h200, (3, 9))[0].kernel
        for case in cases.cases_for(132)
    }
    assert kernels == set(planner.KERNELS)


@pytest.mark.parametrize("processes", [1, 2, 16, 40])
def test_shares_are_whole_groups_and_lose_nothing(processes):
    found = cases.cases_for(132)
    shares = checking._shares(found, processes)
    assert sorted(numbered for share in shares for numbered in share) == list(enumerate(found))
    homes = [{case.kernels for _, case in share} for share in shares]
    assert sum(map(len, homes)) == len(set().union(*homes)) == 72
    assert len(shares) == processes
    # What takes longest to compile is not all in one share.
    assert max(map(len, shares)) <= len(found) / processes + 9


# ---------------------------------------------------------------------------------------------------------------------
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
    ("vocab_size", "triton_version", "kernels"),
    [
        (SHORT, (3, 9), KERNELS),
        (HELD, (3, 9), KERNELS | {"single_pass_rows_kernel"}),
        (HELD, (3, 6), KERNELS),
    ],
)
def test_the_kernels_to_see_are_those_that_are_planned(stub_h200, vocab_size, triton_version, kernels):
    stub_h200(triton_version)
    assert checking._kernels_to_see(CPU, cases.cases_for(132, [vocab_size])) == kernels


def check_that_launches(monkeypatch, vocab_size, *kernels):
    """A finished check of an H200 whose every case was right and launched one of these kernels."""

    def answers(order):
        for number, _ in enumerate(order["cases"]):
            yield {"begin": number}
            launched = [kernels[number % len(kernels)]]
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


# ---------------------------------------------------------------------------------------------------------------------
# Processes that break


WORKER = """
import os, sys, time
from pdl_kernels.doctor import worker
real = worker.check_case
def check_case(case, device, backend):
    if case.recipe == "in place":
        os.kill(os.getpid(), 11)
    if case.recipe == "read twice":
        time.sleep(1000)
    if case.recipe == "per token":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if case.recipe == "forward alone":
        raise ValueError("no")
    return real(case, device, backend)
worker.check_case = check_case
worker.main()
"""


def replace_worker(monkeypatch, tmp_path, text):
    path = tmp_path / "worker.py"
    path.write_text(text)
    monkeypatch.setattr(checking, "WORKER", (str(path),))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cases, "DTYPES", {"float32": torch.float32})


@pytest.fixture
def _breaking_worker(monkeypatch, tmp_path):
    replace_worker(monkeypatch, tmp_path, WORKER)


@pytest.mark.usefixtures("_breaking_worker")
def test_a_case_that_crashes_hangs_or_breaks_the_device_is_a_finding():
    saved = []
    check = Check(CPU, [130], case_seconds=15, save=lambda document: saved.append(json.dumps(document)))
    check.shapes = []
    document = check.run()
    status = {case["recipe"]: (case["status"], case.get("problem")) for case in document["cases"]}
    assert set(status) == set(RECIPES)
    assert status.pop("in place") == ("failed", "the process ended with SIGSEGV: no message")
    assert status.pop("read twice") == ("failed", "it did not end within 15 s")
    assert status.pop("per token")[1] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert status.pop("forward alone") == ("failed", "ValueError: no")
    assert set(status.values()) == {("right", None)}
    assert document["complete"]
    assert not is_right(document)
    assert len(saved) >= len(RECIPES), "saved as it goes"
    assert json.loads(saved[-1]) == document


FAILING_WORKER = """
import os
from pdl_kernels.doctor import worker
def check_case(case, device, backend):
    with open({log!r}, "a") as log:
        print(os.getpid(), case.recipe, file=log)
    raise RuntimeError({message!r})
worker.check_case = check_case
worker.main()
"""


@pytest.mark.parametrize(
    ("message", "processes"),
    [("CUDA error: an illegal memory access was encountered", 3), ("shapes do not fit", 1)],
)
def test_after_an_error_of_the_device_the_next_case_has_another_process(monkeypatch, tmp_path, message, processes):
    log = tmp_path / "log"
    replace_worker(monkeypatch, tmp_path, FAILING_WORKER.format(log=str(log), message=message))
    check = Check(CPU, [130])
    check.cases, check.shapes = check.cases[:3], []
    document = check.run()
    tried = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert [recipe for _, recipe in tried] == [case.recipe for case in check.cases]
    assert len({process for process, _ in tried}) == processes
    assert [case["number"] for case in document["cases"]] == [0, 1, 2]
    assert {case["problem"] for case in document["cases"]} == {f"RuntimeError: {message}"}


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


@pytest.mark.usefixtures("_breaking_worker")
def test_what_has_no_time_left_is_not_run():
    document = Check(CPU, [130], seconds=0).run()
    assert {case["status"] for case in document["cases"]} == {"not run"}
    assert not is_right(document)


def test_the_time_ends_in_the_middle_of_a_process(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
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


def test_times_that_end_early_are_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
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


def test_an_interruption_is_not_taken_for_the_end_of_the_time(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check = Check(CPU, [130])

    def interrupted(steps):
        check._stop()
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check.run()
    check.progress = lambda steps: None
    check._check([(1, check.cases[1])])
    assert check.document["cases"][-1]["problem"] == "it was interrupted"
    assert not check.document["complete"]


def test_a_worker_that_cannot_start_is_a_finding(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(checking, "WORKER", ("-c", "import sys; sys.exit('no such thing')"))
    monkeypatch.setattr(cases, "DTYPES", {"float32": torch.float32})
    check = Check(CPU, [130])
    document = check.run()
    assert {case["status"] for case in document["cases"]} == {"failed"}
    assert "status 1: no such thing" in document["cases"][0]["problem"]
    assert "measuring ended early" in document["problems"][0]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pdl_kernels.cli", "doctor", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=inherited(PYTHONPATH=str(ROOT), **environment),
    )  # fmt: skip


def test_the_command_checks_times_and_writes_json(tmp_path):
    pytest.importorskip("typer")
    path = tmp_path / "check.json"
    done = command("--check", "--device", "cpu", "--vocabulary", "200", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "51 of 51 cases right" in done.stdout
    assert "note: this is the eager backend; the Triton kernels run on a GPU" in done.stdout
    document = json.loads(path.read_text())
    assert document["complete"]
    assert is_right(document)
    assert document["copy_bytes_per_second"] > 0
    assert {record["dtype"] for record in document["speed"]} == set(cases.DTYPES)
    assert all(record["seconds"] > 0 and record["torch_seconds"] > 0 for record in document["speed"])
    assert document["installation"]["versions"]["torch"].startswith(torch.__version__)
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--device", "tpu"], "--device is tpu; accepted here are cpu"),
        (["--check", "--device", "cuda:99"], "--device is cuda:99; accepted here are cpu"),
        (["--check", "--vocabulary", "1"], "--vocabulary is 1; accepted are sizes from 2"),
        (["--device", "cpu"], "--device and --vocabulary are for --check"),
        (["--check", "--json", "nowhere/check.json"], "there is no folder nowhere"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    pytest.importorskip("typer")
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
