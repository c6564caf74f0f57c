"""Several processes: what is started, what of it is told, and how it ends. A script stands in for the program."""

import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24", reason="benchmarks.quality needs transformers >= 5.24")

from benchmarks.quality import jobs, records
from benchmarks.quality.errors import UserError
from benchmarks.quality.jobs import run_jobs
from benchmarks.quality.matrix import Run

RUNS = [Run("dialogue", "focal", seed) for seed in range(3)]
HEAD = """#!{python} -S
import os, signal, sys, time
place = {place!r}

def first():
    try:
        os.close(os.open(place + "/first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

"""


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """A function that runs two processes of a script, which lies in the test's folder as everything else does."""
    python = sys.executable
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_LOOKS", 0.05)

    def run(script, arguments=()):
        path = tmp_path / "python"
        path.write_text(HEAD.format(python=python, place=str(tmp_path)) + script)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        run_jobs(arguments, 2, tmp_path / "logs", tmp_path / "out", RUNS)

    return run


def logs_in(folder):
    return [path.read_text() for path in sorted(folder.glob("logs/job-*.log"))]


def test_the_program_is_started_with_the_same_arguments_for_one_process(run_script, tmp_path, capfd):
    run_script("print(*sys.argv[1:], os.getcwd())", ["--task", "style", "--jobs", "2"])
    root = Path(__file__).resolve().parents[3]
    assert logs_in(tmp_path) == [f"-m benchmarks.quality --task style --jobs 2 --jobs 1 {root}\n"] * 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert f"2 processes; what each does: {tmp_path}/logs/job-*.log" in shown.err


def test_a_process_that_fails_shows_the_end_of_its_log(run_script, tmp_path):
    script = """
if first():
    for line in range(40):
        print(f"step {line}", end="\\r" if line % 2 else "\\n\\n")
    print("error: the disk is full", file=sys.stderr)
    sys.exit(2)
time.sleep(0.3)
open(place + "/went on", "w").close()
"""
    with pytest.raises(UserError) as caught:
        run_script(script)
    head, *rest = str(caught.value).splitlines()
    assert head.startswith("a process ended with status 2; ")
    assert f"{tmp_path}/logs/job-" in head
    assert head.endswith(".log ends with")
    assert len(rest) == jobs.LINES_OF_A_FAILURE
    assert sorted(rest)[0] == "error: the disk is full"
    assert "step 39" in rest
    assert "step 20" not in rest
    assert (tmp_path / "went on").exists(), "the other process was waited for"


class Process:
    """One that writes a record between the first look at it and the third, with which it has ended."""

    def __init__(self, folder):
        self.folder, self.looks = folder, 0

    def poll(self):
        self.looks += 1
        if self.looks == 2:
            records.write(records.record_path(self.folder, "dialogue", "focal", 2), {})
        return None if self.looks < 3 else 0


def test_records_are_counted_while_processes_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_LOOKS", 0.01)
    records.write(records.record_path(tmp_path, "dialogue", "focal", 1), {})
    jobs.watch([Process(tmp_path)], tmp_path, RUNS)
    told = capsys.readouterr().err
    assert " 1/3 " in told
    assert " 2/3 " in told


SLEEP = "\nopen(f'{place}/ready-{os.getpid()}', 'w').close()\ntime.sleep(20)\n"


@pytest.fixture
def interrupted(monkeypatch, tmp_path):
    """Ctrl-C as soon as both processes are at work; their ids."""
    ids = []

    def watch(processes, folder, runs):
        ids.extend(process.pid for process in processes)
        end = time.monotonic() + 20
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "watch", watch)
    yield ids
    for pid in ids:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_lets_each_process_end_by_itself(run_script, tmp_path, interrupted):
    script = f"""
def stop(number, frame):
    time.sleep(0.1)
    print("kept")
    sys.exit(130)

signal.signal(signal.SIGINT, stop)
{SLEEP}"""
    with pytest.raises(KeyboardInterrupt):
        run_script(script)
    assert logs_in(tmp_path) == ["kept\n"] * 2
    assert [pid for pid in interrupted if is_running(pid)] == []


def test_ctrl_c_ends_a_process_that_does_not_listen(run_script, monkeypatch, interrupted):
    monkeypatch.setattr(jobs, "SECONDS_TO_END", 0.2)
    with pytest.raises(KeyboardInterrupt):
        run_script(f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEP}")
    assert [pid for pid in interrupted if is_running(pid)] == []


def test_a_folder_for_the_logs_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        run_jobs([], 2, tmp_path / "file" / "logs", tmp_path, RUNS)
