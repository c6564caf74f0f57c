"""`torchrun -m benchmarks.scaling.measure`: small, with gloo."""

import json
from pathlib import Path

from helpers.ranks import run_ranks

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling" / "measure.py"


def test_two_processes(tmp_path):
    record = tmp_path / "measured.json"
    sizes = ["--tokens", 64, "--vocab", 512, "--hidden-size", 16, "--rounds", 2]
    first, second = run_ranks(2, PROGRAM, *sizes, "--json", record)
    found = json.loads(record.read_text())
    assert found["ranks"] == 2
    assert len(found["ways"]) == 7
    for name, way in found["ways"].items():
        assert len(way["seconds"]) == 2
        assert min(way["seconds"]) > 0
        assert way["extra_bytes"] is None, "only a GPU says"
        assert name in first
        assert name not in second
