"""Several processes: what is started, what of it is told, and how it ends. A script stands in for the program."""

import os
import signal
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


def test_the_program_is_started_with_the_same_arguments_for_one_process(run_script, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths mean the same for the processes
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    run_script("print(*sys.argv[1:], os.getcwd(), os.environ['PYTHONPATH'])", ["--task", "style", "--jobs", "2"])
    root = Path(__file__).resolve().parents[3]
    told = f"-m benchmarks.quality --task style --jobs 2 --jobs 1 {tmp_path} {root}:/elsewhere\n"
    assert logs_in(tmp_path) == [told] * 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert f"2 processes; what each does: {tmp_path}/logs/job-*.log" in shown.err


def test_a_process_that_fails_shows_the_end_of_its_log_at_once(run_script, tmp_path, monkeypatch, capsys):
    script = """
if first():
    for line in range(40):
        print(f"step {line}", end="\\r" if line % 2 else "\\n\\n")
    print("error: the disk is full", file=sys.stderr)
    sys.exit(2)
end = time.monotonic() + 20
while not os.path.exists(place + "/told") and time.monotonic() < end:
    time.sleep(0.01)
open(place + "/went on", "w").close()
"""
    last_words = jobs.last_words

    def told(path):
        assert not (tmp_path / "went on").exists()
        (tmp_path / "told").touch()
        return last_words(path)

    monkeypatch.setattr(jobs, "last_words", told)
    with pytest.raises(UserError) as caught:
        run_script(script)
    assert str(caught.value).startswith(f"1 of 2 processes failed: {tmp_path}/logs/job-")
    assert (tmp_path / "went on").exists(), "the other process was waited for"
    shown = capsys.readouterr().err
    start = shown.index("a process ended with status 2")
    _, name, *rest = shown[start:].splitlines()[: jobs.LINES_OF_A_FAILURE + 2]
    assert name.startswith(f"{tmp_path}/logs/job-")
    assert name.endswith(".log ends with")
    assert sorted(rest)[0] == "error: the disk is full"
    assert "step 39" in rest
    assert "step 20" not in rest


class Process:
    """One that writes a record between the first look at it and the third, with which it has ended."""

    def __init__(self, folder):
        self.folder, self.looks, self.returncode = folder, 0, 0

    def poll(self):
        self.looks += 1
        if self.looks == 2:
            records.write(records.record_path(self.folder, "dialogue", "focal", 2), {})
        return None if self.looks < 3 else 0


def test_records_are_counted_while_processes_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_LOOKS", 0.01)
    records.write(records.record_path(tmp_path, "dialogue", "focal", 1), {})
    jobs.watch({tmp_path / "log": Process(tmp_path)}, tmp_path, RUNS)
    told = capsys.readouterr().err
    assert " 1/3 " in told
    assert " 2/3 " in told


SLEEP = "\nopen(f'{place}/ready-{os.getpid()}', 'w').close()\ntime.sleep(20)\n"


@pytest.fixture
def interrupted(monkeypatch, tmp_path):
    """Ctrl-C as soon as both processes are at work; their ids."""
    ids = []

    def watch(processes, folder, runs):
        ids.extend(process.pid for process in processes.values())
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


def test_ctrl_c_in_a_terminal_reaches_a_process_once(run_script, tmp_path, interrupted):
    """It goes to all that is in the foreground; those that are told of it by the program are not."""
    with pytest.raises(KeyboardInterrupt):
        run_script(SLEEP.replace("time.sleep", "print(os.getpgrp(), os.getpid(), flush=True)\ntime.sleep"))
    for log in logs_in(tmp_path):
        group, process = log.splitlines()[0].split()
        assert group == process != str(os.getpgrp())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_processes_end_when_the_program_is_told_to(run_script, monkeypatch, tmp_path, interrupted, number):
    stand_in = jobs.watch

    def watch(*arguments):
        with pytest.raises(KeyboardInterrupt):
            stand_in(*arguments)
        assert signal.getsignal(number) != signal.SIG_DFL, "it would end the tests"
        os.kill(os.getpid(), number)
        time.sleep(20)

    monkeypatch.setattr(jobs, "watch", watch)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_script(SLEEP)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert [pid for pid in interrupted if is_running(pid)] == []


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with jobs.ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_ends_a_process_that_does_not_listen(run_script, monkeypatch, interrupted):
    monkeypatch.setattr(jobs, "SECONDS_TO_END", 0.2)
    with pytest.raises(KeyboardInterrupt):
        run_script(f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEP}")
    assert [pid for pid in interrupted if is_running(pid)] == []


def test_a_folder_for_the_logs_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        run_jobs([], 2, tmp_path / "file" / "logs", tmp_path, RUNS)
