"""Processes that may hang or break: ended with everything that they have started, after so much silence."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

REAP_SECONDS = 10.0  # a driver that hangs may hold a process for good


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
