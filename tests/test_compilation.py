"""Every kernel compiled ahead of time for sm_80, sm_90, sm_100 and gfx942: no spills, 16-byte accesses.

The cases and the compiler are in compile_kernels.py, a program of its own. The same tests run with the oldest supported
Triton through scripts/compile_with_old_triton.sh.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ROW_KERNELS = ("loss_rows_kernel", "gradient_rows_kernel", "slice_rows_kernel", "scale_rows_kernel")


def run_program(name, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    return run_program("compile_kernels.py")


def test_every_kernel_is_compiled_for_every_target(compiled):
    source = (FOLDER.parent / "pdl_kernels/kernels/cross_entropy.py").read_text()
    kernels = {line.split("(")[0].removeprefix("def ") for line in source.splitlines() if "_kernel(" in line}
    for target in TARGETS:
        assert {row["case"]["kernel"] for row in compiled if row["case"]["target"] == target} == kernels


def test_no_kernel_spills(compiled):
    assert [(row["id"], row["spills"]) for row in compiled if row["spills"]] == []


def test_rows_are_read_and_written_sixteen_bytes_at_a_time(compiled):
    narrow = []
    for row in compiled:
        case = row["case"]
        if case["kernel"] not in ROW_KERNELS or case["column_stride"] != 1:
            continue
        amd = case["target"] == "gfx942"
        is_wide = (lambda name: name.endswith("dwordx4")) if amd else (lambda name: name.endswith(".128"))
        loads = [n for n in row["memory"] if n.startswith(("LDG", "global_load"))]
        stores = [n for n in row["memory"] if n.startswith(("STG", "global_store"))]
        if not any(map(is_wide, loads)):
            narrow.append((row["id"], "loads"))
        if case["gradient"] and not any(map(is_wide, stores)):
            narrow.append((row["id"], "stores"))
        # The target column and its neighbours' edges are all that may be narrow: a handful, not a tile.
        element_wide = (".U16", "ushort", "_short")
        if sum(n for name, n in row["memory"].items() if name.endswith(element_wide)) > 3 * 8:
            narrow.append((row["id"], row["memory"]))
    assert narrow == []


def test_all_stores_of_a_row_have_one_layout(compiled):
    """The thread that wrote the target column in bulk writes it again: see store_target_column."""
    layouts = {row["id"]: row["tile_store_layouts"] for row in compiled if row["tile_store_layouts"]}
    assert len(layouts) > 30
    assert {name: found for name, found in layouts.items() if len(found) != 1} == {}


def test_exponentials_take_one_fused_multiply_add(compiled):
    plain = [row for row in compiled if row["case"]["kernel"] == "loss_rows_kernel" and row["case"]["name"] == "plain"]
    assert len(plain) == 12
    assert all(row["fused"] for row in plain)
    # 7 instructions an element in the two walks, twice the 3.5 without which nothing could be done: a guard against a
    # layout or conversion gone wrong, not a goal.
    for row in plain:
        if row["case"]["target"] != "gfx942":
            assert len(row["instructions_per_element"]) == 2, row["id"]
            assert max(row["instructions_per_element"]) < 7.0, row["id"]


def test_launcher_without_a_gpu():
    """The real launch path against a driver that launches nothing."""
    (result,) = run_program("stubbed_device.py")
    assert result["compilations_after"] == result["compilations_before"], "a new number of rows compiled again"
    assert result["compilations_before"]["loss_rows_kernel"] == 1
    assert result["launches"] == {
        "denominators_kernel": 1,
        "loss_rows_kernel": 1,
        "reduce_rows_kernel": 1,
        "gradient_rows_kernel": 1,
    }
