"""Running the command line inside the tests' process, and the files that its tests make."""

import json
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the extra cli is not installed")
pytest.importorskip("rich")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from pdl_kernels.cli.commands import app  # noqa: E402

WORDS = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "the": 3, "cat": 4, "sat": 5, "on": 6, "mat": 7}
TEXTS = ["the cat sat on the mat", "the mat", "cat", "the dog sat", "on on on the cat"] * 3


def invoke(*arguments):
    # Wide, so that no message is broken into lines.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def run(*arguments):
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


def fail(code, *arguments):
    """The message of a command that ends with this code, and not with a traceback."""
    done = invoke(*arguments)
    assert done.exit_code == code, (done.exit_code, done.output)
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def write_json(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def write_parquet(name, columns, **options):
    pq.write_table(pa.table(columns), name, **options)
    return name


def files_here():
    return {path.name for path in Path.cwd().iterdir()}
