"""The sweep over launch candidates: what it tries, what it keeps, and that it needs a GPU."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import ranking, sweep
from benchmarks.inputs import Case
from benchmarks.roofline.hardware import HARDWARE
from pdl_kernels.kernels import planner
from pdl_kernels.kernels.planner import SINGLE_PASS, TWO_PASSES, Device

H200 = Device(132, 32, True, (9, 0))


@pytest.mark.parametrize("vocab_size", sweep.VOCABULARIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_candidates_start_with_the_planners_choice_and_hold_whole_rows(vocab_size, dtype):
    case = Case(4096, vocab_size, dtype)
    found = sweep.candidates(case, H200, (3, 9))
    head = vocab_size % (16 // case.itemsize) != 0
    assert found[:2] == planner.plan_loss_and_gradient(4096, vocab_size, case.itemsize, H200, (3, 9), head=head)
    assert [plan.kernel for plan in found[:2]] == [SINGLE_PASS, TWO_PASSES]
    assert len(found) == len(set(found)) > 4
    for plan in found[2:]:
        assert plan.kernel == SINGLE_PASS
        assert plan.chunks * plan.lanes * (16 // case.itemsize) >= vocab_size
        assert plan.warps * 32 * plan.registers <= 65536, "one block of threads fits on a multiprocessor"


def test_older_tritons_are_not_asked_for_clusters():
    assert {plan.ctas for plan in sweep.candidates(Case(4096, 32000, "bfloat16"), H200, (3, 6))} == {1}


@pytest.mark.cpu_only(reason="on a GPU it would run")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert sweep.main(["--out", str(tmp_path / "sweep.json")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def _stubbed_gpu(monkeypatch):
    """The interpreter stands for the GPU, and a counter for its clock."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name: torch.empty(0).device)
    clock = iter(range(1, 10**6))

    def run_and_count(call):
        call()
        return float(next(clock))

    monkeypatch.setattr(sweep, "make_stopwatch", lambda device: run_and_count)
    held = [planner.held_row(300, 4, warps=1, ctas=1, registers=None, head=False)]
    two_passes = planner.plan_rows(planner.MANY_ROWS, 300, 4, 8, two_passes=True)
    monkeypatch.setattr(sweep, "candidates", lambda *_: [*held, two_passes])


ARGUMENTS = ["--dtypes", "float32", "--vocabularies", "300", "--rows", "4", "8"]


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu")
def test_every_candidate_is_recorded(tmp_path, capsys):
    path = tmp_path / "folder" / "sweep.json"
    assert sweep.main([*ARGUMENTS, "--out", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert [(r["rows"], r["plan"]["kernel"], r["planned"]) for r in records] == [
        (rows, kernel, kernel == SINGLE_PASS) for rows in (4, 8) for kernel in (SINGLE_PASS, TWO_PASSES)
    ]
    assert all(len(record["seconds"]) == sweep.ROUNDS and record["problem"] is None for record in records)
    assert "4 x 300 float32" in capsys.readouterr().out
    assert sweep.main([*ARGUMENTS, "--out", str(path)]) == 2, "nothing is overwritten"


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu")
def test_a_candidate_that_fails_is_recorded_with_its_reason(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("cluster launch failed")

    monkeypatch.setattr(sweep.launch, "loss_rows", fail)
    path = tmp_path / "sweep.json"
    assert sweep.main([*ARGUMENTS, "--out", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert {record["problem"] for record in records} == {"RuntimeError: cluster launch failed"}


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu")
def test_it_stops_when_its_time_is_over(tmp_path):
    path = tmp_path / "sweep.json"
    assert sweep.main([*ARGUMENTS, "--out", str(path), "--seconds", "0"]) == 0
    assert not path.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Fewer candidates


@pytest.mark.parametrize("vocab_size", sweep.VOCABULARIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_at_most_twenty_beside_the_planners(vocab_size, dtype):
    case = Case(4096, vocab_size, dtype)
    head = vocab_size % (16 // case.itemsize) != 0
    planned = planner.plan_loss_and_gradient(4096, vocab_size, case.itemsize, H200, (3, 9), head=head)
    everything = sweep.candidates(case, H200, (3, 9), None)
    for most in (0, 3, 20):
        found = sweep.candidates(case, H200, (3, 9), most)
        assert found == everything[: len(planned) + most], "the best ones, in the same order"
        assert found[: len(planned)] == planned


def test_the_ranking_prefers_what_the_model_says():
    hardware = HARDWARE["sm_90"]

    def seconds(vocab_size=128256, **shape):
        plan = planner.held_row(vocab_size, 2, **{"warps": 4, "ctas": 8, "registers": 96, "head": False, **shape})
        return ranking.seconds_per_row(hardware, plan, vocab_size, 2)

    assert seconds() < seconds(registers=192), "fewer rows held at once"
    assert seconds() < seconds(warps=16), "four times the fixed instructions"
    assert seconds(registers=96) <= seconds(registers=97), "registers come in eights"
    assert seconds(262144) > seconds(128256)
    floor = 2 * 128256 * 2 / hardware.memory_bandwidth
    assert seconds() >= floor
    assert seconds(registers=255, warps=32) == float("inf"), "no such block fits"


@pytest.mark.cpu_only(reason="its inputs are on the CPU")
def test_planned_work_is_what_the_sweep_runs(monkeypatch, tmp_path):
    timed = []

    def note(inputs, gradient, plan, stopwatch):
        timed.append(((inputs.rows, inputs.vocab_size), plan))
        return {"problem": None, "seconds": [1.0], "compile_seconds": 0.5}

    monkeypatch.setattr(sweep, "time_candidate", note)
    monkeypatch.setattr(sweep.launch, "device_of", lambda device: H200)
    arguments = ["float32"], [16384, 9000], [4, 8]
    saved = []
    sweep.sweep(list(sweep.cases(*arguments)), torch.device("cpu"), 1e9, lambda records: saved.append(len(records)), 2)
    work = sweep.planned_work(*arguments, H200, sweep.launch.TRITON_VERSION, 2)
    assert timed == [((case.rows, case.vocab_size), plan) for case, plan in work]
    assert saved[-1] == len(work) > 4


def test_what_matters_most_comes_first():
    order = [case.vocab_size for case in sweep.cases(["bfloat16"], [7, 50257, 32000, 128256], [4096])]
    assert order == [128256, 32000, 50257, 7]


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu")
def test_ctrl_c_in_the_middle_of_a_shape_keeps_what_was_timed(tmp_path, monkeypatch):
    time_one = sweep.time_candidate

    def interrupted(inputs, gradient, plan, stopwatch):
        if plan.kernel == TWO_PASSES:
            raise KeyboardInterrupt
        return time_one(inputs, gradient, plan, stopwatch)

    monkeypatch.setattr(sweep, "time_candidate", interrupted)
    path = tmp_path / "sweep.json"
    assert sweep.main([*ARGUMENTS, "--out", str(path)]) == 130
    records = json.loads(path.read_text())["records"]
    assert [record["plan"]["kernel"] for record in records] == [SINGLE_PASS]
    assert records[0]["compile_seconds"] > 0


def test_a_rehearsal_needs_the_interpreter(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert sweep.main(["--device", "cpu", "--out", str(tmp_path / "sweep.json")]) == 2
    assert "for rehearsals under TRITON_INTERPRET=1" in capsys.readouterr().err
