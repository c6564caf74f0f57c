"""The application: help, exit codes, errors, processes, and what is missing where the extra is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import fail, invoke, run

from pdl_kernels.weights import files

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [None, "count", "weights", "inspect", "plot", "doctor"])
def test_help(command):
    output = run(*([command] if command else []), "--help")
    assert "Usage: " in output
    if command is None:
        for code in ("0 done", "1 the work", "2 an option", "130 interrupted"):
            assert code in output
        for name in ("count", "weights", "inspect", "plot", "doctor"):
            assert name in output
    elif command == "count":
        assert ".jsonl or .json (one JSON object a line), .json with one array of objects, .txt" in output


def test_no_command_shows_help_and_a_wrong_one_is_refused():
    assert "Usage: " in invoke().output
    assert "No such command" in fail(2, "cuont")
    assert run("--version").startswith("pdl-kernels ")


def test_a_full_disk_is_exit_code_1(counts, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace_file", full)
    message = fail(1, "weights", counts, "--output", "weights.safetensors")
    assert message == "error: [Errno 28] No space left on device\n"


def test_a_bug_is_shown_on_demand(counts):
    done = invoke("--traceback", "weights", "nowhere.safetensors", "--output", "w.safetensors")
    assert isinstance(done.exception, FileNotFoundError)


# In processes of its own


def subprocess_run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_as_a_process(tokenizer):
    Path("corpus.txt").write_text("the cat\nthe mat\n")
    command = ["-m", "pdl_kernels.cli", "count", "corpus.txt", "--tokenizer"]
    done = subprocess_run(*command, tokenizer, "--output", "c.safetensors")
    assert done.returncode == 0, done.stderr
    assert "4 targets in 2 sequences" in done.stdout
    done = subprocess_run(*command, "someone/no-such-model", "--output", "d.safetensors")
    assert done.returncode == 2
    *_, line = done.stderr.strip().splitlines()
    assert line.startswith("error: --tokenizer is someone/no-such-model: there is no such file or folder")
    assert "Traceback" not in done.stderr


FRESH = """
import os, sys
import pdl_kernels
extra = ("typer", "rich", "matplotlib", "pyarrow", "transformers", "tokenizers")
print([name for name in extra if name in sys.modules])
from pdl_kernels import cli
for missing in ("typer", "rich"):
    sys.stdout.flush()
    if os.fork() == 0:
        sys.modules[missing] = None
        cli.main()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_without_the_extra():
    """Importing the package loads nothing of the extra, and the command says what is missing."""
    done = subprocess_run("-W", "ignore", "-c", FRESH)
    assert done.stdout.splitlines() == ["[]", "2", "2"], done.stderr
    assert done.stderr.splitlines() == [
        "error: typer is not installed: pip install 'pdl-kernels[cli]'",
        "error: rich is not installed: pip install 'pdl-kernels[cli]'",
    ]
