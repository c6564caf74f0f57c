"""Recorded results: what is refused, how two runs compare, and which goals they meet."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.goals import judge
from benchmarks.inputs import Case

TINY = ("--device", "cpu", "--shapes", "16x100", "--dtypes", "fp32", "--rounds", "1", "--peers", "torch")
CPU_CASE = Case(1024, 32000, "float32")


def synthetic(device="AMD EPYC", device_type="cpu", case=CPU_CASE, **milliseconds):
    """A complete document with one forward + backward of each named contender."""
    environment = {
        "date": "2026-01-01T00:00:00",
        "commit": "0123456789",
        "device": device,
        "device_type": device_type,
        "cpu": "AMD EPYC",
        "threads": 2,
        "packages": {},
    }
    document = results.new_document(environment, {"quick": False}, {})
    document.update(complete=True, bandwidth={"copy": 4e12, "read": 4.4e12})
    for name, time in (milliseconds or {"torch": 200.0, "pdl": 100.0}).items():
        document["records"].append(
            {
                "operation": "forward-backward",
                "rows": case.rows,
                "vocab_size": case.vocab_size,
                "dtype": case.dtype,
                "contender": name.replace("_", " "),
                "status": "timed",
                "problem": None,
                "seconds": [time / 1e3 * factor for factor in (0.99, 1.0, 1.01)],
                "floor_bytes": 2 * case.logits_bytes,
                "peak_extra_bytes": int(1e6 * time),
            }
        )
    return document


def judged(*documents):
    entries = [(results.Path(f"{number}.json"), document) for number, document in enumerate(documents)]
    return {judgement.goal.text: judgement for judgement in judge(entries)}


def test_goals_of_a_cpu():
    found = judged(synthetic(torch=200.0, pdl=125.0, pdl_in_place=50.0))
    missed = found["CPU, float32: times as fast as torch"]
    assert missed.status == "missed"
    assert "by 20%: 1.60x at 1024 x 32000 float32 (0.json), goal 2.00x; 1 of 1 cases miss it" in missed.detail
    assert found["CPU, in place: times as fast as torch"].status == "met"
    assert found["CPU: extra memory, of torch's"].status == "missed"
    assert found["CPU, in place: extra memory, of torch's"].status == "met"
    assert found["CPU, 16 bits: times as fast as torch"].status == "not measured"
    assert found["H200, bf16: times as fast as Liger"].status == "not measured"


def test_goals_of_a_gpu():
    case = Case(8192, 128256, "bfloat16")
    ideal = 2 * case.logits_bytes / 4e12 * 1e3  # ms at the copy bandwidth
    times = {"pdl": ideal / 0.95, "liger": 2.5 * ideal, "quack": 1.02 * ideal}
    found = judged(synthetic("NVIDIA H200", "cuda", case, **times))
    assert found["H200, bf16: forward + backward, of the 4-byte floor"].status == "met"
    assert found["H200, bf16: times as fast as Liger"].status == "met"
    assert found["H200, bf16: not behind QuACK, within noise"].status == "missed"
    assert found["H200, bf16: times as fast as torch.compile"].status == "not measured"
    assert found["H200, bf16: forward, of the read bandwidth"].status == "not measured"
    assert found["CPU, float32: times as fast as torch"].status == "not measured"
    other = judged(synthetic("NVIDIA A100", "cuda", case, **times))
    assert all(judgement.status == "not measured" for judgement in other.values())


def test_goals_of_the_host():
    document = synthetic()
    document["host"] = {"microseconds": {"median": 240.0}, "launches_forward": 3, "launches_backward": 1}
    found = judged(document)
    assert found["Host: microseconds of Python per forward + backward"].status == "missed"
    assert "by 50%" in found["Host: microseconds of Python per forward + backward"].detail
    assert found["Host: launches forward"].status == "met"


def test_goals_take_the_newest_complete_run():
    good, bad = synthetic(torch=200.0, pdl=90.0), synthetic(torch=200.0, pdl=180.0)
    goal = "CPU, float32: times as fast as torch"
    assert judged(good, bad)[goal].status == "missed"
    assert judged(bad, good)[goal].status == "met"
    bad["complete"] = False
    assert judged(good, bad)[goal].status == "met"
    bad.update(complete=True, options={"quick": True})
    assert judged(good, bad)[goal].status == "met"


def test_goals_from_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.RECORDED", tmp_path)  # not what the project has recorded so far
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "mine.json").write_text(json.dumps(synthetic(torch=200.0, pdl=50.0)))
    (tmp_path / "other.json").write_text('{"results": []}')
    assert main(["--goals", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mine.json" in shown
    assert "not measured" in shown
    (tmp_path / "cpu" / "mine.json").write_text(json.dumps({**synthetic(), "version": 0}))
    assert main(["--goals", "--out", str(tmp_path)]) == 2


def test_compare():
    old, new = synthetic(torch=200.0, pdl=100.0), synthetic(torch=201.0, pdl=150.0)
    changes = {change.key.contender: change for change in compare(old, new)}
    assert changes["pdl"].ratio == pytest.approx(1.5)
    assert changes["pdl"].verdict == "slower"
    assert changes["torch"].verdict == "within noise"
    noisy = copy.deepcopy(new)
    noisy["records"][1]["again"] = [0.3, 0.3, 0.3]  # the second instance took twice as long
    changes = {change.key.contender: change for change in compare(old, noisy)}
    assert changes["pdl"].noise == pytest.approx(1.0)
    assert changes["pdl"].verdict == "within noise"


def test_compare_two_files(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    paths[0].write_text(json.dumps(synthetic()))
    paths[1].write_text(json.dumps(synthetic("another machine", torch=200.0, pdl=50.0)))
    assert main(["--compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "0.50" in shown
    assert "faster" in shown
    assert "the device differs" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(version=99), "has version 99 of the results' format"),
        (lambda document: document.pop("records"), "is damaged: records missing"),
        (lambda document: document["records"][0].pop("seconds"), "is damaged: seconds missing"),
        (lambda document: document.update(schema="other"), "is not a results file of this suite"),
    ],
)
def test_results_of_another_kind_are_refused(run, tmp_path, capsys, change, message):
    document = synthetic()
    change(document)
    path = tmp_path / "elsewhere" / "old.json"
    path.parent.mkdir()
    path.write_text(json.dumps(document))
    assert run(*TINY, "--compare", str(path))[0] == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*.json")) == [path]


def test_a_results_file_cut_short_is_refused(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(synthetic())[:100])
    assert main([*TINY, "--compare", str(path), "--out", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The linear loss


def linear_record(contender, case, seconds, extra=None, operation="forward-backward"):
    return {
        "operation": operation,
        **case._asdict(),
        "contender": contender,
        "status": "timed",
        "seconds": [seconds],
        "floor_bytes": 0,
        "peak_extra_bytes": extra,
    }


def linear_document(device_type, device, records):
    environment = {"device_type": device_type, "device": device, "cpu": "a CPU", "date": "2026-01-01"}
    return {
        "environment": environment,
        "options": {},
        "bandwidth": {},
        "host": None,
        "records": records,
        "complete": True,
    }


def statuses(judged):
    return {
        judgement.goal.text: (judgement.status, judgement.detail)
        for judgement in judged
        if "linear" in judgement.goal.text
    }


def test_linear_goals_of_a_cpu():
    case = Case(2048, 32000, "float32", hidden_size=512, ignored=0.0)
    records = [
        linear_record("pdl linear", case, 0.9, 10),
        linear_record("torch linear", case, 1.0, 100),
        linear_record("pdl linear", case._replace(ignored=0.5), 0.7, 10),
    ]
    found = statuses(judge([(Path("a.json"), linear_document("cpu", "a CPU", records))]))
    assert found["CPU, linear: time, of torch's"] == (
        "met",
        "at worst 0.90 at 2048 x 512 x 32000 float32, 0% ignored (a.json)",
    )
    assert found["CPU, linear: extra memory, of torch's"][0] == "met"
    assert found["CPU, linear, half the rows ignored: time, of all rows'"][0] == "missed"
    assert found["H200, linear, the same: extra GiB"][0] == "not measured"


def test_linear_goals_of_a_gpu():
    case = Case(8192, 128256, "bfloat16", hidden_size=4096, ignored=0.0)
    records = [
        linear_record("pdl linear", case, 0.033, 2 << 30),
        linear_record("pdl linear", case._replace(rows=4096), 1.0, 2 << 30),
        linear_record("pdl linear", case._replace(ignored=0.5), 0.0179, 1),
    ]
    found = statuses(judge([(Path("a.json"), linear_document("cuda", "NVIDIA H200", records))]))
    assert found["H200, linear, 8192 x 4096 x 128256 bf16: ms"][0] == "met"
    assert found["H200, linear, the same: extra GiB"][0] == "missed"
    assert found["H200, linear, half the tokens ignored: ms"][0] == "met"
