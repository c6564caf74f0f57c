"""The suite's command line: every combination of options has something to measure, unless nothing was asked for."""

import itertools

import pytest
import torch

from benchmarks import environment, peers, shapes
from benchmarks.__main__ import InputError, main, make_parser, prepare
from benchmarks.peers import contender

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


PARSER = make_parser()


def planned(*arguments):
    """(plan, document), nothing measured."""
    return prepare(PARSER.parse_args([*arguments, "--threads", str(torch.get_num_threads())]))


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
    assert main(["--device", "cpu", "--shapes", "16x1000", "--out", str(path)]) == 2
    assert "a directory is accepted" in capsys.readouterr().err
    assert path.read_text() == "precious"


@pytest.mark.cpu_only(reason="it asks for a device that is not there")
def test_cuda_without_cuda_is_refused(run, capsys):
    assert run("--device", "cuda")[0] == 2
    assert "torch sees no such device" in capsys.readouterr().err
