"""The report as a table for people and as JSON for programs."""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.roofline import budgets
from benchmarks.roofline.hardware import HARDWARE

SCHEMA = 1
NOTE = (
    "registers, spills, shared memory, widths, fences and instructions: read from the machine code of this compiler. "
    "programs per multiprocessor, binding unit and fraction of the memory limit: a model, not measured."
)
COLUMNS = (
    "kernel", "call", "dtype", "V", "rows", "warps", "registers", "spills", "shared", "programs / SM*",
    "load B", "store B", "fences", "instr. / element", "with the rest", "binds*", "fraction*",
)  # fmt: skip


def print_tables(variants: list[dict[str, Any]], console: Console) -> None:
    for target in dict.fromkeys(variant["target"] for variant in variants):
        table = Table(title=f"{target} ({HARDWARE[target].name})", title_justify="left")
        for index, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if index < 3 else "right", no_wrap=index > 1)
        for variant in variants:
            if variant["target"] == target:
                table.add_row(*_cells(variant), style="bold red" if variant["problems"] else None)
        console.print(table)
    console.print(f"* {NOTE}", highlight=False)
    console.print(
        "instr. / element: in each walk's loop. with the rest: everything else as if it ran once a program. "
        "-: does not apply, or is not modelled for this architecture.",
        highlight=False,
    )


def _cells(variant: dict[str, Any]) -> Iterable[str]:
    walks, model = variant["walks"], variant["model"]
    call = ", ".join(filter(None, (variant["call"], variant["options"], variant["layout"])))
    yield variant["kernel"].removesuffix("_kernel")
    yield call.replace(", plain", "")
    yield from (variant["dtype"], str(variant["vocab_size"]), str(variant["rows"]), str(variant["warps"]))
    yield from (str(variant[name]) for name in ("registers", "spills", "shared_bytes", "resident_programs"))
    yield _each(walk["load_bytes"] for walk in walks)
    yield _each(walk["store_bytes"] for walk in walks if walk["store_bytes"] is not None)
    yield str(variant["fences"])
    yield _each(f"{walk['instructions_per_element']:.2f}" for walk in walks)
    yield f"{model['row_instructions_per_element']:.1f}" if model else "-"
    yield model["binds"] if model else "-"
    yield f"{model['fraction']:.2f}" if model else "-"


def _each(values: Iterable[Any]) -> str:
    return " ".join(dict.fromkeys(map(str, values))) or "-"


def as_json(variants: list[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "note": NOTE,
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "hardware": {name: {**one._asdict(), "target": name} for name, one in HARDWARE.items()},
        "budgets": {role: one._asdict() for role, one in budgets.BUDGETS.items()},
        "variants": variants,
        "problems": problems,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
