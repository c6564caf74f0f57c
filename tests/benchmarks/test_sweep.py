"""The sweep over launch candidates: what it tries, what it keeps, and that it needs a GPU."""

import json
import time

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import candidates, ranking, sweep
from benchmarks.inputs import VOCABULARIES, Case
from pdl_kernels.kernels import planner
from pdl_kernels.kernels.planner import SINGLE_PASS, TWO_PASSES, Device
from pdl_kernels.options import LossInputs

H200 = Device(132, 32, True, (9, 0))


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_candidates_start_with_the_planners_choice_and_hold_whole_rows(vocab_size, dtype):
    case = Case(4096, vocab_size, dtype)
    found = candidates.candidates(case, H200, (3, 9))
    head = vocab_size % (16 // case.itemsize) != 0
    assert found[:2] == planner.plan_loss(4096, vocab_size, case.itemsize, H200, (3, 9), head=head)
    assert [plan.kernel for plan in found[:2]] == [SINGLE_PASS, TWO_PASSES]
    assert len(found) == len(set(found)) > 4
    vector = 16 // case.itemsize
    for plan in found[2:]:
        assert plan.warps * 32 * plan.registers <= 65536, "one block of threads fits on a multiprocessor"
        if plan.kernel == SINGLE_PASS:
            assert plan.chunks * plan.lanes * vector >= vocab_size
        else:
            assert plan.kernel == TWO_PASSES
            assert (plan.slices, plan.lanes) == (1, plan.warps * 32)
            assert plan.slice_tiles * plan.unroll * plan.lanes * vector >= vocab_size
    assert {plan.warps for plan in found if plan.kernel == TWO_PASSES} >= {8, 16}


def test_rows_that_are_sliced_are_not_tried_with_other_shapes_of_whole_rows():
    found = candidates.candidates(Case(3, 128256, "bfloat16"), H200, (3, 9))
    assert [plan.kernel for plan in found if plan.kernel != SINGLE_PASS] == [planner.SLICES]


def test_older_tritons_are_not_asked_for_clusters():
    assert {plan.ctas for plan in candidates.candidates(Case(4096, 32000, "bfloat16"), H200, (3, 6))} == {1}


@pytest.mark.cpu_only(reason="on a GPU it would run")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert sweep.main(["--out", str(tmp_path / "sweep.json")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.cpu_only(reason="kernels are interpreted on a CPU alone")
def test_interpreted_kernels_are_not_timed_for_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sweep.main(["--out", str(tmp_path / "sweep.json")]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def _stubbed_gpu(monkeypatch):
    """The interpreter stands for the GPU, and a counter for its clock."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep, "interpreted", lambda: False)
    monkeypatch.setattr(torch, "device", lambda name: torch.empty(0).device)
    clock = iter(range(1, 10**6))

    def run_and_count(call):
        call()
        return float(next(clock))

    monkeypatch.setattr(sweep, "make_stopwatch", lambda device: run_and_count)
    monkeypatch.setattr(sweep, "WARM_UP", 1)  # an interpreted launch takes a second
    monkeypatch.setattr(sweep, "ROUNDS", 2)
    held = [planner.held_row(300, 4, warps=1, ctas=1, registers=None, head=False)]
    two_passes = planner.plan_rows(planner.MANY_ROWS, 300, 4, 8, two_passes=True)
    monkeypatch.setattr(candidates, "candidates", lambda *_: [*held, two_passes])


# An interpreted candidate takes long on a busy machine.
ARGUMENTS = ["--dtypes", "float32", "--vocabularies", "300", "--rows", "4", "8", "--candidate-seconds", "1000"]


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


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_at_most_twenty_beside_the_planners(vocab_size, dtype):
    case = Case(4096, vocab_size, dtype)
    head = vocab_size % (16 // case.itemsize) != 0
    planned = planner.plan_loss(4096, vocab_size, case.itemsize, H200, (3, 9), head=head)
    everything = candidates.candidates(case, H200, (3, 9), None)
    twice = sum(plan.kernel == TWO_PASSES for plan in everything[len(planned) :])
    assert twice >= 6
    assert candidates.candidates(case, H200, (3, 9), 0) == planned
    for most in (3, 20):
        found = candidates.candidates(case, H200, (3, 9), most)
        assert found == everything[: len(planned) + twice + most], "the best ones, in the same order"
        assert found[: len(planned)] == planned


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("triton_version", [(3, 6), (3, 9)])
def test_the_planners_choice_is_the_first_of_every_shape(vocab_size, dtype, triton_version):
    for rows in (1, *candidates.ROWS):
        case = Case(rows, vocab_size, dtype)
        head = vocab_size % (16 // case.itemsize) != 0
        planned = planner.plan_loss(rows, vocab_size, case.itemsize, H200, triton_version, head=head)
        for most in (0, 20, None):
            assert candidates.candidates(case, H200, triton_version, most)[0] == planned[0]


def test_warps_that_the_kernel_does_not_know_get_no_held_rows():
    amd = Device(304, 64, False)
    assert {plan.kernel for plan in candidates.candidates(Case(4096, 32000, "bfloat16"), amd, (3, 9))} == {TWO_PASSES}


def test_what_matters_most_comes_first():
    order = [case.vocab_size for case in candidates.cases(["bfloat16"], [7, 50257, 32000, 128256], [4096])]
    assert order == [128256, 32000, 50257, 7]
    first = [case for case, _ in sweep.planned_work(["bfloat16", "float32"], VOCABULARIES, [4096, 512], H200, (3, 9))]
    assert [(case.rows, case.vocab_size, case.dtype) for case in dict.fromkeys(first)][:6] == [
        *((4096, size, "bfloat16") for size in (128256, 32000, 262144, 151936, 50257)),
        (512, 128256, "bfloat16"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The ranking

SM_90 = ranking.hardware_of(H200)


def predicted(vocab_size=128256, itemsize=2, *, hardware=SM_90, **shape):
    shape = {"warps": 4, "ctas": 8, "registers": 96, "head": False, **shape}
    return ranking.seconds_per_row(hardware, planner.held_row(vocab_size, itemsize, **shape), vocab_size, itemsize)


def test_the_ranking_prefers_what_the_model_says():
    assert predicted() < predicted(registers=192), "fewer rows held at once"
    assert predicted() < predicted(warps=16), "four times the fixed instructions"
    assert predicted(registers=96) <= predicted(registers=97), "registers come in eights"
    assert predicted(262144) > predicted(128256)
    assert predicted() >= 2 * 128256 * 2 / SM_90.memory_bandwidth, "nothing is faster than memory"
    assert predicted(registers=255, warps=32) == float("inf"), "no such block fits"
    assert predicted(registers=None) == predicted(registers=255)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("ctas", candidates.CLUSTERS)
@pytest.mark.parametrize("warps", [4, 8, 16])
def test_more_columns_held_at_once_are_never_slower(vocab_size, itemsize, ctas, warps):
    """At equal instructions: the same threads with a smaller limit on registers, of which more fit."""
    times = [predicted(vocab_size, itemsize, ctas=ctas, warps=warps, registers=count) for count in range(32, 256, 8)]
    assert times == sorted(times)


@pytest.mark.parametrize("warps", [4, 8])
def test_more_columns_of_a_thread_are_never_slower_per_column(warps):
    """At equal residency: the fixed instructions and the latency serve more columns."""
    sizes = [4096 * columns for columns in (8, 16, 32, 64)]
    times = [predicted(size, warps=warps, registers=128) / size for size in sizes]
    assert times == sorted(times, reverse=True)


def test_the_planners_choices_are_among_the_best_of_the_model():
    """The model and the planner's table have the same origin: where they part, one of them is wrong."""
    for vocab_size in VOCABULARIES:
        planned, *others = candidates.candidates(Case(4096, vocab_size, "bfloat16"), H200, (3, 9), None)
        held = [plan for plan in others if plan.kernel == SINGLE_PASS]
        ranks = ranking.ranked(SM_90, [planned, *held], vocab_size, 2)
        assert ranks.index(planned) <= 1
        share = 2 * vocab_size * 2 / SM_90.memory_bandwidth / ranking.seconds_per_row(SM_90, planned, vocab_size, 2)
        assert 0.74 < share < 0.94, "what kernel notes predict for these launches"


def test_devices_are_ranked_by_their_own_data_sheets():
    assert ranking.hardware_of(Device(108, 32, True, (8, 0))).name == "A100"
    assert ranking.hardware_of(Device(114, 32, True, (9, 0))).multiprocessors == 114
    unknown = ranking.hardware_of(Device(8, 32, False))
    assert unknown.issue_rate is not None
    slow = SM_90._replace(memory_bandwidth=SM_90.memory_bandwidth / 4)
    assert predicted(hardware=slow) > predicted()


def test_mean_value_analysis():
    assert ranking.throughput(1, [2.0, 3.0], 5.0) == pytest.approx(1 / 10), "alone, nobody waits"
    assert ranking.throughput(1000, [2.0, 3.0], 5.0) == pytest.approx(1 / 3, rel=1e-2), (
        "the slowest station is the limit"
    )
    # Two customers, one station of 1 second, think time 1: each waits 1 + 1 / 2 seconds on average.
    assert ranking.throughput(2, [1.0], 1.0) == pytest.approx(2 / 2.5)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept, and when it ends


@pytest.fixture
def _work(monkeypatch):
    """Two shapes with three candidates each, and a stub that stands for timing one."""
    work = [
        (Case(rows, 300, "float32"), planner.held_row(300, 4, warps=warps, ctas=1, registers=None, head=False))
        for rows in (4, 8)
        for warps in (1, 2, 4)
    ]
    monkeypatch.setattr(sweep, "planned_work", lambda *_: work)


def outcome(**changes):
    return {"problem": None, "seconds": [1.0], "compilations": 1, "compile_seconds": 0.5, **changes}


@pytest.mark.cpu_only(reason="its inputs are on the CPU")
def test_planned_work_is_what_the_sweep_runs(monkeypatch, tmp_path):
    timed = []

    def note(inputs, gradient, plan, stopwatch, limit):
        timed.append((tuple(inputs.logits.shape[1:]), plan))
        return outcome()

    monkeypatch.setattr(sweep, "time_candidate", note)
    monkeypatch.setattr(sweep.launch, "device_of", lambda device: H200)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "sweep.json"
    sizes = ["--dtypes", "float32", "--vocabularies", "9000", "16384", "--rows", "4", "8", "--candidates", "2"]
    assert sweep.main(["--device", "cpu", *sizes, "--out", str(path)]) == 0
    work = sweep.planned_work(["float32"], [9000, 16384], [4, 8], H200, sweep.launch.TRITON_VERSION, 2)
    assert timed == [((case.rows, case.vocab_size), plan) for case, plan in work]
    document = json.loads(path.read_text())
    assert len(document["records"]) == len(work) > 4
    assert document["complete"]
    assert document["compilations"] == len(work)
    assert document["compile_seconds"] == pytest.approx(0.5 * len(work))
    planned = [record["planned"] for record in document["records"]]
    assert sum(planned) == 4, "one of each shape"
    assert planned[0]


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu", "_work")
@pytest.mark.parametrize("saved_after", [0.0, 1e9], ids=["after every candidate", "at the end"])
def test_it_saves_as_it_goes(tmp_path, monkeypatch, saved_after):
    path = tmp_path / "sweep.json"
    on_disk = []

    def note(*_):
        on_disk.append(len(json.loads(path.read_text())["records"]) if path.exists() else 0)
        return outcome()

    monkeypatch.setattr(sweep, "SAVE_EVERY", saved_after)
    monkeypatch.setattr(sweep, "time_candidate", note)
    assert sweep.main(["--out", str(path)]) == 0
    assert on_disk == ([0, 1, 2, 3, 4, 5] if saved_after == 0 else [0] * 6)
    assert len(json.loads(path.read_text())["records"]) == 6


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu", "_work")
def test_the_time_ends_in_the_middle_of_a_shape(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    limits = []

    def take_ten_seconds(inputs, gradient, plan, stopwatch, limit):
        clock[0] += 10
        limits.append(limit)
        return outcome()

    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sweep, "time_candidate", take_ten_seconds)
    path = tmp_path / "sweep.json"
    assert sweep.main(["--out", str(path), "--seconds", "45", "--candidate-seconds", "30"]) == 0
    document = json.loads(path.read_text())
    assert [record["rows"] for record in document["records"]] == [4, 4, 4, 8, 8]
    assert not document["complete"]
    assert limits == [30, 30, 25, 15, 5], "none may take longer than what is left"
    assert "5 of 6 candidates" in capsys.readouterr().out


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu", "_work")
def test_a_shape_that_does_not_fit_is_left_out_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "time_candidate", lambda *_: outcome())
    monkeypatch.setattr(sweep, "misfit", lambda case, device: "too large" if case.rows == 4 else None)
    path = tmp_path / "sweep.json"
    assert sweep.main(["--out", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["left_out"] == {"4 x 300 float32": "too large"}
    assert [record["rows"] for record in document["records"]] == [8, 8, 8]
    assert "left out: 4 x 300 float32: too large" in capsys.readouterr().out


@pytest.mark.cpu_only(reason="its inputs are on the CPU")
def test_a_candidate_is_given_up_after_its_time(monkeypatch):
    """The first launch, those that warm up and one sample are done, and that sample is kept."""
    inputs = LossInputs(torch.zeros(1, 4, 300), torch.zeros(4, dtype=torch.int64), None, None, None)
    plan = planner.held_row(300, 4, warps=1, ctas=1, registers=None, head=False)

    def timed(seconds_of_each):
        launches = iter(seconds_of_each)
        monkeypatch.setattr(sweep.launch, "loss_rows", lambda *_: time.sleep(next(launches)))
        return sweep.time_candidate(inputs, torch.zeros(1, 4, 300), plan, lambda run: run() or 1.0, 0.2)

    slow = timed([30])
    assert slow["problem"] == "TimeoutError: not done after 0.2 seconds"
    assert slow["seconds"] == []
    assert 0.15 < slow["compile_seconds"] < 5
    enough = timed([0.01] * (2 + sweep.WARM_UP) + [30])
    assert enough["problem"] is None
    assert enough["seconds"] == [1.0]
    fast = timed([0.0] * 20)
    assert fast["seconds"] == [1.0] * sweep.ROUNDS
    assert fast["compile_seconds"] < 0.15


@pytest.mark.parametrize("arguments", [["--candidates", "-1"], ["--rows", "0"], ["--vocabularies", "1"]])
def test_impossible_sizes_are_refused(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        sweep.main([*arguments, "--out", str(tmp_path / "sweep.json")])
    assert ended.value.code == 2
    assert "is accepted" in capsys.readouterr().err


@pytest.mark.cpu_only(reason="on a GPU it would run")
@pytest.mark.usefixtures("_stubbed_gpu")
def test_ctrl_c_in_the_middle_of_a_shape_keeps_what_was_timed(tmp_path, monkeypatch):
    time_one = sweep.time_candidate

    def interrupted(inputs, gradient, plan, stopwatch, limit):
        if plan.kernel == TWO_PASSES:
            raise KeyboardInterrupt
        return time_one(inputs, gradient, plan, stopwatch, limit)

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
