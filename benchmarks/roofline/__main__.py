"""Static roofline of the kernels: what the compiler made of them, without a GPU.

    python -m benchmarks.roofline [--quick] [--target TARGET] [--kernel KERNEL] [--json FILE.json]

Exits with 1 if a kernel spills, reads or writes aligned rows by less than 16 bytes, exceeds its budget of instructions
by 10 %, or has machine code that cannot be read; with 2 if an argument is not understood.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are defined: interpreted ones cannot be compiled

from rich.console import Console
from tqdm import tqdm

from benchmarks.roofline.cases import TARGETS, CompiledCall, compile_call, full_cases, quick_cases
from benchmarks.roofline.compile import compiled_launches
from benchmarks.roofline.machine import MachineCodeError
from benchmarks.roofline.measure import measured
from benchmarks.roofline.report import as_json, print_tables
from benchmarks.roofline.walks import KERNEL_WALKS
from pdl_kernels.weights.files import replace_file

KERNELS = sorted(name.removesuffix("_kernel") for name in KERNEL_WALKS)
WIDTH = 200  # characters of the table where the output is no terminal


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every kernel on every target, few shapes: for CI")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything as JSON")
    chosen = parser.parse_args(arguments)
    targets, names = chosen.target or TARGETS, chosen.kernel or KERNELS
    cases = [case for case in (quick_cases() if chosen.quick else full_cases()) if case.target in targets]

    warnings.filterwarnings("ignore", module="triton")
    variants, problems = look_at(cases, names)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    print_tables(variants, console)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        replace_file(chosen.json, (json.dumps(as_json(variants, problems), indent=1) + "\n").encode())
    for problem in problems:
        console.print(f"FAILED {problem}", style="bold red", highlight=False, soft_wrap=True)
    console.print(f"{len(variants)} variants, {len(problems)} problems", highlight=False)
    return 1 if problems or not variants else 0


def look_at(cases: list[CompiledCall], names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """(the variants of the named kernels that the cases launch, what is wrong with them)"""
    variants: dict[tuple[Any, ...], dict[str, Any]] = {}
    problems = []
    for case in tqdm(cases, desc="compiling", unit="call"):
        with compiled_launches(case.target, lambda name: name.removesuffix("_kernel") in names) as launches:
            compile_call(case)
        for launch in launches:
            # Kernels that do not walk over logits, and rows of one size, come up in many cases.
            size = case.vocab_size if "VARIANT" in launch.arguments else None
            key = (case.target, launch.compiled.hash, size, launch.programs)
            if key in variants:
                continue
            try:
                variants[key] = measured(case, launch)
                found = variants[key]["problems"]
            except MachineCodeError as error:
                found = [str(error)]
            problems += [f"{describe(case, launch.kernel)}: {problem}" for problem in found]
    return list(variants.values()), problems


def describe(case: CompiledCall, kernel: str) -> str:
    shape = f"{case.rows} x {case.vocab_size} {case.dtype}"
    return ", ".join(filter(None, (kernel, case.target, case.call, shape, case.options, case.layout)))


if __name__ == "__main__":
    sys.exit(main())
