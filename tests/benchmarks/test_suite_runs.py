"""What a run of the suite measures, checks and keeps."""

import pytest
import torch

from benchmarks import peers, results, suite, timing
from benchmarks.inputs import Case, make_inputs
from benchmarks.operations import OPERATIONS, Run

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shapes", "16x1000,8x2000", "--dtypes", "fp32", "--rounds", "3", "--peers", "torch"]
ONE_SHAPE = [argument.replace("16x1000,8x2000", "16x1000") for argument in TINY]


def test_a_run_writes_table_json_and_plots(run_and_plot, tmp_path, capsys):
    status, document = run_and_plot(*TINY)
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
    written = sorted(path.name.removeprefix(document["environment"]["date"][:10]) for path in path.parent.iterdir())
    commit = document["environment"]["commit"]
    assert written == [f"-{commit}-bandwidth.png", f"-{commit}.json"], "nothing half written is left"


def test_a_second_run_overwrites_nothing(run, tmp_path):
    arguments = [*ONE_SHAPE, "--op", "forward"]
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


def test_a_wrong_contender_is_reported_and_not_timed(run_and_plot, replace_contender, capsys):
    build = peers.CONTENDERS["torch"].build
    replace_contender("torch", build=lambda inputs: lambda logits: build(inputs)(logits) * 1.01)
    status, document = run_and_plot(*ONE_SHAPE)
    assert status == 0
    for record in document["records"]:
        wrong = record["contender"] == "torch"
        assert record["status"] == ("wrong" if wrong else "timed")
        assert bool(record["seconds"]) == (not wrong)
    assert "relative error of the loss" in capsys.readouterr().out


def test_a_wrong_gradient_is_noticed(run, replace_contender):
    def build(inputs):
        def loss(logits):
            right = peers.torch_eager.build(inputs)(logits)
            return right + (logits - logits.detach()).sum() * 1e-6

        return loss

    replace_contender("torch", build=build)
    _, document = run(*ONE_SHAPE)
    status = {r["operation"]: r["status"] for r in document["records"] if r["contender"] == "torch"}
    assert status == {"forward": "timed", "forward-backward": "wrong", "forward-backward-scaled": "wrong"}


def test_writing_to_logits_unannounced_is_wrong(run, replace_contender):
    build = peers.CONTENDERS["torch"].build

    def build_careless(inputs):
        def loss(logits):
            result = build(inputs)(logits)
            logits.detach()[0, 0] += 1
            return result

        return loss

    replace_contender("torch", build=build_careless)
    _, document = run(*ONE_SHAPE, "--op", "forward")
    problems = [r["problem"] for r in document["records"] if r["contender"] == "torch"]
    assert all("leave alone" in problem for problem in problems)


def test_our_own_failure_is_the_exit_status(run, replace_contender):
    def build(inputs):
        raise ValueError("broken\nin two lines")

    replace_contender("pdl", build=build)
    status, document = run(*ONE_SHAPE, "--op", "forward")
    assert status == 1
    records = {r["contender"]: r for r in document["records"]}
    assert (records["pdl"]["status"], records["pdl"]["problem"]) == ("failed", "ValueError: broken")
    assert records["torch"]["status"] == "timed"


def test_out_of_memory_is_a_result(run, replace_contender):
    calls = []

    def build(inputs):
        right = peers.torch_eager.build(inputs)

        def loss(logits):
            calls.append(1)
            if len(calls) > 4:  # past the check
                raise torch.cuda.OutOfMemoryError("no room")
            return right(logits)

        return loss

    replace_contender("torch", build=build)
    status, document = run(*TINY[:2], "--shapes", "16x1000", *TINY[4:], "--op", "forward-backward")
    assert status == 0
    (record,) = [r for r in document["records"] if r["contender"] == "torch"]
    assert (record["status"], record["seconds"]) == ("out of memory", [])


def test_ctrl_c_keeps_what_was_measured(run_and_plot, replace_contender, capsys):
    calls = []

    def build(inputs):
        right = peers.torch_eager.build(inputs)

        def loss(logits):
            calls.append(1)
            if inputs.case.rows == 8 and inputs.case.vocab_size == 2000 and len(calls) > 25:
                raise KeyboardInterrupt
            return right(logits)

        return loss

    replace_contender("torch", build=build)
    status, document = run_and_plot(*TINY)
    assert status == 130
    assert not document["complete"]
    first = [r for r in document["records"] if r["rows"] == 16]
    assert all(r["status"] == "timed" and len(r["seconds"]) == 3 for r in first)
    second = [r for r in document["records"] if r["rows"] == 8]
    assert {r["status"] for r in second} == {"timed", "not timed"}
    assert "interrupted" in capsys.readouterr().out
