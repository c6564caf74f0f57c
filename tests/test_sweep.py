"""The sweep over launch candidates: what it tries, what it keeps, and that it needs a GPU."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import sweep
from benchmarks.inputs import Case
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert sweep.main(["--out", str(tmp_path / "sweep.json")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def _stubbed_gpu(monkeypatch):
    """The interpreter stands for the GPU, and a counter for its clock."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU it would run")
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


@pytest.mark.usefixtures("_stubbed_gpu")
def test_a_candidate_that_fails_is_recorded_with_its_reason(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("cluster launch failed")

    monkeypatch.setattr(sweep.launch, "loss_rows", fail)
    path = tmp_path / "sweep.json"
    assert sweep.main([*ARGUMENTS, "--out", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert {record["problem"] for record in records} == {"RuntimeError: cluster launch failed"}


@pytest.mark.usefixtures("_stubbed_gpu")
def test_it_stops_when_its_time_is_over(tmp_path):
    path = tmp_path / "sweep.json"
    assert sweep.main([*ARGUMENTS, "--out", str(path), "--seconds", "0"]) == 0
    assert not path.exists()
