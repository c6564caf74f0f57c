"""Proves a compiled kernel free of races, or finds one, with sentryward, a static verifier of PTX.

For one launch the verifier follows every thread of every block, clusters included, and looks for two that touch one
address, one of them at least writing, without a barrier that orders them. It also shows that no barrier waits for ever.
What it cannot know it is told here, in the PTX; every edit stays on its instruction's line:

1. The row's target is a given column: the one 64-bit load from global memory is followed by its value.
2. All lanes of a warp store one value to one word of shared memory in Triton's reductions. Lane 0 alone stores it here.
3. In place, the gradient is the logits' tensor.
4. A block's shared memory ends with the block: before it returns, and once all its threads are there, one of them
   writes all of it. What another block of the cluster could still read is then a race.

A branch that depends on what a tensor holds is taken alike by all threads, both ways in turn: see `verdicts`.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sentryward import verify

RACE_FREE, RACE = "race_free", "potential_race"
SECONDS = 120  # for one path, at most
BRANCH = re.compile(r"@!?%p\d+ bra")
EMPTY_PTX = ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry empty()\n{\nret;\n}\n"

Branches = tuple[tuple[int, bool], ...]  # (line of the PTX, whether the branch there is taken)


class Call(NamedTuple):
    """A call of the loss with its gradient, and the one of its kernels to look at."""

    kernel: str
    vocab_size: int
    blocks: int = 0  # that hold a row; 0 leaves it to the planner, which has few rows read in slices
    rows: int = 2
    dtype: str = "bfloat16"
    architecture: str = "sm_90"
    edits: tuple[tuple[str, str], ...] = ()  # passages of the kernel's source, and what takes their place


class Kernel(NamedTuple):
    """A compiled kernel and its launch."""

    entry: str
    ptx: str
    launch: dict[str, Any]  # in the verifier's words
    arguments: list[dict[str, Any]]  # likewise: numbers and null pointers


class Verdict(NamedTuple):
    """What the verifier says of one path through a kernel."""

    result: str  # RACE_FREE, RACE, or why there is no answer
    evidence: str
    branches: Branches


def problem() -> str | None:
    """Why the verifier cannot run on this machine, or None."""
    empty = Kernel("empty", EMPTY_PTX, {"grid_dim": [1, 1, 1], "block_dim": [32, 1, 1]}, [])
    report = _report(EMPTY_PTX, empty, ())
    return None if report["result"] == RACE_FREE else f"sentryward does not run here: {report['diagnostics']}"


def verdicts(
    kernel: Kernel, *, target: int | None, in_place: bool = True, every_lane_stores: bool = False
) -> Iterator[Verdict]:
    """One of each path; first that on which no such branch is taken, which reads the row.

    Args:
        target: the column that is the target of every row; None: the kernel loads no target.
        every_lane_stores: leave out the second edit.
    """
    ptx = kernel.ptx if target is None else known_target(kernel.ptx, target)
    if not every_lane_stores:
        ptx = one_lane_stores(ptx)
    if in_place:
        ptx = one_tensor(ptx, kernel.entry)
    shared_bytes = kernel.launch["dynamic_shared_bytes"]
    if shared_bytes:
        ptx = shared_memory_ends(ptx, shared_bytes)
    yield from _paths(ptx, kernel, ())


# ---------------------------------------------------------------------------------------------------------------------
# Edits


def known_target(ptx: str, target: int) -> str:
    return _edit(r"ld\.global\.b64 \{ (%rd\d+) \}, .*", rf"\g<0> mov.u64 \1, {target % 2**64};", ptx)


def one_lane_stores(ptx: str) -> str:
    ptx = _edit(r"\.reg \.pred.*", r"\g<0> .reg .pred %stores; .reg .b32 %lane;", ptx)
    chosen = "mov.u32 %lane, %laneid; setp.eq.u32 %stores, %lane, 0;"
    return _edit(r"(st\.shared\..*)", rf"{chosen} @%stores \1", ptx, times=None)


def one_tensor(ptx: str, entry: str) -> str:
    """The first two parameters of these kernels are the logits and the gradient."""
    return _edit(rf"(ld\.param\..*\[{entry}_param_)1\]", r"\g<1>0]", ptx)


def shared_memory_ends(ptx: str, shared_bytes: int) -> str:
    ptx = _edit(r"\.reg \.pred.*", r"\g<0> .reg .pred %first; .reg .b32 %word; .reg .b64 %gone;", ptx)
    chosen = "mov.u32 %word, %tid.x; setp.eq.u32 %first, %word, 0; mov.b32 %word, global_smem; mov.u64 %gone, 0;"
    writes = " ".join(f"@%first st.shared.b64 [%word+{offset}], %gone;" for offset in range(0, shared_bytes, 8))
    return _edit(r"ret;", f"bar.sync 0; {chosen} {writes} ret;", ptx)


def barriers(ptx: str) -> list[tuple[int, ...]]:
    """The lines, from 0, of each barrier's instructions: one in a block, in a cluster one to arrive and one to wait."""
    lines = [line.strip() for line in ptx.split("\n")]
    waits = (number for number, line in enumerate(lines) if line.startswith("barrier.cluster.wait"))
    found: list[tuple[int, ...]] = []
    for number, line in enumerate(lines):
        if line.startswith("bar.sync"):
            found.append((number,))
        elif line.startswith("barrier.cluster.arrive"):
            found.append((number, next(waits)))
    return found


def without_barrier(kernel: Kernel, barrier: tuple[int, ...]) -> Kernel:
    lines = kernel.ptx.split("\n")
    return kernel._replace(ptx="\n".join("" if number in barrier else line for number, line in enumerate(lines)))


def _edit(pattern: str, instead: str, ptx: str, times: int | None = 1) -> str:
    """Replace the instructions that match, of which there must be so many."""
    edited, found = re.subn(rf"(?m)^[ \t]*{pattern}", instead, ptx)
    assert times is None or found == times, f"{found} instructions of the PTX match {pattern}, where {times} should"
    return edited


# ---------------------------------------------------------------------------------------------------------------------
# The verifier


def _paths(ptx: str, kernel: Kernel, branches: Branches) -> Iterator[Verdict]:
    report = _report(ptx, kernel, branches)
    line = _open_branch(report, ptx)
    if line is None or line in dict(branches):
        yield _verdict(report, kernel, branches)
        return
    for taken in (False, True):
        yield from _paths(ptx, kernel, (*branches, (line, taken)))


def _open_branch(report: dict[str, Any], ptx: str) -> int | None:
    """The line of the branch at which the verifier gave up, if it did, because it depends on what a tensor holds."""
    for diagnostic in report["diagnostics"][:1]:
        if diagnostic["code"] == "control_predicate_not_static":
            line = diagnostic["details"]["location"]["line"]
            return line if BRANCH.search(ptx.split("\n")[line - 1]) else None
    return None


def _report(ptx: str, kernel: Kernel, branches: Branches) -> dict[str, Any]:
    configuration = {
        "schema": "spverify.kernel-input/v1",
        "entry": kernel.entry,
        "launch": kernel.launch,
        "arguments": kernel.arguments,
    }
    if branches:
        configuration["branch_decisions"] = [{"line": line, "taken": taken} for line, taken in branches]
    with tempfile.TemporaryDirectory() as folder:
        ptx_path, configuration_path = Path(folder, "kernel.ptx"), Path(folder, "kernel.json")
        ptx_path.write_text(ptx)
        configuration_path.write_text(json.dumps(configuration))
        return verify(ptx_path, input=configuration_path, timeout_seconds=SECONDS)


def _verdict(report: dict[str, Any], kernel: Kernel, branches: Branches) -> Verdict:
    result, evidence = report["result"], str(report["diagnostics"][:1])
    if result == RACE:
        evidence = "; ".join(_race(race, kernel) for race in report["races"])
    elif result == RACE_FREE:
        assumed = [assumption["key"] for assumption in report["assumptions"] if assumption["triggered"]]
        assumed += report["frontend"]["frontend_assumptions"]["data_branch_decisions"]
        if assumed:
            result, evidence = "race_free by an assumption of the verifier's", str(assumed)
    return Verdict(result, evidence, branches)


def _race(race: dict[str, Any], kernel: Kernel) -> str:
    accesses = []
    for access in (race["first"], race["second"]):
        block, thread = divmod(access["actor"], kernel.launch["block_dim"][0])
        location = access["location"]
        where = f"{Path(location['file']).name}:{location['line']}"
        accesses.append(f"{access['mode']} by thread {thread} of block {block}, {where}")
    return f"{race['region']['address_space']} memory: {'; '.join(accesses)}"
