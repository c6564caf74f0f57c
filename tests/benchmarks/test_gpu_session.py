"""scripts/gpu_session.sh: rehearsed whole, so that no typo is first met on a GPU; and stages that break."""

import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from helpers import inherited

from benchmarks.gpu_session import session as sessions
from benchmarks.gpu_session.session import Session
from benchmarks.gpu_session.stages import LIMIT, ORDINARY, STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_session.sh"


def start(*arguments, **options):
    return subprocess.Popen(
        [str(SCRIPT), *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=inherited(PYTHON=sys.executable), **options,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate()
    return process.returncode, output


def test_the_stages_fit_one_call():
    status, output = finish(start("--list"))
    assert status == 0
    assert sum(stage.seconds for stage in ORDINARY) <= LIMIT == 540
    assert all(stage.seconds <= 300 for stage in STAGES)
    for stage in STAGES:
        assert f"{stage.seconds} s  {stage.answers}" in output


@pytest.mark.rehearsal
@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_stage(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("xdist")
    kit = tmp_path / "kit"
    kit.mkdir()
    status, output = finish(start("--rehearse", tmp_path / "out", kit))
    found = json.loads((tmp_path / "out" / "session.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == [stage.name for stage in ORDINARY]
    assert {stage["name"]: stage["problem"] for stage in found["stages"] if stage["status"] != "passed"} == {}, output
    assert status == 0, output
    assert sum(stage["seconds"] for stage in found["stages"]) < 600
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "results.tar.gz", "session.json", "session.log",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        names = archive.getnames()
    assert {str(Path(name).parent) for name in names} == {"benchmarks/results/rehearsal"}
    assert {"doctor.json", "doctor-kit.json", "sweep-kit.json", "README.md", "session.json"} <= {
        Path(name).name for name in names
    }
    assert sum(name.endswith(".json") for name in names) >= 7
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Every stage about correctness passed" in text
    assert "51 of 51 cases right" in text
    assert "loss on linear" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT is missing"),
        (["{tmp}/out", "{tmp}/nowhere"], "accepted is a folder"),
        (["{tmp}/file"], "a file; accepted is a folder"),
        (["{tmp}/used"], "holds an earlier session"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "session.json").write_text("{}")
    status, output = finish(start(*(argument.format(tmp=tmp_path) for argument in arguments)))
    assert status == 2
    assert message in output


# ---------------------------------------------------------------------------------------------------------------------
# Stages that break


def stage(name, code, seconds=30, **options):
    """A stage that runs Python code, with facts.json in the place of prepare's."""
    return Stage(name, seconds, f"what {name} says", f'{{python}} -c "{code}"', "{python} -c pass", **options)


PREPARE = stage("prepare", "open('{work}/facts.json', 'w').write('[]'.replace('[]', chr(123) + chr(125)))")


def run_stages(tmp_path, *stages, **options):
    said = []
    tmp_path.mkdir(exist_ok=True)
    session = Session(tmp_path, None, stages, rehearsal=False, seconds=options.pop("seconds", 60), say=said.append)
    session.run()
    return session, {record["name"]: (record["status"], record["problem"]) for record in session.records}, said


def test_after_a_stage_that_fails_hangs_or_crashes_the_others_go_on(tmp_path):
    session, found, said = run_stages(
        tmp_path,
        PREPARE,
        stage("fails", "print('a reason'); raise SystemExit(3)"),
        stage("hangs", "import time; time.sleep(100)", seconds=1),
        stage("crashes", "import os; os.kill(os.getpid(), 11)"),
        stage("writes", "open('{results}/found.json', 'w').write('1')", correctness=True),
        stage("needs", "pass", tool="no-such-tool", correctness=True),
        stage("kit", "pass", kit=True),
    )
    assert found == {
        "prepare": ("passed", None),
        "fails": ("failed", "exit status 3"),
        "hangs": ("failed", "it did not end within 1 s"),
        "crashes": ("failed", "ended by SIGSEGV"),
        "writes": ("passed", None),
        "needs": ("skipped", "no-such-tool is not on the PATH"),
        "kit": ("skipped", "no offline kit with another Triton was given"),
    }
    assert session.passed, "of the stages about correctness all that could run passed"
    assert "    | a reason" in said
    assert "a reason" in (tmp_path / "session.log").read_text()
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert "benchmarks/results/unknown/found.json" in archive.getnames()


def test_a_failed_stage_about_correctness_decides(tmp_path):
    session, _, _ = run_stages(tmp_path, PREPARE, stage("wrong", "raise SystemExit(1)", correctness=True))
    assert not session.passed
    assert "Not every stage about correctness passed" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("second", "status"), [("pass", "passed again"), ("raise SystemExit(1)", "failed")])
def test_what_failed_runs_again(tmp_path, second, status):
    again = f'{{python}} -c "{second}"'
    session, found, _ = run_stages(tmp_path, PREPARE, stage("suite", "exit(1)", again=again, correctness=True))
    assert found["suite"][0] == status
    assert session.passed == (status == "passed again")


def test_a_hanging_stage_takes_its_children_along(tmp_path):
    sleeps = "'import time; time.sleep(99)  # {work}'"
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeps}])"
    session, found, _ = run_stages(tmp_path, PREPARE, stage("hangs", f"{child}; time.sleep(99)", seconds=2))
    assert found["hangs"][0] == "failed"
    left = subprocess.run(["pgrep", "-f", f"# {session._work}"], capture_output=True, text=True)
    assert left.stdout == ""


@pytest.fixture
def hears_interruptions():
    """As the program makes sure: a shell's background job ignores SIGINT, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stage_whose_time_is_over_may_say_what_it_found(tmp_path, hears_interruptions):
    speaks = """
import time
try:
    time.sleep(99)
except KeyboardInterrupt:
    open('{results}/found.json', 'w').write('1')
    print('last words')
"""
    # Interrupted 3 s before: on a busy machine Python takes long to start.
    session, found, said = run_stages(tmp_path, PREPARE, stage("speaks", speaks, seconds=12))
    assert found["speaks"] == ("failed", "it did not end within 12 s")
    assert session.records[1]["seconds"] < 12, "it ended by itself"
    assert "    | last words" in said
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert "benchmarks/results/unknown/found.json" in archive.getnames()


def test_a_stage_that_does_not_react_to_its_interruption_is_killed(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)  # {work}"
    session, found, _ = run_stages(tmp_path, PREPARE, stage("deaf", deaf, seconds=6), stage("next", "pass"))
    assert found["deaf"] == ("failed", "it did not end within 6 s")
    assert 6 <= session.records[1]["seconds"] < 6 + sessions.LEAST_SECONDS
    left = subprocess.run(["pgrep", "-f", f"# {session._work}"], capture_output=True, text=True)
    assert left.stdout == ""
    assert found["next"] == ("passed", None)


def test_without_a_gpu_nothing_runs(tmp_path):
    facts = (
        "import json; json.dump(dict(problem='torch sees no GPU'), open('{work}/facts.json', 'w')); raise SystemExit(1)"
    )
    session, found, _ = run_stages(tmp_path, stage("prepare", facts, correctness=True), stage("next", "pass"))
    assert found["next"] == ("not run", "torch sees no GPU")
    assert not session.passed


def test_when_the_time_is_over_the_rest_is_not_run(tmp_path):
    slow = stage("slow", "import time; time.sleep(3)")
    _, found, _ = run_stages(tmp_path, PREPARE, slow, stage("next", "pass"), seconds=sessions.LEAST_SECONDS + 2)
    assert found["slow"] == ("passed", None)
    assert found["next"] == ("not run", "the time of the session was over")


def test_a_full_disk_is_said_and_survived(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions, "replace_file", full)
    _, found, said = run_stages(tmp_path, PREPARE, stage("next", "pass"))
    assert found["next"] == ("passed", None)
    assert any("results.tar.gz cannot be written (No space left on device); going on" in line for line in said)


def test_ctrl_c_keeps_what_was_found(tmp_path):
    process = start("--rehearse", tmp_path / "out", "--only", "doctor", "sanitizer", start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "session.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    assert status == 130, output
    found = {
        one["name"]: one["status"] for one in json.loads((tmp_path / "out" / "session.json").read_text())["stages"]
    }
    assert found == {"prepare": "passed", "doctor": "failed", "sanitizer": "not run"}
