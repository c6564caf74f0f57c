"""Worker processes that may crash or hang. Whatever they have started ends with them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

REAP_SECONDS = 10.0  # a driver that hangs may hold a process for good


class Workers:
    """Gives orders to processes, one process for each order, and passes their answers on.

    Orders and answers are JSON. An order is all of a process's standard input, and each answer is one line of its
    standard output.
    """

    def __init__(self, python_arguments: tuple[str, ...], silence: float) -> None:
        """A process that gives no answer for `silence` seconds is ended."""
        self.python_arguments = python_arguments
        self.silence = silence
        self.stopped = False
        self._processes: set[subprocess.Popen[str]] = set()

    def answers(self, order: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answers to an order, and last {"died": why} if the process did not end well.

        The process ends with this generator, so leaving the loop over it early is enough to end the process.
        """
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, *self.python_arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip
            self._processes.add(process)
            watch = Watch(self.silence, lambda: kill_group(process))
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # the process ended at once; its exit status says so below
                    process.stdin.write(json.dumps(order))
                    process.stdin.close()
                for line in process.stdout:
                    watch.restart()
                    if line.endswith("\n"):  # the last line of a process that was killed may be a part
                        yield json.loads(line)
                status = process.wait(REAP_SECONDS)
            finally:
                watch.stop()
                kill_group(process)
                self._processes.discard(process)
            if watch.expired:
                yield {"died": f"it did not end within {self.silence:.0f} s"}
            elif status != 0:
                yield {"died": f"the process ended with {_described(status)}: {_last_line(errors)}"[:500]}

    def stop(self) -> None:
        """End all processes."""
        self.stopped = True
        for process in list(self._processes):
            kill_group(process)


def _described(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def kill_group(process: subprocess.Popen[Any], seconds: float = REAP_SECONDS) -> None:
    """End a process that leads a group of its own, and the group: compilers and workers that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


class Watch:
    """Calls `expire` when it has not been restarted for so many seconds."""

    def __init__(self, seconds: float, expire: Callable[[], None]) -> None:
        self.seconds = seconds
        self.expired = False
        self._expire = expire
        self._timer: threading.Timer | None = None
        self.restart()

    def restart(self) -> None:
        self.stop()
        self._timer = threading.Timer(self.seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.expired = True
        self._expire()
