"""Several processes that share the runs, and one line that says how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality.cache import explained
from benchmarks.quality.errors import UserError
from benchmarks.quality.matrix import Run, is_done

ROOT = Path(__file__).resolve().parents[2]
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_END = 60.0  # for a process that was interrupted
LINES_OF_A_FAILURE = 15


def run_jobs(arguments: Sequence[str], jobs: int, logs: Path, folder: Path, runs: Sequence[Run]) -> None:
    """Start this program `jobs` times with `arguments`, and wait. What one process is at, the others leave alone.

    The processes have a session of their own, so that a terminal's Ctrl-C reaches each once, and from here.
    """
    with explained(logs):
        logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.quality", *arguments, "--jobs", "1"]
    paths = [logs / f"job-{number}.log" for number in range(jobs)]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    processes = {}
    print(f"{jobs} processes; what each does: {logs}/job-*.log", file=sys.stderr)
    with ended_by_signals():
        try:
            for path in paths:
                with path.open("w") as log:
                    processes[path] = subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"PYTHONPATH": places},
                        start_new_session=True,
                    )
            watch(processes, folder, runs)
        except KeyboardInterrupt:
            end(processes.values())
            raise
    failed = [path for path, process in processes.items() if process.returncode != 0]
    if failed:
        raise UserError(f"{len(failed)} of {jobs} processes failed: {', '.join(map(str, failed))}")


def watch(processes: Mapping[Path, subprocess.Popen[bytes]], folder: Path, runs: Sequence[Run]) -> None:
    """Count the records until every process has ended; what one that fails said last is told at once."""
    done = sum(is_done(folder, run) for run in runs)
    running = dict(processes)
    with tqdm(total=len(runs), initial=done, desc="models", unit="model", dynamic_ncols=True) as progress:
        while running:
            for path, process in list(running.items()):
                if process.poll() is not None:
                    del running[path]
                    if process.returncode != 0:
                        progress.write(
                            f"a process ended with status {process.returncode}\n{last_words(path)}", sys.stderr
                        )
            progress.n = sum(is_done(folder, run) for run in runs)
            progress.refresh()
            if running:
                time.sleep(SECONDS_BETWEEN_LOOKS)


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    told = [line for line in lines if line.strip()][-LINES_OF_A_FAILURE:]
    return "\n".join([f"{log} ends with", *told])


def end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """As by Ctrl-C; by force what does not listen."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A terminal that closes, or kill, is Ctrl-C: the processes would go on otherwise. What is ignored stays so."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
