"""Runs a module of the benchmarks in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.environment import ROOT


def printed_json(module: str, *arguments: str, **variables: str) -> tuple[Any, str | None]:
    """(what its last line of output says, None), or (None, why there is none)."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, cwd=ROOT)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"{module} ended with {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1]), None
