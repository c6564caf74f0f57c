"""The table of docs/training.md says what tests and measurements that were recorded say."""

import json

import pytest

from benchmarks import trainer_table
from benchmarks.trainer_table import PAGE, RESULTS, ROUTES, main, page_with, passed, table

OUTCOMES = {
    "tests/integrations/test_a.py::test_one[1-logits]": "passed",
    "tests/integrations/test_a.py::test_one[2-logits]": "passed",
    "tests/integrations/test_a.py::test_one[1-linear]": "failed",
}


def test_the_page_has_the_table_of_the_records():
    assert main([]) == 0
    record, memory = (json.loads((RESULTS / name).read_text()) for name in ("trainers.json", "trainer_memory.json"))
    assert table(record, memory) in PAGE.read_text(encoding="utf-8")


def test_every_recorded_test_passed():
    outcomes = json.loads((RESULTS / "trainers.json").read_text())["outcomes"]
    assert set(outcomes.values()) <= {"passed", "skipped"}
    assert sum(outcome == "passed" for outcome in outcomes.values()) > 800


def test_what_a_cell_says():
    assert passed("*::test_one[[]*logits]", OUTCOMES) == "yes"
    assert passed("", OUTCOMES) == "no"


@pytest.mark.parametrize(
    ("pattern", "words"), [("*::test_one*", "linear]: failed"), ("*::test_two*", "no test .*test_two")]
)
def test_what_did_not_pass_is_not_claimed(pattern, words):
    with pytest.raises(ValueError, match=words):
        passed(pattern, OUTCOMES)


def test_a_page_with_another_table_is_noticed(monkeypatch, tmp_path, capsys):
    changed = tmp_path / "training.md"
    changed.write_text(page_with(PAGE.read_text(encoding="utf-8"), "| another |\n"), encoding="utf-8")
    monkeypatch.setattr(trainer_table, "PAGE", changed)
    assert main([]) == 1
    assert "another table than the records" in capsys.readouterr().err
    assert main(["--write"]) == 0
    assert changed.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_every_route_is_explained():
    """The name in the table's one line is in the text below it, or in that of accelerate's page."""
    text = PAGE.read_text(encoding="utf-8").split(trainer_table.END)[1]
    text += PAGE.with_name("training_accelerate.md").read_text(encoding="utf-8")
    for route in ROUTES:
        assert route.line.split("(")[0].split("=")[-1].strip().split(".")[-1] in text, route.line
