"""The check of the intervals, on made-up records; and what docs/evidence.md says of the recorded one."""

import json

import pytest

for package in ("rouge_score", "sacrebleu", "transformers"):
    pytest.importorskip(package)

from helpers.quality_records import write_records  # noqa: E402

from benchmarks.quality import check_intervals  # noqa: E402
from benchmarks.quality.report.page import PAGE  # noqa: E402


def test_it_holds_both_methods_against_the_truth(tmp_path, monkeypatch):
    write_records(tmp_path, tasks=("dialogue",), arms=("cross-entropy", "pdl-0.25", "pdl-0.4"))
    for name, value in (("HALVES", 40), ("CLAIMS", 2), ("RESAMPLES", 40), ("REPETITIONS", 100)):
        monkeypatch.setattr(check_intervals, name, value)
    check_intervals.main(("dialogue",), tmp_path, tmp_path / "check.json")
    found = json.loads((tmp_path / "check.json").read_text())
    differences = found["differences in distinct pairs"]
    assert [one["mode"] for one in differences] == ["greedy", "greedy", "sampled"]
    assert all(0.5 < one["jackknife"] < 2 and one["bootstrap"] > 0 for one in differences)
    contained = found["share of intervals that contain the truth"]
    assert contained["everything depends on three seeds"] < min(0.9, contained["the same with 500 prompts"])


def test_the_page_tells_what_was_recorded():
    differences = json.loads(check_intervals.RESULT.read_text())["differences in distinct pairs"]
    bootstrap = [one["bootstrap"] for one in differences if one["mode"] == "greedy"]
    jackknife = [one["jackknife"] for one in differences]
    page = " ".join(PAGE.read_text().split())
    assert f"claimed {min(bootstrap)} to {max(bootstrap)} of the true deviation of greedy texts" in page
    assert f"which claimed {min(jackknife)} to {max(jackknife)} of it" in page
