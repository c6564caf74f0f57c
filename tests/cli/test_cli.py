"""The command line, end to end, on files that the tests make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the extra cli is not installed")
pytest.importorskip("rich")
pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from helpers.command_line import TEXTS, fail, files_here, invoke, run, write_json  # noqa: E402

from pdl_kernels import TokenCounts, backends, load_weights  # noqa: E402
from pdl_kernels.cli import weights as weights_command  # noqa: E402
from pdl_kernels.weights import files  # noqa: E402
from pdl_kernels.weights.recipes import weightings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_a_full_disk_is_exit_code_1(counts, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace_file", full)
    message = fail(1, "weights", counts, "--output", "weights.safetensors")
    assert message == "error: [Errno 28] No space left on device\n"


def test_a_bug_is_shown_on_demand(counts):
    done = invoke("--traceback", "weights", "nowhere.safetensors", "--output", "w.safetensors")
    assert isinstance(done.exception, FileNotFoundError)


# weights


def test_weights_are_the_recipe_with_its_defaults(counts):
    output = run("weights", counts, "--output", "weights.safetensors")
    saved = load_weights("weights.safetensors")
    expected = weightings()["power_law"]()
    assert saved.weighting == expected
    torch.testing.assert_close(saved.table, expected.table(TokenCounts.load(counts)), rtol=0, atol=0)
    assert saved.facts["tokens"] == TokenCounts.load(counts).total
    assert "effective sample size" in output


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (["--alpha", 0.7, "--eps", 2], {"alpha": 0.7, "eps": 2.0}),
        (["--recipe", "inverse"], {"name": "inverse"}),
        (
            ["--recipe", "square_root_inverse", "--normalize", "max"],
            {"name": "square_root_inverse", "normalize": "max"},
        ),
        (["--recipe", "class_balanced", "--beta", 0.9], {"name": "class_balanced", "beta": 0.9}),
        (["--recipe", "smoothed_inverse", "--a", 0.01], {"name": "smoothed_inverse", "a": 0.01}),
        (["--normalize", "none"], {"normalize": None}),
        (["--unseen", "cap"], {"unseen": "cap"}),
        (["--unseen", "formula"], {"unseen": "formula"}),
        (["--unseen", 0.5], {"unseen": 0.5}),
        (["--clip", 0.5, 2], {"clip": (0.5, 2.0)}),
        (["--neutral-id", 3, "--neutral-id", 7], {"neutral_ids": (3, 7)}),
        (["--tokenizer", "tokenizer.json", "--neutral-special"], {"neutral_ids": (0, 1, 2)}),
        (["--tokenizer", "tokenizer.json", "--neutral-special", "--neutral-id", 5], {"neutral_ids": (0, 1, 2, 5)}),
        (["--paper"], {"alpha": 1.0, "eps": 1e-7, "normalize": None, "unseen": "formula"}),
    ],
)
def test_options_of_weights(counts, options, recipe):
    run("weights", counts, "--output", "weights.safetensors", *options)
    saved = load_weights("weights.safetensors")
    defaults = weightings()[recipe.get("name", "power_law")]().recipe()
    assert saved.weighting.recipe() == {**defaults, **recipe}
    table = saved.weighting.table(TokenCounts.load(counts))
    torch.testing.assert_close(saved.table, table, rtol=0, atol=0)


def test_idf_needs_documents(counts, tokenizer):
    message = fail(2, "weights", counts, "--recipe", "idf", "--output", "weights.safetensors")
    assert "accepted are counts of `pdl-kernels count --documents`" in message
    run("count", "corpus.jsonl", "--tokenizer", tokenizer, "--output", counts, "--overwrite", "--documents")
    run("weights", counts, "--recipe", "idf", "--output", "weights.safetensors")
    assert load_weights("weights.safetensors").weighting.name == "idf"


def test_weights_of_a_longer_output_layer_and_warnings(counts):
    output = run("weights", counts, "--output", "weights.safetensors", "--vocab-size", 12, "--paper")
    assert load_weights("weights.safetensors").table[8:].tolist() == pytest.approx([1e7] * 4, rel=1e-6)
    assert "warning: " in output
    assert "never counted" in output


def test_every_recipe_is_on_offer():
    assert [recipe.value for recipe in weights_command.Recipe] == list(weightings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", 0.9], "--beta belongs to --recipe class_balanced; --recipe power_law takes --alpha, --eps"),
        (["--recipe", "inverse", "--alpha", 1], "--recipe inverse takes no option of its own"),
        (["--recipe", "class_balanced", "--a", 1], "--a belongs to --recipe smoothed_inverse"),
        (["--recipe", "tfidf"], "Invalid value for '--recipe'"),
        (["--normalize", "median"], "Invalid value for '--normalize'"),
        (["--alpha", -1], "Invalid value for '--alpha'"),
        (["--alpha", "much"], "Invalid value for '--alpha'"),
        (["--alpha", "nan"], "--alpha"),  # typer refuses it, or, where it is an older one, the package
        (["--alpha", "inf"], "--alpha"),
        (["--recipe", "class_balanced", "--beta", 1], "--beta is 1.0; accepted are numbers >= 0 and < 1"),
        (["--unseen", "most"], "--unseen is 'most'; accepted are a number >= 0, formula and cap"),
        (["--unseen", -1], "--unseen is -1"),
        (["--recipe", "inverse", "--unseen", "formula"], "is not finite in float32"),
        (["--clip", 2, 1], "--clip is 2 1; accepted are two numbers, 0 <= LOW <= HIGH"),
        (["--neutral-id", 8], "neutral_ids hold 8; accepted are ids from 0 to 7"),
        (["--neutral-special"], "--neutral-special needs --tokenizer"),
        (["--vocab-size", 4], "--vocab-size is 4; accepted are integers >= 8"),
        (["--paper", "--alpha", 1], "--paper is a whole recipe, and --alpha came with it"),
        (["--paper", "--recipe", "inverse"], "--paper is a whole recipe, and --recipe came with it"),
        (["--paper", "--clip", 1, 2], "--paper is a whole recipe, and --clip came with it"),
        (["--paper", "--neutral-id", 1], "--paper is a whole recipe, and --neutral-id came with it"),
        (["--alhpa", 1], "No such option"),
    ],
)
def test_errors_of_options_of_weights(counts, options, message):
    assert message in fail(2, "weights", counts, "--output", "weights.safetensors", *options)
    assert not Path("weights.safetensors").exists()


def test_errors_of_files_of_weights(counts, weights):
    before = Path(weights).read_bytes()
    assert "which exists; --overwrite replaces it" in fail(2, "weights", counts, "--output", weights, "--alpha", 1)
    assert Path(weights).read_bytes() == before
    run("weights", counts, "--output", weights, "--alpha", 1, "--overwrite")
    assert load_weights(weights).weighting.alpha == 1

    assert "there is no file nowhere" in fail(2, "weights", "nowhere", "--output", "w.safetensors")
    Path("damaged.safetensors").write_bytes(before[:50])
    assert "damaged.safetensors is damaged" in fail(2, "weights", "damaged.safetensors", "--output", "w.safetensors")
    swapped = fail(2, "weights", weights, "--output", "w.safetensors")
    assert "is pdl_kernels weight table; accepted is pdl_kernels token counts" in swapped


# inspect


def test_inspect(weights, counts, tokenizer):
    output = run("inspect", weights, counts, "--tokenizer", tokenizer)
    for expected in ("Weights and corpus", "Heaviest types", "Lightest types seen", "Largest shares", "alpha=0.4"):
        assert expected in output
    assert "'mat'" in output
    assert f"{TokenCounts.load(counts).total:,} in {len(TEXTS)} sequences" in output
    assert "'mat'" not in run("inspect", weights, counts)


def test_inspect_json(weights, counts, tokenizer):
    found = json.loads(run("inspect", weights, counts, "--tokenizer", tokenizer, "--json"))
    total = TokenCounts.load(counts)
    assert found["targets"] == total.total
    assert found["recipe"] == {**weightings()["power_law"]().recipe(), "neutral_ids": []}
    assert found["lightest_types"][0]["text"] == "the"
    assert found["lightest_types"][0]["count"] == int(total.counts[3])
    assert found["warnings"] == []


def test_inspect_shows_tokens_as_they_are(tokenizer):
    # In a table of rich, [red] would be a colour and a line end would break the row.
    made = tokenizers.Tokenizer.from_file(tokenizer)
    made.add_tokens(["[red]", "a\nb"])
    made.save("markup.json")
    write_json("labels.jsonl", [{"labels": [8, 9, 9]}])
    options = ["--column", "labels", "--vocab-size", 10, "--no-shift"]
    run("count", "labels.jsonl", *options, "--output", "c.safetensors")
    run("weights", "c.safetensors", "--output", "w.safetensors")
    output = run("inspect", "w.safetensors", "c.safetensors", "--tokenizer", "markup.json")
    assert "'[red]'" in output
    assert r"'a\nb'" in output


def test_inspect_warns_of_other_counts(weights, counts, tokenizer):
    Path("other.txt").write_text("the cat\n")
    run("count", "other.txt", "--tokenizer", tokenizer, "--output", "other.safetensors")
    output = run("inspect", weights, "other.safetensors")
    assert "warning: the weights were made from counts of" in output
    assert "these are counts of 2" in output


def test_errors_of_inspect(weights, counts):
    assert "there is no file nowhere" in fail(2, "inspect", "nowhere", counts)
    assert "accepted is pdl_kernels weight table" in fail(2, "inspect", counts, weights)
    write_json("labels.jsonl", [{"labels": [3, 4]}])
    run("count", "labels.jsonl", "--column", "labels", "--vocab-size", 20, "--output", "long.safetensors")
    assert "counts have 20 entries; accepted are at most 8" in fail(2, "inspect", weights, "long.safetensors")
    assert "long.safetensors" in fail(2, "inspect", weights, "long.safetensors", "--tokenizer", "long.safetensors")


# plot


def png_size(path):
    content = Path(path).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_plot(weights, counts):
    pytest.importorskip("matplotlib")
    before = files_here()
    run("plot", weights, counts, "--output", "plot.png")
    assert png_size("plot.png") == (1500, 500)
    assert files_here() - before == {"plot.png"}
    assert "which exists" in fail(2, "plot", weights, counts, "--output", "plot.png")
    run("plot", weights, counts, "--output", "plot.png", "--overwrite")
    assert "accepted are names that end in .png" in fail(2, "plot", weights, counts, "--output", "plot.pdf")
    assert "there is no file nowhere" in fail(2, "plot", "nowhere", counts, "--output", "other.png")
    assert not Path("other.png").exists()


def test_plot_that_cannot_be_written_leaves_nothing(weights, counts, monkeypatch):
    pytest.importorskip("matplotlib")

    def broken(*_):
        raise OSError(28, "No space left on device")

    before = files_here()
    monkeypatch.setattr(os, "replace", broken)
    assert "No space left" in fail(1, "plot", weights, counts, "--output", "plot.png")
    assert files_here() == before


def test_zipf_fit():
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    ranks = torch.arange(1, 20001).double().numpy()
    counts = 1e7 / ranks**1.25
    counts[:5] = 1e7  # the most frequent types are not on the line, and are left out
    fit = plots.zipf_fit(counts)
    assert fit.slope == pytest.approx(-1.25, abs=1e-6)
    assert fit.first == 10
    assert fit.last == 20000
    # Each decade of ranks counts alike: two slopes that meet at rank 1000 give about their mean over 10 to 100,000.
    ranks = torch.arange(1, 100001).double().numpy()
    bent = 1e12 * ranks**-1.0
    bent[999:] = 1e9 * (ranks[999:] / 1000) ** -2.0
    assert plots.zipf_fit(bent).slope == pytest.approx(-1.5, abs=0.05)
    assert plots.zipf_fit(counts[:2]) is None


def test_shares_by_decade():
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    counts = torch.tensor([1, 9, 10, 99, 1000, 10**15]).double().numpy()
    weights = torch.tensor([1, 1, 2, 0, 0.5, 0]).double().numpy()
    decades, before, after = plots.shares_by_decade(weights, counts)
    assert decades == list(range(16))
    assert before[[0, 1, 2, 3, 15]].tolist() == pytest.approx([10 / 1e15, 109 / 1e15, 0, 1000 / 1e15, 1], rel=1e-6)
    assert after[[0, 1, 2, 3]].tolist() == pytest.approx([10 / 530, 20 / 530, 0, 500 / 530])


@pytest.mark.parametrize(
    ("table", "counts"), [([1.0], [1]), ([0.0, 0.0], [3, 4]), ([1.0, 1e7, 2.0], [5, 0, 4]), ([0.5] * 40, [1] * 30)]
)
def test_plot_of_odd_tables(table, counts):
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    plots.plot("plot.png", torch.tensor(table), torch.tensor(counts))
    assert png_size("plot.png") == (plots.WIDTH, plots.HEIGHT)


def test_plot_refuses():
    plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)
    with pytest.raises(ValueError, match="counts are all 0"):
        plots.plot("plot.png", torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="accepted are at most 2"):
        plots.plot("plot.png", torch.ones(2), torch.ones(3))


# doctor


def test_doctor(monkeypatch):
    monkeypatch.setenv("PDL_KERNELS_VALIDATE", "1")
    output = run("doctor")
    for expected in (torch.__version__, "Device cpu", "bfloat16", "eager", "TRITON_INTERPRET", "on every device"):
        assert expected in output
    found = json.loads(run("doctor", "--json", "-"))
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert {dtype: choice["auto"] for dtype, choice in cpu["backends"].items()} == dict.fromkeys(
        ("float16", "bfloat16", "float32", "float64"), "eager"
    )
    assert found["settings"][0]["value"] == "1"


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(None, "where a recorded run has shown them right"), ("1", "wherever Triton compiles them"),
     ("0", "no row is held by more than one"), ("yes", "an error: accepted are 0, 1, or not set")],
)  # fmt: skip
def test_doctor_shows_the_setting_of_clusters(monkeypatch, value, meaning):
    if value is None:
        monkeypatch.delenv("PDL_KERNELS_CLUSTERS", raising=False)
    else:
        monkeypatch.setenv("PDL_KERNELS_CLUSTERS", value)
    found = {setting["variable"]: setting for setting in json.loads(run("doctor", "--json", "-"))["settings"]}
    assert found["PDL_KERNELS_CLUSTERS"]["value"] == value
    assert meaning in found["PDL_KERNELS_CLUSTERS"]["meaning"]


def test_doctor_says_what_is_missing(monkeypatch):
    from importlib import metadata

    version = metadata.version

    def without_datasets(package):
        if package == "datasets":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_datasets)
    assert json.loads(run("doctor", "--json", "-"))["versions"]["datasets"] == "not installed"


@pytest.mark.parametrize("triton", [None, "Triton cannot be imported (gone)"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:pdl_kernels runs its slower")
def test_explanations_agree_with_the_choice(monkeypatch, triton, device, dtype):
    monkeypatch.setattr(backends, "triton_import_problem", lambda: triton)
    chosen, why = backends.explain_auto(torch.device(device), dtype)
    assert chosen == backends.choose_backend("auto", torch.device(device), dtype)
    if device == "cuda" and dtype != torch.float64:
        assert why == (triton or "the fused kernels run on this device")


def test_doctor_of_a_gpu(monkeypatch):
    properties = type("Properties", (), {"name": "Some GPU", "major": 9, "minor": 0, "total_memory": 2**36})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "triton_import_problem", lambda: None)
    output = run("doctor")
    assert "Device cuda:1: Some GPU, capability 9.0, 64.0 GiB" in output
    assert "the fused kernels run on this device" in output


# The command itself


@pytest.mark.parametrize("command", [None, "count", "weights", "inspect", "plot", "doctor"])
def test_help(command):
    output = run(*([command] if command else []), "--help")
    assert "Usage: " in output
    if command is None:
        for code in ("0 done", "1 the work", "2 an option", "130 interrupted"):
            assert code in output
        for name in ("count", "weights", "inspect", "plot", "doctor"):
            assert name in output
    elif command == "count":
        assert ".jsonl or .json (one JSON object a line), .parquet, .txt" in output


def test_no_command_shows_help_and_a_wrong_one_is_refused():
    assert "Usage: " in invoke().output
    assert "No such command" in fail(2, "cuont")
    assert run("--version").startswith("pdl-kernels ")


def subprocess_run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_as_a_process(tokenizer):
    Path("corpus.txt").write_text("the cat\nthe mat\n")
    command = ["-m", "pdl_kernels.cli", "count", "corpus.txt", "--tokenizer"]
    done = subprocess_run(*command, tokenizer, "--output", "c.safetensors")
    assert done.returncode == 0, done.stderr
    assert "4 targets in 2 sequences" in done.stdout
    done = subprocess_run(*command, "someone/no-such-model", "--output", "d.safetensors")
    assert done.returncode == 2
    *_, line = done.stderr.strip().splitlines()
    assert line.startswith("error: --tokenizer is someone/no-such-model: there is no such file or folder")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from pdl_kernels import cli; cli.main()"
    done = subprocess_run("-c", code)
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} is not installed: pip install 'pdl-kernels[cli]'\n"


def test_import_of_the_package_loads_nothing_of_the_extra():
    names = ("typer", "rich", "matplotlib", "pyarrow", "transformers", "tokenizers")
    done = subprocess_run("-c", f"import sys, pdl_kernels; print([n for n in {names} if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_a_missing_package_of_one_command(counts, weights, monkeypatch):
    monkeypatch.delitem(sys.modules, "pdl_kernels.weights.plots", raising=False)
    monkeypatch.delattr("pdl_kernels.weights.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = fail(2, "plot", weights, counts, "--output", "plot.png")
    assert message == "error: matplotlib is not installed: pip install 'pdl-kernels[cli]'\n"
