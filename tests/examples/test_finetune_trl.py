"""examples/finetune_trl.py with a tiny model: it trains on what it counts, and refuses what it cannot use."""

import json

import pytest
import torch
from helpers.finetuning import chats, import_example, pairs, save_tiny_model, write_rows

for needed in ("accelerate", "datasets", "matplotlib", "rich", "gguf"):
    pytest.importorskip(needed, reason="the extras training and trl are not installed")
trl = pytest.importorskip("trl", minversion="1.16")
safetensors = pytest.importorskip("safetensors.torch")

from pdl_kernels import TokenCounts  # noqa: E402

program = import_example("finetune_trl")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny models gain nothing from several, and beside other work they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and files of pairs and of chats."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pairs())
    write_rows(folder / "chats.jsonl", chats())
    return folder


@pytest.fixture
def call(place, tmp_path, monkeypatch):
    """Runs the program for a few steps without the picture; returns its exit status."""
    monkeypatch.setattr(program, "save_plot", lambda path, scores, title: None)

    def run(*arguments, data="pairs.jsonl", model="model"):
        given = ["--model", place / model, "--data", place / data, "--output", tmp_path / "out"]
        given += ["--steps", 4, "--layers", 1, "--learning-rate", 0.01, *arguments]
        return program.main([str(argument) for argument in given])

    return run


def record_of(folder):
    return json.loads((folder / "out" / "finetune_trl.json").read_text())


@pytest.mark.trainers
@pytest.mark.parametrize("data", ["pairs.jsonl", "chats.jsonl"])
def test_it_trains_on_what_it_counts_and_compares(call, place, tmp_path, monkeypatch, data):
    trainers, counted = [], []
    make_trainer = program.make_trainer

    def watched(*arguments, **named):
        trainers.append(make_trainer(*arguments, **named))
        counted.append(named.get("counts"))
        return trainers[-1]

    monkeypatch.setattr(program, "make_trainer", watched)
    assert call("--max-length", 40, data=data) == 0
    counts = TokenCounts.from_dataloader(trainers[0].get_train_dataloader(), counted[0].vocab_size, progress=False)
    assert counts.counts.equal(counted[0].counts)
    assert counts.total > 100

    record = record_of(tmp_path)
    assert list(record["scores"]) == ["untouched", "cross entropy", "PDL"]
    untouched, cross_entropy, pdl = (rows["overall"]["nll"] for rows in record["scores"].values())
    assert cross_entropy < untouched
    assert pdl < untouched
    # The first step starts from the same weights and the same batch: only the weighted loss differs.
    first = {name: history[0] for name, history in record["training"].items()}
    assert first["PDL"]["nll"] == pytest.approx(first["cross entropy"]["nll"], rel=1e-5)
    assert first["cross entropy"]["loss"] == pytest.approx(first["cross entropy"]["nll"], rel=1e-4)
    assert abs(first["PDL"]["loss"] - first["PDL"]["nll"]) > 1e-3

    before = safetensors.load_file(place / "model" / "model.safetensors")
    for name in ("pdl", "cross_entropy"):
        after = safetensors.load_file(tmp_path / "out" / name / "model.safetensors")
        changed = {key for key, value in after.items() if not value.equal(before[key])}
        assert changed
        assert all(key.startswith(("model.layers.1.", "model.norm.")) for key in changed)


@pytest.mark.trainers
def test_adapters(call, tmp_path):
    pytest.importorskip("peft")
    assert call("--lora") == 0
    untouched, *trained = (rows["overall"]["nll"] for rows in record_of(tmp_path)["scores"].values())
    assert all(nll < untouched for nll in trained)
    adapters = safetensors.load_file(tmp_path / "out" / "pdl" / "adapter_model.safetensors")
    assert any("layers.0" in key for key in adapters)
    assert not any("lm_head" in key for key in adapters)


def test_a_trained_model_is_not_written_over(call, tmp_path, capsys):
    (tmp_path / "out" / "pdl").mkdir(parents=True)
    assert call() == 2
    assert "holds a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "files", "message"),
    [
        ([], {"data": "nothing.jsonl"}, "nothing.jsonl"),
        ([], {"model": "nothing"}, "--model"),
        (["--layers", 3], {}, "the model has 2 layers"),
        (["--max-length", 2], {}, "--max-length 2"),
    ],
    ids=["no data", "no model", "layers", "nothing left"],
)
def test_bad_input_is_one_line(call, capsys, arguments, files, message):
    assert call(*arguments, **files) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_package_is_named(call, monkeypatch, capsys):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    assert call("--lora") == 2
    assert "pip install peft" in capsys.readouterr().err
