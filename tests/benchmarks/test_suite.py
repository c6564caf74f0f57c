"""The benchmark suite as a program: runs, records, compares, judges, and refuses what it cannot use."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from rich.console import Console

from benchmarks import bandwidth, environment, peers, results, shapes, suite, timing
from benchmarks.__main__ import InputError, main, make_parser, prepare
from benchmarks.compare import compare
from benchmarks.goals import judge
from benchmarks.inputs import IGNORE_INDEX, Case, make_inputs
from benchmarks.operations import OPERATIONS, Run
from benchmarks.peers import contender

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shapes", "16x1000,8x2000", "--dtypes", "fp32", "--rounds", "3", "--peers", "torch"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the program on tiny shapes, without what takes seconds; returns (exit status, document or None)."""
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(suite, "measure_host", lambda: {"problem": "not in this test"})
    monkeypatch.setattr(suite.memory, "peaks_on_cpu", lambda *_: ({}, "not in this test"))

    def run_program(*arguments):
        threads = ["--threads", str(torch.get_num_threads())]
        status = main([*arguments, *threads, "--out", str(tmp_path)])
        files = sorted(tmp_path.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return status, json.loads(files[-1].read_text()) if files else None

    return run_program


def replace_contender(monkeypatch, name, **changes):
    changed = dataclasses.replace(peers.CONTENDERS[name], **changes)
    monkeypatch.setitem(peers.CONTENDERS, name, changed)


def test_a_run_writes_table_json_and_plots(run, tmp_path, capsys):
    status, document = run(*TINY)
    assert status == 0
    path = next(tmp_path.rglob("*.json"))
    assert path.parent == tmp_path / "cpu"
    assert results.load(path) == document
    assert document["complete"]
    # Installers may leave out the build that torch names: 2.11.0 of 2.11.0+cu130.
    assert document["environment"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert document["bandwidth"]["copy"] > 0
    keys = {(r["operation"], r["rows"], r["vocab_size"], r["contender"]) for r in document["records"]}
    names = ("pdl", "pdl in place", "torch")
    assert keys == {(op, *shape, name) for op in OPERATIONS for shape in ((16, 1000), (8, 2000)) for name in names}
    for record in document["records"]:
        assert record["status"] == "timed"
        assert len(record["seconds"]) == 3
        assert min(record["seconds"]) > 0
        assert record["loss_error"] < 1e-5
        assert (len(record.get("again", [])) == 3) == (record["contender"] == "pdl")
        assert (record["planned_bytes"] is None) == (record["contender"] == "torch")
    assert len(list(tmp_path.rglob("*-bandwidth.png"))) == 1
    shown = capsys.readouterr().out
    for text in ("16 x 1000 float32", "pdl in place", "GB/s", "noise", "interpreter, whose time means nothing"):
        assert text in shown
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture
def _older_torch(monkeypatch):
    """A torch before 2.13, which lacks the operation of one of the contenders."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)


LACKING = {"torch chunked": "F.linear_cross_entropy came with torch 2.13"}


@pytest.mark.usefixtures("_older_torch")
@pytest.mark.parametrize(
    ("arguments", "left_out", "measured"),
    [
        (["--loss", "logits", "--shapes", "16x100"], {}, {"pdl", "pdl in place", "torch"}),
        (["--shapes", "16x100"], {}, {"pdl", "pdl in place", "torch"}),
        (["--loss", "linear", "--shapes", "16x8x100"], LACKING, {"pdl linear", "torch linear"}),
        (["--shapes", "16x8x100,16x100"], LACKING, {"pdl linear", "torch linear", "pdl", "pdl in place", "torch"}),
        (["--shapes", "16x8x100", "--quick"], LACKING, {"pdl linear", "torch linear"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_an_older_torch_lacks_is_left_out_and_the_rest_measured(run, capsys, arguments, left_out, measured):
    common = ["--device", "cpu", "--dtypes", "fp32", "--rounds", "1", "--peers", "torch", "--op", "forward-backward"]
    status, document = run(*common, *arguments)
    assert status == 0
    assert document["left_out"] == left_out
    assert {record["contender"] for record in document["records"] if record["status"] == "timed"} == measured
    shown = capsys.readouterr().out
    assert all(f"left out: {what}: {why}" in shown for what, why in left_out.items())


SMALL = ("--device", "cpu", "--dtypes", "fp32", "--rounds", "1", "--op", "forward")


def test_a_peer_that_cannot_run_is_left_out_aloud(run, capsys):
    status, document = run(*SMALL, "--shapes", "16x100", "--peers", "liger,torch")
    assert status == 0
    assert {record["contender"] for record in document["records"]} == {"pdl", "pdl in place", "torch"}
    assert "its kernels run on a GPU" in document["left_out"]["liger"]
    assert "left out: liger: its kernels run on a GPU" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_left_out_aloud(run, capsys, monkeypatch):
    for name in ("liger", "liger linear"):
        replace_contender(monkeypatch, name, problem=lambda device: "not installed")
    status, document = run(*SMALL, "--shapes", "16x100", "--peers", "liger")
    assert status == 0
    assert document["left_out"] == {"liger": "not installed"}
    assert "left out: liger: not installed" in capsys.readouterr().out


def test_what_a_peer_lacks_of_the_only_loss_measured_has_its_contenders_name(run, monkeypatch):
    replace_contender(monkeypatch, "liger", problem=lambda device: None)
    replace_contender(monkeypatch, "liger linear", problem=lambda device: "too old")
    _, document = run(*SMALL, "--shapes", "16x8x100", "--peers", "liger")
    assert document["left_out"] == {"liger linear": "too old"}, "its other loss would run"


def test_without_any_peer_this_package_is_measured(run):
    status, document = run(*SMALL, "--shapes", "16x100", "--peers", "liger,quack")
    assert status == 0
    assert {record["contender"] for record in document["records"]} == {"pdl", "pdl in place"}
    assert set(document["left_out"]) == {"liger", "quack"}


def test_shapes_that_cannot_be_measured_are_left_out(run, capsys):
    shapes_asked = "16x100,10000000x262144,16x8x100"
    status, document = run(*SMALL, "--loss", "logits", "--peers", "none", "--shapes", shapes_asked)
    assert status == 0
    assert {(record["rows"], record["vocab_size"], record["hidden_size"]) for record in document["records"]} == {
        (16, 100, 0)
    }
    assert len(document["left_out"]) == 2
    shown = capsys.readouterr().out
    assert "left out: 10000000 x 262144 float32: it needs about" in shown
    assert "it is a shape of the linear loss, which --loss leaves out" in shown


def test_a_shape_of_another_loss_alone_is_an_error(run, tmp_path, capsys):
    assert run(*SMALL, "--loss", "logits", "--peers", "none", "--shapes", "2048x512x32000")[0] == 2
    said = capsys.readouterr().err
    assert "nothing is left to measure: 2048 x 512 x 32000 float32" in said
    assert "it is a shape of the linear loss, which --loss leaves out" in said
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("peer", "loss", "shape"),
    [("cce", "logits", "16x100"), ("unsloth", "linear", "16x8x100"), ("torch.compile", "linear", "16x8x100")],
)
def test_a_peer_without_the_measured_loss_is_left_out_aloud(run, capsys, peer, loss, shape):
    status, document = run(*SMALL, "--loss", loss, "--shapes", shape, "--peers", f"torch,{peer}")
    assert status == 0
    left_out = {what: why for what, why in document["left_out"].items() if what not in LACKING}  # by an older torch
    assert left_out == {peer: f"it has nothing for the {loss} loss"}
    assert {record["status"] for record in document["records"]} == {"timed"}
    assert f"left out: {peer}: it has nothing for the {loss} loss" in capsys.readouterr().out


def test_a_reason_may_hold_brackets(run, monkeypatch, capsys):
    """They are rich's markup: a path in brackets would be an error, or vanish."""
    reason = "cannot be imported: [/usr/lib/a.so] [Errno 2]"
    replace_contender(monkeypatch, "torch", problem=lambda device: reason)

    def build(inputs):
        raise ValueError("[/broken] [too]")

    replace_contender(monkeypatch, "pdl in place", build=build)
    status, document = run(*SMALL, "--loss", "logits", "--shapes", "16x100", "--peers", "torch")
    assert status == 1
    assert document["left_out"] == {"torch": reason}
    before, after = capsys.readouterr().out.split("16 x 100 float32", 1)
    assert f"left out: torch: {reason}" in before, "before the run"
    assert f"left out: torch: {reason}" in after, "and beside the results"
    assert "ValueError: [/broken] [too]" in after


def test_it_is_yellow_on_a_terminal_before_the_run(run, monkeypatch, capsys):
    console = Console(force_terminal=True, color_system="standard", width=200)
    monkeypatch.setattr("benchmarks.__main__.make_console", lambda: console)
    assert run(*SMALL, "--shapes", "16x100", "--peers", "liger")[0] == 0
    said = capsys.readouterr().out
    line = said.index("left out: liger: ")
    assert said[:line].endswith("\x1b[33m")
    assert line < said.index("16 x 100 float32")


# ---------------------------------------------------------------------------------------------------------------------
# Every combination of options has something to measure, unless nothing was asked for

PEERS_OF_A_GPU = {"liger", "quack", "cce", "flash-attention", "fla", "unsloth"}


@pytest.fixture
def _any_device(monkeypatch):
    """Plans are made for a GPU as for a CPU; no peer but torch is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(environment, "describe", lambda device, contenders: {})
    monkeypatch.setattr(shapes, "free_memory", lambda device: 2 << 40)
    monkeypatch.setattr(contender.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def planned(*arguments):
    """(plan, document), nothing measured."""
    return prepare(make_parser().parse_args([*arguments, "--threads", str(torch.get_num_threads())]))


@pytest.mark.usefixtures("_older_torch", "_any_device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["", "quick"])
@pytest.mark.parametrize("loss", [None, "logits", "linear", "linear,logits"])
@pytest.mark.parametrize("sizes", [None, "1024x32000", "64x32x1000", "1024x32000,64x32x1000", f"9x{1 << 60},4x100"])
def test_every_combination_measures_something(device, quick, loss, sizes):
    operations = [None, "forward", "forward-backward-scaled", "forward,forward-backward"]
    dtypes = [None, "bf16", "fp16", "float32", "fp16,fp32"]
    named = [None, "none", *peers.PEERS, ",".join(peers.PEERS), "liger,torch"]
    asked_losses = set((loss or "logits,linear").split(","))
    kinds = {"linear" if size.count("x") == 2 else "logits" for size in sizes.split(",")} if sizes else asked_losses
    for op, dtype, asked in itertools.product(operations, dtypes, named):
        options = {"--op": op, "--loss": loss, "--shapes": sizes, "--dtypes": dtype, "--peers": asked}
        given = [text for option, value in options.items() if value is not None for text in (option, value)]
        arguments = ["--device", device, *quick, *given]
        if not kinds & asked_losses:
            with pytest.raises(InputError, match=r"nothing is left to measure: .* which --loss leaves out"):
                planned(*arguments)
            continue
        plan, document = planned(*arguments)
        assert plan.operations
        assert plan.steps > 0
        assert {case.loss for case in plan.cases} == kinds & asked_losses
        for case in plan.cases:
            names = {one.name for one in plan.contenders_of(case)}
            assert ("pdl linear" if case.linear else "pdl") in names, arguments
            if asked is None or "torch" in asked.split(","):
                assert ("torch linear" if case.linear else "torch") in names, arguments
        left_out = document["left_out"]
        for peer in PEERS_OF_A_GPU & set((asked or "").split(",")):
            assert any(peer == what or what.startswith(f"{peer} ") for what in left_out), "no peer vanishes silently"
        lacks = "linear" in kinds & asked_losses and (asked is None or "torch" in asked.split(","))
        assert ("torch chunked" in left_out) == lacks, "what is not measured is not mentioned"


@pytest.mark.usefixtures("_any_device")
@pytest.mark.parametrize("option", ["--op", "--loss", "--shapes", "--dtypes", "--peers", "--device"])
@pytest.mark.parametrize("value", ["", "nonsense", "torch,", "bf16,nonsense"])
def test_unknown_names_are_errors_in_every_option(option, value):
    with pytest.raises(InputError, match=option):
        planned(option, value)


def test_a_second_run_overwrites_nothing(run, tmp_path):
    arguments = [*TINY, "--op", "forward"]
    assert run(*arguments)[0] == 0
    first = next(tmp_path.rglob("*.json"))
    before = first.read_bytes()
    assert run(*arguments)[0] == 0
    assert len(list(tmp_path.rglob("*.json"))) == 2
    assert first.read_bytes() == before


def test_rounds_end_when_their_time_is_over():
    inputs = make_inputs(Case(2, 10, "float32"), CPU)
    lanes = [timing.Lane(Run(peers.CONTENDERS["torch"], inputs, None), []) for _ in range(2)]
    steps = []
    given_up = timing.time_interleaved(lanes, OPERATIONS["forward"], 50, 0.0, timing.make_stopwatch(CPU), steps.append)
    assert given_up == []
    assert [len(lane.seconds) for lane in lanes] == [timing.MIN_ROUNDS] * 2
    assert sum(steps) == 51 * 2, "the progress bar reaches its end"


def test_peak_memory_of_a_fresh_process():
    case = Case(512, 32000, "float32")
    for name, least, most in (("torch", 2.5, 3.5), ("pdl in place", 0.0, 0.2)):
        peaks, problem = suite.memory.peaks_on_cpu(name, case, threads=1)
        if problem == "only Linux resets the peak of the resident set":
            pytest.skip(problem)
        assert problem is None
        assert least <= peaks["forward-backward"] / case.logits_bytes <= most


def test_a_wrong_contender_is_reported_and_not_timed(run, monkeypatch, capsys):
    build = peers.CONTENDERS["torch"].build
    replace_contender(monkeypatch, "torch", build=lambda inputs: lambda logits: build(inputs)(logits) * 1.01)
    status, document = run(*TINY)
    assert status == 0
    for record in document["records"]:
        wrong = record["contender"] == "torch"
        assert record["status"] == ("wrong" if wrong else "timed")
        assert bool(record["seconds"]) == (not wrong)
    assert "relative error of the loss" in capsys.readouterr().out


def test_a_wrong_gradient_is_noticed(run, monkeypatch):
    def build(inputs):
        def loss(logits):
            right = peers.torch_eager.build(inputs)(logits)
            return right + (logits - logits.detach()).sum() * 1e-6

        return loss

    replace_contender(monkeypatch, "torch", build=build)
    _, document = run(*TINY)
    status = {r["operation"]: r["status"] for r in document["records"] if r["contender"] == "torch"}
    assert status == {"forward": "timed", "forward-backward": "wrong", "forward-backward-scaled": "wrong"}


def test_writing_to_logits_unannounced_is_wrong(run, monkeypatch):
    build = peers.CONTENDERS["torch"].build

    def build_careless(inputs):
        def loss(logits):
            result = build(inputs)(logits)
            logits.detach()[0, 0] += 1
            return result

        return loss

    replace_contender(monkeypatch, "torch", build=build_careless)
    _, document = run(*TINY, "--op", "forward")
    problems = [r["problem"] for r in document["records"] if r["contender"] == "torch"]
    assert all("leave alone" in problem for problem in problems)


def test_our_own_failure_is_the_exit_status(run, monkeypatch):
    def build(inputs):
        raise ValueError("broken\nin two lines")

    replace_contender(monkeypatch, "pdl", build=build)
    status, document = run(*TINY, "--op", "forward")
    assert status == 1
    records = {r["contender"]: r for r in document["records"]}
    assert (records["pdl"]["status"], records["pdl"]["problem"]) == ("failed", "ValueError: broken")
    assert records["torch"]["status"] == "timed"


def test_out_of_memory_is_a_result(run, monkeypatch):
    calls = []

    def build(inputs):
        right = peers.torch_eager.build(inputs)

        def loss(logits):
            calls.append(1)
            if len(calls) > 4:  # past the check
                raise torch.cuda.OutOfMemoryError("no room")
            return right(logits)

        return loss

    replace_contender(monkeypatch, "torch", build=build)
    status, document = run(*TINY[:2], "--shapes", "16x1000", *TINY[4:], "--op", "forward-backward")
    assert status == 0
    (record,) = [r for r in document["records"] if r["contender"] == "torch"]
    assert (record["status"], record["seconds"]) == ("out of memory", [])


def test_ctrl_c_keeps_what_was_measured(run, monkeypatch, capsys):
    calls = []

    def build(inputs):
        right = peers.torch_eager.build(inputs)

        def loss(logits):
            calls.append(1)
            if inputs.case.rows == 8 and inputs.case.vocab_size == 2000 and len(calls) > 25:
                raise KeyboardInterrupt
            return right(logits)

        return loss

    replace_contender(monkeypatch, "torch", build=build)
    status, document = run(*TINY)
    assert status == 130
    assert not document["complete"]
    first = [r for r in document["records"] if r["rows"] == 16]
    assert all(r["status"] == "timed" and len(r["seconds"]) == 3 for r in first)
    second = [r for r in document["records"] if r["rows"] == 8]
    assert {r["status"] for r in second} == {"timed", "not timed"}
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "ligre"], "'ligre': accepted are torch, torch.compile, liger"),
        (["--op", "sideways"], "'sideways': accepted are forward, forward-backward"),
        (["--dtypes", "int8"], "'int8': accepted are bfloat16"),
        (["--shapes", "1024"], "accepted are ROWSxVOCABULARY"),
        (["--shapes", "0x1000"], "accepted are ROWSxVOCABULARY"),
        (["--shapes", "10000000x262144"], "nothing is left to measure: 10000000 x 262144 float32: it needs about"),
        (["--device", "tpu"], "--device tpu: accepted are cpu and cuda"),
        (["--rounds", "0"], "--rounds 0"),
        (["--compare", "nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_bad_input_is_refused(run, tmp_path, capsys, arguments, message):
    status, _ = run("--device", "cpu", *arguments)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


def test_a_file_as_output_folder_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("precious")
    assert main([*TINY, "--out", str(path)]) == 2
    assert "a directory is accepted" in capsys.readouterr().err
    assert path.read_text() == "precious"


@pytest.mark.cpu_only(reason="it asks for a device that is not there")
def test_cuda_without_cuda_is_refused(run, capsys):
    assert run("--device", "cuda")[0] == 2
    assert "torch sees no such device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(version=99), "has version 99 of the results' format"),
        (lambda document: document.pop("records"), "is damaged: records missing"),
        (lambda document: document["records"][0].pop("seconds"), "is damaged: seconds missing"),
        (lambda document: document.update(schema="other"), "is not a results file of this suite"),
    ],
)
def test_results_of_another_kind_are_refused(run, tmp_path, capsys, change, message):
    document = synthetic()
    change(document)
    path = tmp_path / "elsewhere" / "old.json"
    path.parent.mkdir()
    path.write_text(json.dumps(document))
    assert run(*TINY, "--compare", str(path))[0] == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*.json")) == [path]


def test_a_results_file_cut_short_is_refused(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(synthetic())[:100])
    assert main([*TINY, "--compare", str(path), "--out", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Judging recorded results


CPU_CASE = Case(1024, 32000, "float32")


def synthetic(device="AMD EPYC", device_type="cpu", case=CPU_CASE, **milliseconds):
    """A complete document with one forward + backward of each named contender."""
    environment = {
        "date": "2026-01-01T00:00:00",
        "commit": "0123456789",
        "device": device,
        "device_type": device_type,
        "cpu": "AMD EPYC",
        "threads": 2,
        "packages": {},
    }
    document = results.new_document(environment, {"quick": False}, {})
    document.update(complete=True, bandwidth={"copy": 4e12, "read": 4.4e12})
    for name, time in (milliseconds or {"torch": 200.0, "pdl": 100.0}).items():
        document["records"].append(
            {
                "operation": "forward-backward",
                "rows": case.rows,
                "vocab_size": case.vocab_size,
                "dtype": case.dtype,
                "contender": name.replace("_", " "),
                "status": "timed",
                "problem": None,
                "seconds": [time / 1e3 * factor for factor in (0.99, 1.0, 1.01)],
                "floor_bytes": 2 * case.logits_bytes,
                "peak_extra_bytes": int(1e6 * time),
            }
        )
    return document


def judged(*documents):
    entries = [(results.Path(f"{number}.json"), document) for number, document in enumerate(documents)]
    return {judgement.goal.text: judgement for judgement in judge(entries)}


def test_goals_of_a_cpu():
    found = judged(synthetic(torch=200.0, pdl=125.0, pdl_in_place=50.0))
    missed = found["CPU, float32: times as fast as torch"]
    assert missed.status == "missed"
    assert "by 20%: 1.60x at 1024 x 32000 float32 (0.json), goal 2.00x; 1 of 1 cases miss it" in missed.detail
    assert found["CPU, in place: times as fast as torch"].status == "met"
    assert found["CPU: extra memory, of torch's"].status == "missed"
    assert found["CPU, in place: extra memory, of torch's"].status == "met"
    assert found["CPU, 16 bits: times as fast as torch"].status == "not measured"
    assert found["H200, bf16: times as fast as Liger"].status == "not measured"


def test_goals_of_a_gpu():
    case = Case(8192, 128256, "bfloat16")
    ideal = 2 * case.logits_bytes / 4e12 * 1e3  # ms at the copy bandwidth
    times = {"pdl": ideal / 0.95, "liger": 2.5 * ideal, "quack": 1.02 * ideal}
    found = judged(synthetic("NVIDIA H200", "cuda", case, **times))
    assert found["H200, bf16: forward + backward, of the 4-byte floor"].status == "met"
    assert found["H200, bf16: times as fast as Liger"].status == "met"
    assert found["H200, bf16: not behind QuACK, within noise"].status == "missed"
    assert found["H200, bf16: times as fast as torch.compile"].status == "not measured"
    assert found["H200, bf16: forward, of the read bandwidth"].status == "not measured"
    assert found["CPU, float32: times as fast as torch"].status == "not measured"
    other = judged(synthetic("NVIDIA A100", "cuda", case, **times))
    assert all(judgement.status == "not measured" for judgement in other.values())


def test_goals_of_the_host():
    document = synthetic()
    document["host"] = {"microseconds": {"median": 240.0}, "launches_forward": 3, "launches_backward": 1}
    found = judged(document)
    assert found["Host: microseconds of Python per forward + backward"].status == "missed"
    assert "by 50%" in found["Host: microseconds of Python per forward + backward"].detail
    assert found["Host: launches forward"].status == "met"


def test_goals_take_the_newest_complete_run():
    good, bad = synthetic(torch=200.0, pdl=90.0), synthetic(torch=200.0, pdl=180.0)
    goal = "CPU, float32: times as fast as torch"
    assert judged(good, bad)[goal].status == "missed"
    assert judged(bad, good)[goal].status == "met"
    bad["complete"] = False
    assert judged(good, bad)[goal].status == "met"
    bad.update(complete=True, options={"quick": True})
    assert judged(good, bad)[goal].status == "met"


def test_goals_from_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.RECORDED", tmp_path)  # not what the project has recorded so far
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "mine.json").write_text(json.dumps(synthetic(torch=200.0, pdl=50.0)))
    (tmp_path / "other.json").write_text('{"results": []}')
    assert main(["--goals", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mine.json" in shown
    assert "not measured" in shown
    (tmp_path / "cpu" / "mine.json").write_text(json.dumps({**synthetic(), "version": 0}))
    assert main(["--goals", "--out", str(tmp_path)]) == 2


def test_compare():
    old, new = synthetic(torch=200.0, pdl=100.0), synthetic(torch=201.0, pdl=150.0)
    changes = {change.key.contender: change for change in compare(old, new)}
    assert changes["pdl"].ratio == pytest.approx(1.5)
    assert changes["pdl"].verdict == "slower"
    assert changes["torch"].verdict == "within noise"
    noisy = copy.deepcopy(new)
    noisy["records"][1]["again"] = [0.3, 0.3, 0.3]  # the second instance took twice as long
    changes = {change.key.contender: change for change in compare(old, noisy)}
    assert changes["pdl"].noise == pytest.approx(1.0)
    assert changes["pdl"].verdict == "within noise"


def test_compare_two_files(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    paths[0].write_text(json.dumps(synthetic()))
    paths[1].write_text(json.dumps(synthetic("another machine", torch=200.0, pdl=50.0)))
    assert main(["--compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "0.50" in shown
    assert "faster" in shown
    assert "the device differs" in shown


# ---------------------------------------------------------------------------------------------------------------------
# The commit that was measured

GIT = """#!/bin/sh
case "$*" in
*rev-parse*) {answer} ;;
*status*) {changes} ;;
esac
"""


@pytest.fixture
def git(monkeypatch, tmp_path):
    """A function that makes a program git which says this, the only program on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PDL_KERNELS_COMMIT", raising=False)

    def make(answer, changes="true"):
        (tmp_path / "git").write_text(GIT.format(answer=answer, changes=changes))
        (tmp_path / "git").chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("changes", "commit"), [("true", "0123456789"), ("echo ' M pdl_kernels/losses/modules.py'", "0123456789-dirty")]
)
def test_the_commit_is_gits_answer(git, changes, commit):
    git("echo 0123456789", changes)
    assert environment.commit() == commit
    assert environment.describe(CPU, [])["commit"] == commit


def test_the_commit_that_was_told_counts_before_gits_answer(git, monkeypatch):
    git("echo 0123456789")
    monkeypatch.setenv("PDL_KERNELS_COMMIT", "abcdef0123-dirty")
    assert environment.commit() == "abcdef0123-dirty"
    monkeypatch.setenv("PDL_KERNELS_COMMIT", "")
    assert environment.commit() == "0123456789"


@pytest.mark.usefixtures("git")
def test_the_commit_is_unknown_without_git():
    assert environment.commit() == "unknown"


def test_the_commit_is_unknown_where_git_finds_no_checkout(git):
    git("exit 128")
    assert environment.commit() == "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and shapes


@pytest.mark.parametrize("rows", [1, 16, 600])
def test_inputs_are_like_a_trained_models(rows):
    inputs = make_inputs(Case(rows, 5000, "float32"), CPU)
    counted = inputs.targets != IGNORE_INDEX
    assert counted.sum() == inputs.case.counted >= 0.8 * rows
    p_y = inputs.logits.softmax(-1).gather(1, inputs.targets.clamp(min=0)[:, None])[:, 0]
    confident = torch.arange(rows) % 4 == 0
    assert (p_y[confident & counted] > 0.99).all()
    assert (p_y[~confident & counted] < 0.3).all()
    assert inputs.weights[0] < inputs.weights[-1], "frequent tokens weigh less"
    if rows > 1:
        assert (inputs.targets[counted] < 500).float().mean() > 0.5, "targets follow Zipf's law"


def test_default_shapes():
    for device in (CPU, torch.device("cuda")):
        for quick in (False, True):
            dtypes = shapes.default_dtypes(device, quick=quick)
            cases = shapes.default_cases(device, dtypes, quick=quick)
            assert len(set(cases)) == len(cases)
            assert quick or {case.vocab_size for case in cases} == set(shapes.VOCABULARIES)
    rows = {case.rows for case in shapes.default_cases(torch.device("cuda"), ["bfloat16"], quick=False)}
    assert min(rows) == 1
    assert max(rows) == 16384


def test_shapes_that_do_not_fit_are_left_out(run, monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 7 * 4 * 16 * 1000)
    monkeypatch.setattr(shapes, "_cpu_shapes", lambda dtype, quick: [(16, 1000), (17, 1000)])
    status, document = run("--device", "cpu", "--dtypes", "fp32", "--peers", "none", "--op", "forward", "--rounds", "2")
    assert status == 0
    assert {record["rows"] for record in document["records"]} == {16}
    assert "it needs about" in document["left_out"]["17 x 1000 float32"]
