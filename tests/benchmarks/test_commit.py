"""The commit that a result was measured at."""

import pytest
import torch

from benchmarks import environment

CPU = torch.device("cpu")
GIT = """#!/bin/sh
case "$*" in
*rev-parse*) {answer} ;;
*status*) {changes} ;;
esac
"""


@pytest.fixture
def git(monkeypatch, tmp_path):
    """A function that makes a program git which says this, the only program on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PDL_KERNELS_COMMIT", raising=False)

    def make(answer, changes="true"):
        (tmp_path / "git").write_text(GIT.format(answer=answer, changes=changes))
        (tmp_path / "git").chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("changes", "commit"), [("true", "0123456789"), ("echo ' M pdl_kernels/losses/modules.py'", "0123456789-dirty")]
)
def test_the_commit_is_gits_answer(git, changes, commit):
    git("echo 0123456789", changes)
    assert environment.commit() == commit
    assert environment.describe(CPU, [])["commit"] == commit


def test_the_commit_that_was_told_counts_before_gits_answer(git, monkeypatch):
    git("echo 0123456789")
    monkeypatch.setenv("PDL_KERNELS_COMMIT", "abcdef0123-dirty")
    assert environment.commit() == "abcdef0123-dirty"
    monkeypatch.setenv("PDL_KERNELS_COMMIT", "")
    assert environment.commit() == "0123456789"


@pytest.mark.usefixtures("git")
def test_the_commit_is_unknown_without_git():
    assert environment.commit() == "unknown"


def test_the_commit_is_unknown_where_git_finds_no_checkout(git):
    git("exit 128")
    assert environment.commit() == "unknown"
