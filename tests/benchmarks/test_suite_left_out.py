"""What cannot be measured is left out with its reason, said aloud, and the rest is measured."""

import pytest
from rich.console import Console

from benchmarks import shapes

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


def test_a_peer_that_is_not_installed_is_left_out_aloud(run, replace_contender, capsys):
    for name in ("liger", "liger linear"):
        replace_contender(name, problem=lambda device: "not installed")
    status, document = run(*SMALL, "--shapes", "16x100", "--peers", "liger")
    assert status == 0
    assert document["left_out"] == {"liger": "not installed"}
    assert "left out: liger: not installed" in capsys.readouterr().out


def test_what_a_peer_lacks_of_the_only_loss_measured_has_its_contenders_name(run, replace_contender):
    replace_contender("liger", problem=lambda device: None)
    replace_contender("liger linear", problem=lambda device: "too old")
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


def test_a_reason_may_hold_brackets(run, replace_contender, capsys):
    """They are rich's markup: a path in brackets would be an error, or vanish."""
    reason = "cannot be imported: [/usr/lib/a.so] [Errno 2]"
    replace_contender("torch", problem=lambda device: reason)

    def build(inputs):
        raise ValueError("[/broken] [too]")

    replace_contender("pdl in place", build=build)
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


def test_shapes_that_do_not_fit_are_left_out(run, monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 7 * 4 * 16 * 1000)
    monkeypatch.setattr(shapes, "_cpu_shapes", lambda dtype, quick: [(16, 1000), (17, 1000)])
    status, document = run("--device", "cpu", "--dtypes", "fp32", "--peers", "none", "--op", "forward", "--rounds", "2")
    assert status == 0
    assert {record["rows"] for record in document["records"]} == {16}
    assert "it needs about" in document["left_out"]["17 x 1000 float32"]
