"""Kernels compiled ahead of a GPU: the cache holds what a launch looks for, also after it was pruned and packed."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


def run(cache, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def load_script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    interpret = os.environ.get("TRITON_INTERPRET")
    specification.loader.exec_module(module)
    if interpret is not None:  # benchmarks.compile_ahead turns the interpreter off, for its own process
        os.environ["TRITON_INTERPRET"] = interpret
    return module


@pytest.mark.rehearsal
@pytest.mark.timeout(600)
def test_a_second_process_finds_every_entry(tmp_path):
    cache, report = tmp_path / "cache", tmp_path / "ahead.json"
    ahead = ["-m", "benchmarks.compile_ahead", "--cache", cache, "--parts", "doctor", "--vocabularies", "1000"]
    run(cache, *ahead, "--processes", 2, "--json", report)
    first = json.loads(report.read_text())
    assert first["compilations"] > 40
    assert first["not compilable"] == 0
    assert len(first["records"]) == 51

    # The ordinary launch path, other tensors, another process. A dtype that was not compiled would be noticed: below.
    hits, misses = map(int, run(cache, "tests/helpers/launch_from_cache.py", 1000, "bfloat16").split())
    assert (misses, hits > 15) == (0, True)

    # Pruned to what a launch reads, everything is still found.
    packing = load_script("compile_for_gpu")
    assert packing.prune(cache) > 40
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".cubin", ".json"}
    hits, misses = map(int, run(cache, "tests/helpers/launch_from_cache.py", 1000, "float32").split())
    assert (misses, hits > 15) == (0, True)

    packing.pack(cache, tmp_path / "compiled.tar.xz")
    assert (tmp_path / "compiled.tar.xz").stat().st_size < 5e6
    with tarfile.open(tmp_path / "compiled.tar.xz") as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {"cache"}

    # What was not compiled is compiled at the launch, and counted as that: the check above can fail.
    _, misses = map(int, run(cache, "tests/helpers/launch_from_cache.py", 4500, "bfloat16", 1).split())
    assert misses > 0


def test_an_existing_cache_is_not_packed(tmp_path, monkeypatch, capsys):
    packing = load_script("compile_for_gpu")
    monkeypatch.setattr(packing.compile_ahead, "default_cache", lambda: tmp_path)
    with pytest.raises(SystemExit) as stopped:
        packing.main([str(tmp_path / "folder")])
    assert stopped.value.code == 2
    assert "move it away first" in capsys.readouterr().err
