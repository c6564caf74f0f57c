"""The table of docs/training.md, from what tests passed and what memory was measured.

    python -m benchmarks.trainer_table [--write]

Without --write it says whether the table stands as it has to.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pdl_kernels.weights.files import replace_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PAGE = ROOT / "docs" / "training.md"
BEGIN = "<!-- routes: written by python -m benchmarks.trainer_table --write -->\n"
END = "<!-- end of routes -->"


class Route(NamedTuple):
    """One way to train with PDL, and the tests that show what it is. Patterns are of names of tests below
    tests/integrations/; every test that one matches must have passed, and one must match; "" is no test."""

    framework: str
    package: str  # whose version is named
    hook: str
    line: str
    accumulation: str
    processes: str
    without_logits: str
    memory: str = ""  # the way of benchmarks.trainer_memory
    compared: str = ""  # and the one that it is compared with


ROUTES: tuple[Route, ...] = ()
COLUMNS = (
    "framework",
    "hook",
    "one line",
    "exact: accumulation",
    "exact: processes",
    "without logits",
    "tested version",
    "memory of a step",
)


def passed(pattern: str, outcomes: Mapping[str, str]) -> str:
    """What a cell says: "yes", "no" where there is no such test; ValueError where one failed or none was recorded."""
    if not pattern:
        return "no"
    matching = {
        test: outcome
        for test, outcome in outcomes.items()
        if fnmatch.fnmatchcase(test.split("integrations/")[1], pattern)
    }
    if not matching:
        raise ValueError(f"no test that was recorded is called {pattern}")
    failed = [test for test, outcome in matching.items() if outcome != "passed"]
    if failed:
        raise ValueError(f"{failed[0]}: {matching[failed[0]]}")
    return "yes"


def table(record: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for route in ROUTES:
        peak = "not measured"
        if route.memory:
            own, other = (memory["ways"][way]["peak_bytes"] / 2**20 for way in (route.memory, route.compared))
            peak = f"{own:.0f} MiB; cross entropy {other:.0f}"
        tests = (route.accumulation, route.processes, route.without_logits)
        cells = (
            route.framework,
            route.hook,
            f"`{route.line}`",
            *(passed(pattern, record["outcomes"]) for pattern in tests),
            record["versions"][route.package],
            peak,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with(text: str, new_table: str) -> str:
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + new_table + text[end:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args(arguments).write
    record, memory = (json.loads((RESULTS / name).read_text()) for name in ("trainers.json", "trainer_memory.json"))
    text = PAGE.read_text(encoding="utf-8")
    expected = page_with(text, table(record, memory))
    if write:
        replace_file(PAGE, expected.encode())
    elif text != expected:
        print(f"{PAGE} has another table than the records; python -m benchmarks.trainer_table --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
