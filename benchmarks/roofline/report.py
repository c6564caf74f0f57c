"""The report as a table for people and as JSON for programs."""

import platform
from collections.abc import Callable, Iterable
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
FOOTNOTE = (
    "instr. / element: in each walk's loop. with the rest: everything else as if it ran once a program. "
    "-: does not apply, or is not modelled for this architecture."
)
Variant = dict[str, Any]


def _call(variant: Variant) -> str:
    return ", ".join(filter(None, (variant["call"], variant["options"], variant["layout"]))).replace(", plain", "")


def _each(values: Iterable[Any]) -> str:
    return " ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "-"


def _modelled(what: str, form: str) -> Callable[[Variant], str]:
    return lambda variant: form.format(variant["model"][what]) if variant["model"] else "-"


COLUMNS: dict[str, Callable[[Variant], str]] = {
    "kernel": lambda variant: variant["kernel"].removesuffix("_kernel"),
    "call": _call,
    "dtype": lambda variant: variant["dtype"],
    "V": lambda variant: str(variant["vocab_size"]),
    "rows": lambda variant: str(variant["rows"]),
    "warps": lambda variant: str(variant["warps"]),
    "registers": lambda variant: str(variant["registers"]),
    "spills": lambda variant: str(variant["spills"]),
    "shared": lambda variant: str(variant["shared_bytes"]),
    "programs / SM*": lambda variant: str(variant["resident_programs"]),
    "load B": lambda variant: _each(walk["load_bytes"] for walk in variant["walks"]),
    "store B": lambda variant: _each(walk["store_bytes"] for walk in variant["walks"]),
    "fences": lambda variant: str(variant["fences"]),
    "instr. / element": lambda variant: _each(f"{walk['instructions_per_element']:.2f}" for walk in variant["walks"]),
    "with the rest": _modelled("row_instructions_per_element", "{:.1f}"),
    "binds*": _modelled("binds", "{}"),
    "fraction*": _modelled("fraction", "{:.2f}"),
}


def print_tables(variants: list[Variant], console: Console) -> None:
    for target in dict.fromkeys(variant["target"] for variant in variants):
        table = Table(title=f"{target} ({HARDWARE[target].name})", title_justify="left")
        for name in COLUMNS:
            text = name in ("kernel", "call", "dtype")
            table.add_column(name, justify="left" if text else "right", no_wrap=name not in ("kernel", "call"))
        for variant in variants:
            if variant["target"] == target:
                style = "bold red" if variant["problems"] else None
                table.add_row(*(cell(variant) for cell in COLUMNS.values()), style=style)
        console.print(table)
    console.print(f"* {NOTE}\n{FOOTNOTE}", highlight=False)


def as_json(variants: list[Variant], problems: list[str]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "note": NOTE,
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "hardware": {name: {**one._asdict(), "target": name} for name, one in HARDWARE.items()},
        "budgets": {role: one._asdict() for role, one in budgets.BUDGETS.items()},
        "variants": variants,
        "problems": problems,
    }
