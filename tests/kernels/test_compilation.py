"""Every kernel compiled ahead of time for sm_80, sm_90, sm_100 and gfx942: no spills, 16-byte accesses, one layout.

What is compiled is what the package would launch: benchmarks.roofline, a program of its own, because kernels that were
imported under TRITON_INTERPRET=1 cannot be compiled. The same tests run with the oldest supported Triton through
scripts/compile_with_old_triton.sh.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("rich", reason="rich, which prints the roofline's table, is not installed")

from pdl_kernels.kernels import planner
from pdl_kernels.kernels.launch import TRITON_VERSION

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The first test waits for all variants: two minutes on an idle machine, more where other tests run beside them.
pytestmark = pytest.mark.timeout(900)
HELD = {"single_pass_rows_kernel"}
CLUSTERS = TRITON_VERSION >= planner.CLUSTER_TRITON  # older ones hold only rows that fit one block of threads
CLUSTER_SIZES = {32000, 50257, 128256, 151936, 262144}
ROW_KERNELS = ("loss_rows_kernel", "gradient_rows_kernel", "slice_rows_kernel", "scale_rows_kernel")


def run_program(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The variants of the quick roofline, which fails on spills, narrow accesses and exceeded budgets by itself."""
    path = tmp_path_factory.mktemp("roofline") / "quick.json"
    run_program("-m", "benchmarks.roofline", "--quick", "--json", path)
    report = json.loads(path.read_text())
    assert report["problems"] == []
    return report["variants"]


def name(variant):
    return " ".join(
        str(variant[key]) for key in ("kernel", "target", "call", "dtype", "vocab_size", "options", "layout")
    )


def test_every_kernel_is_compiled_for_every_target(compiled):
    sources = [path.read_text() for path in (ROOT / "pdl_kernels/kernels").glob("*.py")]
    kernels = set(re.findall(r"^def (\w+_kernel)\(", "".join(sources), re.MULTILINE))
    assert kernels > HELD
    for target in TARGETS:
        found = {variant["kernel"] for variant in compiled if variant["target"] == target}
        assert found - HELD == kernels - HELD
        if CLUSTERS:
            assert found & HELD == (HELD if target in ("sm_90", "sm_100") else set())


def test_a_held_row_is_exchanged_once(compiled):
    held = [variant for variant in compiled if variant["kernel"] in HELD]
    assert {variant["vocab_size"] for variant in held} >= (CLUSTER_SIZES if CLUSTERS else {32000})
    for variant in held:
        assert variant["cluster_fences"] == (2 if variant["programs_per_cluster"] > 1 else 0), name(variant)


def test_no_kernel_spills(compiled):
    assert [(name(variant), variant["spills"]) for variant in compiled if variant["spills"]] == []


def test_rows_are_read_and_written_sixteen_bytes_at_a_time(compiled):
    aligned = [variant for variant in compiled if variant["aligned"]]
    assert {variant["kernel"] for variant in aligned} == {*ROW_KERNELS, "single_pass_rows_kernel"}
    for variant in aligned:
        for walk in variant["walks"]:
            assert not walk["narrow"], name(variant)
            if walk["role"] in ("first of two", "forward only", "scale"):
                assert walk["load_bytes"] == 16, name(variant)
            if walk["role"] in ("gradient", "scale"):
                assert walk["store_bytes"] == 16, name(variant)
        # The target column and its neighbours' edges are all that may be narrow: a handful, not a tile.
        single = sum(one["instructions"] for one in variant["accesses"] if one["bytes"] == 2)
        assert single <= (3 if variant["kernel"] != "single_pass_rows_kernel" else 4) * 8, name(variant)


def test_all_stores_of_a_row_have_one_layout(compiled):
    """The thread that wrote the target column in bulk writes it again: see store_target_column."""
    layouts = {name(variant): variant["tile_store_layouts"] for variant in compiled if variant["tile_store_layouts"]}
    assert len(layouts) > 30
    assert {one: found for one, found in layouts.items() if len(found) != 1} == {}


def test_exponentials_take_one_fused_multiply_add(compiled):
    plain = [
        variant
        for variant in compiled
        if (variant["kernel"], variant["call"], variant["options"], variant["vocab_size"])
        == ("loss_rows_kernel", "loss + gradient", "plain", 128256)
        and variant["layout"] in ("", "two passes")
    ]
    if CLUSTERS:
        assert len(plain) == 8  # on sm_90 and sm_100 only bfloat16 rows are forced to be read twice
    for variant in plain:
        first, second = variant["walks"]
        assert variant["fused_multiply_add"] >= first["elements"] + second["elements"], name(variant)
        # An exponential per element, and what a tile's rescaling takes; older Triton is given tiles of other shapes.
        if CLUSTERS:
            assert first["special"] <= first["elements"] + 2, name(variant)
        assert second["special"] == second["elements"], name(variant)


@pytest.fixture(scope="module")
def stubbed():
    """The real launch path against a driver that launches nothing."""
    return json.loads(run_program("-m", "benchmarks.stubbed_device", "--calls"))


def test_a_new_number_of_rows_compiles_nothing(stubbed):
    assert stubbed["compilations_after"] == stubbed["compilations_before"], "a new number of rows compiled again"
    assert stubbed["compilations_before"]["loss_rows_kernel"] == 1
    names = ["denominators_kernel", "loss_rows_kernel", "reduce_rows_kernel", "gradient_rows_kernel"]
    assert stubbed["launches"] == dict.fromkeys(names, 1)


def test_a_public_call_launches_what_the_planner_names_and_the_roofline_compiles(stubbed):
    kernels = {planner.SINGLE_PASS: "single_pass_rows_kernel", planner.TWO_PASSES: "loss_rows_kernel"}
    seen = []
    for call in stubbed["public"]:
        planned = call["planned"]
        launched = {one["kernel"]: one for one in call["launched"]}
        rows = launched["denominators_kernel"]
        assert rows["grid"] == [1, 1]
        if planned["kernel"] == planner.SLICES:
            assert set(launched) >= {"slice_rows_kernel", "merge_rows_kernel", "gradient_rows_kernel"}
            assert launched["slice_rows_kernel"]["grid"][1] == planned["slices"] > 1
            chosen = launched["slice_rows_kernel"]
        else:
            chosen = launched[kernels[planned["kernel"]]]
            assert len(launched) == 3
        assert (chosen["warps"], chosen["blocks"]) == (planned["warps"], planned["ctas"])
        assert [one["hash"] for one in call["launched"]] == call["roofline"]
        seen.append((chosen["kernel"], chosen["blocks"]))
    blocks = 8 if CLUSTERS else 1
    held, twice = "single_pass_rows_kernel", "loss_rows_kernel"
    long_row = (held, blocks) if CLUSTERS else (twice, 1)
    assert seen == [(twice, 1), (held, 1), (held, 1), (twice, 1), long_row, ("slice_rows_kernel", 1)]
