"""The linear loss in the benchmark suite: its inputs, checks, table and plots."""

import dataclasses

import pytest
import torch

from benchmarks import peers
from benchmarks.correctness import check, expected_linear
from benchmarks.inputs import IGNORE_INDEX, Case, make_inputs
from benchmarks.memory import peaks_on_cpu
from benchmarks.operations import OPERATIONS, TRAINING, make_run
from benchmarks.traffic import floor_flops, planned_linear_memory

CPU = torch.device("cpu")
CASE = Case(24, 1000, "float32", hidden_size=32, ignored=0.5)
TINY = ["--device", "cpu", "--shapes", "16x32x1000", "--dtypes", "fp32", "--rounds", "3", "--peers", "torch"]


def test_inputs_are_like_a_trained_models():
    inputs = make_inputs(Case(600, 5000, "float32", hidden_size=256, ignored=0.25), CPU)
    hidden, head = inputs.sources
    counted = inputs.targets != IGNORE_INDEX
    assert counted.sum() == inputs.case.counted == 600 - 128 - 88
    p_y = (hidden @ head.T).softmax(-1).gather(1, inputs.targets.clamp(min=0)[:, None])[:, 0]
    confident = torch.arange(600) % 4 == 0
    assert (p_y[confident & counted] > 0.9).float().mean() > 0.9
    assert (p_y[~confident & counted] < 0.3).all()


def test_a_run_writes_table_json_and_plots(run_and_plot, tmp_path, capsys):
    status, document = run_and_plot(*TINY)
    assert status == 0
    names = ["pdl linear", "torch linear"]
    names += ["torch chunked"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else []  # from torch 2.13 on
    assert {(r["operation"], r["contender"]) for r in document["records"]} == {
        (o, n) for o in OPERATIONS for n in names
    }
    for record in document["records"]:
        assert record["status"] == "timed"
        assert record["floor_flops"] == (6 if "backward" in record["operation"] else 2) * 15 * 32 * 1000
        assert (record["planned_extra_bytes"] is None) == (record["contender"] != "pdl linear")
        assert (len(record.get("again", [])) == 3) == (record["contender"] == "pdl linear")
    assert [path.name.split("-")[-1] for path in tmp_path.rglob("*.png")] == ["linear.png"]
    shown = capsys.readouterr().out
    for text in ("16 x 32 x 1000 float32, 10% ignored", "GFLOP/s", "plan MB"):
        assert text in shown


def test_a_shape_of_a_loss_that_was_left_out_is_refused(run, capsys):
    assert run(*TINY, "--loss", "logits")[0] == 2
    assert "it is a shape of the linear loss, which --loss leaves out" in capsys.readouterr().err


@pytest.mark.parametrize("source", [0, 1], ids=["hidden states", "output layer"])
def test_a_wrong_gradient_is_noticed(source):
    right = peers.CONTENDERS["torch linear"]

    def build(inputs):
        loss = right.build(inputs)

        def wrong(*sources):
            sources = list(sources)
            sources[source] = sources[source] * 1.01 - sources[source].detach() * 0.01
            return loss(*sources)

        return wrong

    run_of_it = make_run(dataclasses.replace(right, build=build), make_inputs(CASE, CPU))
    verdicts = check(run_of_it, list(OPERATIONS.values()))
    assert verdicts["forward"].problem is None
    assert "gradient" in verdicts["forward-backward"].problem
    assert all(
        verdict.problem is None for verdict in check(make_run(right, make_inputs(CASE, CPU)), [TRAINING]).values()
    )


def test_the_reference_in_pieces_is_the_reference(monkeypatch):
    inputs = make_inputs(CASE, CPU)
    whole, (to_hidden, to_head) = expected_linear(inputs, weighted=True)
    monkeypatch.setattr("benchmarks.correctness.BLOCK_ELEMENTS", {"cpu": 7 * CASE.vocab_size})
    pieces, gradients = expected_linear(inputs, weighted=True)
    assert pieces == pytest.approx(whole)
    torch.testing.assert_close(gradients, (to_hidden, to_head))
    hidden, head = (source.double().requires_grad_() for source in inputs.sources)
    loss = torch.nn.functional.cross_entropy(hidden @ head.T, inputs.targets, weight=inputs.weights.double())
    assert loss.item() == pytest.approx(whole)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), (to_hidden, to_head))


def test_floors_and_plan():
    case = Case(8192, 128256, "bfloat16", hidden_size=4096, ignored=0.5)
    assert floor_flops(case, TRAINING) == 6 * 4096 * 4096 * 128256
    assert floor_flops(case._replace(hidden_size=0), TRAINING) == 0
    gradient = 4 * 128256 * 4096
    assert gradient < planned_linear_memory(case, TRAINING) < 2.2 * gradient


def test_the_plan_of_the_memory_holds():
    case = Case(2048, 4096, "float32", hidden_size=512, ignored=0.0)
    peaks, problem = peaks_on_cpu("pdl linear", case, 2)
    if problem:
        pytest.skip(problem)
    planned = planned_linear_memory(case, TRAINING)
    assert 0.8 * planned < peaks["forward-backward"] < planned + (16 << 20), "and what the library's product takes"
