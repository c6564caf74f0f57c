"""Several processes that share the runs, and one line that says how far they are."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
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
    """Start this program `jobs` times with `arguments`, and wait. What one process is at, the others leave alone."""
    with explained(logs):
        logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.quality", *arguments, "--jobs", "1"]
    paths = [logs / f"job-{number}.log" for number in range(jobs)]
    processes = []
    for path in paths:
        with path.open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    print(f"{jobs} processes; what each does: {logs}/job-*.log", file=sys.stderr)
    try:
        watch(processes, folder, runs)
    except KeyboardInterrupt:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise
    for path, process in zip(paths, processes, strict=True):
        if process.returncode != 0:
            lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
            told = [line for line in lines if line.strip()][-LINES_OF_A_FAILURE:]
            raise UserError(f"a process ended with status {process.returncode}; {path} ends with\n" + "\n".join(told))


def watch(processes: Sequence[subprocess.Popen[bytes]], folder: Path, runs: Sequence[Run]) -> None:
    """Count the records until every process has ended."""
    done = sum(is_done(folder, run) for run in runs)
    with tqdm(total=len(runs), initial=done, desc="models", unit="model", dynamic_ncols=True) as progress:
        while any(process.poll() is None for process in processes):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            progress.n = sum(is_done(folder, run) for run in runs)
            progress.refresh()
