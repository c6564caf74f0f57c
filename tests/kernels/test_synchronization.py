"""No two threads of a kernel race: proven of the PTX that Triton compiles, without a GPU.

compiled_ptx.py compiles the kernels as the package would launch them, and ptx_races.py has sentryward, a static
verifier, look at every path through each. A proof is of one launch: one vocabulary size, one number of rows, their
strides, and one target for all rows, of which a few are tried. Kernels with a fault stand beside the proofs, and the
fault must be found. Not shown are

- values, and accesses beyond a tensor's end;
- memory ordering and fences: a barrier is taken to order all that was accessed before it, and none here is relaxed;
- threads that decide differently at a branch that depends on what a tensor holds: here such a branch depends on what is
  the same for the whole row;
- lanes of a warp that store different values to one word of shared memory: of each warp one lane's store is looked at.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("sentryward", reason="sentryward, which verifies PTX, is not installed (the extra `races`)")

from helpers.ptx_races import RACE, RACE_FREE, Call, Kernel, barriers, problem, verdicts, without_barrier

from pdl_kernels.backends import dotted
from pdl_kernels.kernels import planner
from pdl_kernels.kernels.launch import TRITON_VERSION

ROOT = Path(__file__).resolve().parents[2]
HELD = "single_pass_rows_kernel"

CALLS = {
    "one block": Call(HELD, 2048, blocks=1),
    "two blocks": Call(HELD, 4096, blocks=2, rows=1),
    "two blocks, ragged": Call(HELD, 4099, blocks=2),
    "two blocks, float32": Call(HELD, 4096, blocks=2, rows=1, dtype="float32"),
    "two blocks, sm_100": Call(HELD, 4096, blocks=2, rows=1, architecture="sm_100"),
    "eight blocks": Call(HELD, 16384, blocks=8, rows=1),
    "two passes": Call("loss_rows_kernel", 4096, rows=1),
    "two passes, ragged": Call("loss_rows_kernel", 4099, rows=1),
    "slices": Call("slice_rows_kernel", 5000, rows=1),
    "slices, merged": Call("merge_rows_kernel", 5000),
    "slices, gradient": Call("gradient_rows_kernel", 5000),
    "multiplied, ragged": Call("scale_rows_kernel", 4099),
}

# Passages of the kernels' sources, and what stands in their place in an edited kernel.
TARGET_LOGIT = "        x_y = tl.load(logits_row + y.to(tl.int64)).to(tl.float32)\n"
AFTER_EXCHANGE = "        row_sixteen, row_upper_half = opaque_constants(row_sum)\n"
TARGET_STORE = """\
        tl.store(
            gradient_interior + target_chunk + index,
            values.to(gradient_row.dtype.element_ty),
            mask=index == column - target_chunk,
        )
"""
SCALAR_STORE = "        tl.store(gradient_row + y, g_y.to(gradient_row.dtype.element_ty))\n"
OWN_LOGIT = "        x_y = tl.load(logits_row + y.to(tl.int64) * stride_column, mask=owns, other=0.0).to(tl.float32)\n"
ANY_LOGIT = OWN_LOGIT.replace(", mask=owns, other=0.0", "")

EDGES_WAIT = "        tl.debug_barrier()  # several threads have read each edge column, and one of them overwrites it\n"

READ_LATE = ((TARGET_LOGIT, ""), (AFTER_EXCHANGE, AFTER_EXCHANGE + TARGET_LOGIT))
EDITED = {
    "one block, target read late": CALLS["one block"]._replace(edits=READ_LATE),
    "two blocks, target read late": CALLS["two blocks"]._replace(edits=READ_LATE),
    "two blocks, target in a scalar store": CALLS["two blocks"]._replace(edits=((TARGET_STORE, SCALAR_STORE),)),
    "multiplied, no waiting": CALLS["multiplied, ragged"]._replace(edits=((EDGES_WAIT, ""),)),
    "slices, read by all": CALLS["slices, gradient"]._replace(edits=((OWN_LOGIT, ANY_LOGIT),)),
}
ALL = CALLS | EDITED


def compilable(call):
    return call.blocks <= 1 or TRITON_VERSION >= planner.CLUSTER_TRITON


@pytest.fixture(scope="module")
def compiled():
    """By name, every kernel that this Triton compiles."""
    reason = problem()
    if reason is not None:
        pytest.skip(reason)
    calls = {name: call for name, call in ALL.items() if compilable(call)}
    done = subprocess.run(
        [sys.executable, "tests/helpers/compiled_ptx.py"], input=json.dumps(list(calls.values())), capture_output=True,
        text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(calls, (Kernel(*fields) for fields in json.loads(done.stdout)), strict=True))


@pytest.fixture
def kernel(compiled, name):
    if not compilable(ALL[name]):
        pytest.skip(f"Triton compiles clusters of blocks from {dotted(planner.CLUSTER_TRITON)} on")
    return compiled[name]


def column(name, place):
    V = ALL[name].vocab_size
    return {"first": 0, "between": V // 3, "last": V - 1}[place]


def unproven(kernel, target, **case):
    return [verdict for verdict in verdicts(kernel, target=target, **case) if verdict.result != RACE_FREE]


def first_race(kernel, target, **case):
    races = (verdict.evidence for verdict in verdicts(kernel, target=target, **case) if verdict.result == RACE)
    return next(races, "none found")


# ---------------------------------------------------------------------------------------------------------------------
# Proofs


@pytest.mark.parametrize("place", ["first", "between", "last"])
@pytest.mark.parametrize("name", ["one block", "two blocks", "two blocks, ragged"])
def test_held_row_in_place(kernel, name, place):
    assert unproven(kernel, column(name, place)) == []


@pytest.mark.parametrize("name", ["two blocks, float32", "two blocks, sm_100", "eight blocks", "two passes", "slices"])
def test_row_in_place(kernel, name):
    assert unproven(kernel, column(name, "last")) == []


@pytest.mark.parametrize("name", ["one block", "two blocks", "slices, merged", "slices, gradient"])
def test_row_with_a_gradient_of_its_own(kernel, name):
    assert unproven(kernel, column(name, "last"), in_place=False) == []


@pytest.mark.parametrize("name", ["multiplied, ragged"])
def test_gradient_that_is_multiplied(kernel, name):
    assert unproven(kernel, None, in_place=False) == []


@pytest.mark.parametrize("target", [-100, 4099], ids=["ignored", "no class"])
@pytest.mark.parametrize("name", ["two blocks, ragged"])
def test_row_that_is_not_read(kernel, name, target):
    assert unproven(kernel, target) == []


@pytest.mark.parametrize("place", ["first", "between", "last"])
@pytest.mark.parametrize("name", ["slices, gradient", "two passes, ragged"])
def test_a_target_is_read_before_it_is_overwritten(kernel, name, place):
    """All threads of the slice that owns the target's logit read it, and several threads each edge column, before one
    of them overwrites it."""
    assert unproven(kernel, column(name, place)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Faults that must be found


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.blocks > 1])
def test_a_cluster_meets_twice(kernel, name):
    """For the exchange, and before its blocks return, whose shared memory others may still read."""
    assert [len(instructions) for instructions in barriers(kernel.ptx)] == [2, 2]


@pytest.mark.parametrize("name", ["one block", "two blocks", "two blocks, float32", "two blocks, sm_100", "slices"])
def test_every_barrier_is_needed(kernel, name):
    assert barriers(kernel.ptx)
    for barrier in barriers(kernel.ptx):
        race = first_race(without_barrier(kernel, barrier), column(name, "last"))
        assert race.startswith("shared memory: write by"), f"without the barrier on lines {barrier}: {race}"


@pytest.mark.parametrize("name", CALLS)
def test_no_barrier_is_relaxed(kernel, name):
    """The verifier makes no difference between a barrier that orders memory and a relaxed one, which does not."""
    assert ".relaxed" not in kernel.ptx


@pytest.mark.parametrize(
    "name",
    [
        "one block, target read late",
        "two blocks, target read late",
        "two blocks, target in a scalar store",
        "slices, read by all",
    ],
)
def test_fault_in_the_source(kernel, name):
    assert first_race(kernel, column(name, "last")).startswith("global memory: write by")


@pytest.mark.parametrize("name", ["multiplied, no waiting"])
def test_fault_where_no_target_is_read(kernel, name):
    assert first_race(kernel, None, in_place=False).startswith("global memory: write by")


@pytest.mark.parametrize("name", ["two blocks", "two blocks, sm_100"])
def test_lanes_of_a_warp_store_one_word(kernel, name):
    """Where every lane stores, the first two lanes of a warp share a word; ptx_races.py has one lane store."""
    race = first_race(kernel, column(name, "last"), every_lane_stores=True)
    assert race.startswith("shared memory: write by thread 0 of block 0, "), race
    assert "; write by thread 1 of block 0, " in race, race
