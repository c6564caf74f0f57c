"""pdl-kernels doctor, without and with --check."""

import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import fail, run

from pdl_kernels import backends
from pdl_kernels.doctor import cases
from pdl_kernels.doctor import check as checking

ROOT = Path(__file__).resolve().parents[2]


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


# --check

# The command's own worker, with tensors so small that timing them takes no time.
SMALL_WORKER = """
from pdl_kernels.doctor import speed, worker
speed.LOGITS_BYTES["cpu"] = speed.COPY_BYTES["cpu"] = 1 << 20
worker.main()
"""


def test_the_command_checks_times_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(checking, "WORKER", ("-c", SMALL_WORKER))
    path = tmp_path / "check.json"
    output = run("doctor", "--check", "--device", "cpu", "--vocabulary", "200", "--json", path)
    assert "51 of 51 cases right" in output
    assert "note: this is the eager backend; the Triton kernels run on a GPU" in output
    document = json.loads(path.read_text())
    assert document["complete"]
    assert checking.is_right(document)
    assert document["copy_bytes_per_second"] > 0
    assert {record["dtype"] for record in document["speed"]} == set(cases.DTYPES)
    assert all(record["seconds"] > 0 and record["torch_seconds"] > 0 for record in document["speed"])
    assert document["installation"]["versions"]["torch"].startswith(torch.__version__)
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_what_was_not_run_is_shown(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    output = fail(1, "doctor", "--check", "--device", "cpu", "--vocabulary", "200", "--seconds", "0")
    assert "not run: 8 x 200 bfloat16, plain: the time was over" in output
    assert "note: 3 of 3 shapes were not timed: the time was over (--seconds)" in output
    assert "0 of 51 cases right" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--device", "tpu"], "--device is tpu; accepted here are cpu"),
        (["--check", "--device", "cuda:99"], "--device is cuda:99; accepted here are cpu"),
        (["--check", "--vocabulary", "1"], "--vocabulary is 1; accepted are sizes from 2"),
        (["--device", "cpu"], "--device and --vocabulary are for --check"),
        (["--check", "--json", "nowhere/check.json"], "there is no folder nowhere"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    assert message in fail(2, "doctor", *arguments)
