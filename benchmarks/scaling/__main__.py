"""Prints, records and draws the predictions, or checks their formulas with processes.

python -m benchmarks.scaling [--tokens N] [--json FILE] [--plot FILE.png] [--write | --check-with-gloo]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import at_least
from benchmarks.environment import ROOT
from benchmarks.results import write_record
from benchmarks.scaling import gloo
from benchmarks.scaling.hardware import DEVICES, FABRICS
from benchmarks.scaling.plot import write_plot
from benchmarks.scaling.predictions import (
    HIDDEN_SIZE,
    RANKS,
    TOKENS,
    VOCABULARIES,
    new_record,
    page_tables,
    page_with,
)
from benchmarks.table import make_console
from pdl_kernels.weights.files import replace_file

RECORD = ROOT / "benchmarks" / "results" / "scaling.json"
PLOT = ROOT / "docs" / "scaling.png"
PAGE = ROOT / "docs" / "performance.md"


def print_record(record: dict[str, Any], console: Console, ranks: Sequence[int], fabric: str) -> None:
    for kind, what in (("on_logits", "the loss on logits"), ("with_projection", "with the output projection")):
        for V in VOCABULARIES:
            table = Table(title=f"{what}: {record['tokens']} tokens x {V}, {fabric}", title_justify="left")
            table.add_column("scheme", min_width=24)
            columns = ["ranks", "moves MB", "sends MB", "collectives", "extra MB"]
            for column in (*columns, *(f"{device.name} ms" for device in DEVICES)):
                table.add_column(column, justify="right", no_wrap=True)
            rows = [row for row in record[kind] if row["vocab_size"] == V and row["ranks"] in ranks]
            for scheme in dict.fromkeys(row["scheme"] for row in rows):
                for row in (row for row in rows if row["scheme"] == scheme):
                    times = [row["seconds"][f"{device.name}, {fabric}"] for device in DEVICES]
                    table.add_row(
                        scheme if row["ranks"] == ranks[0] else "",
                        str(row["ranks"]),
                        f"{row['moved_bytes'] / 1e6:.1f}",
                        f"{row['sent_bytes'] / 1e6:.2f}",
                        str(row["collectives"]),
                        f"{row['memory_bytes'] / 1e6:.1f}",
                        *(f"{time * 1e3:.3f}" for time in times),
                    )
                table.add_section()
            console.print(table)
    console.print("Predictions: nothing was measured on GPUs. benchmarks/scaling/hardware.py has every assumption.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=at_least(1), default=TOKENS, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=at_least(1), default=HIDDEN_SIZE, help="default: %(default)s")
    parser.add_argument(
        "--ranks", type=int, nargs="+", choices=RANKS, default=(1, 8, 64, 1024), metavar="R",
        help="powers of two up to 1024, to print; all are recorded (default: 1 8 64 1024)",
    )  # fmt: skip
    names = [fabric.name for fabric in FABRICS]
    parser.add_argument("--fabric", choices=names, default=names[0], help="to print (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all predictions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="where to draw them")
    parser.add_argument(
        "--write", action="store_true", help="the project's record, and from it the plot and tables of the page"
    )  # fmt: skip
    parser.add_argument(
        "--check-with-gloo", action="store_true", help="start 2 and 4 processes and count what they really send"
    )
    chosen = parser.parse_args(arguments)
    if chosen.check_with_gloo:
        return gloo.check()
    if chosen.write:
        record = new_record()
        write_record(RECORD, record)
        write_plot(record, PLOT)
        replace_file(PAGE, page_with(PAGE.read_text(encoding="utf-8"), page_tables(record)).encode())
        return 0
    record = new_record(chosen.tokens, chosen.hidden_size)
    print_record(record, make_console(), sorted(set(chosen.ranks)), chosen.fabric)
    if chosen.json:
        write_record(chosen.json, record)
    if chosen.plot:
        write_plot(record, chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
