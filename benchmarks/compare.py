"""Two results documents side by side: ratios of medians with the noise that surrounds them."""

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.operations import TITLES
from benchmarks.results import Key, group_noise, summary, timed


class Change(NamedTuple):
    key: Key
    ratio: float  # new time / old time: below 1 is faster
    noise: float  # a relative difference up to this is none

    @property
    def verdict(self) -> str:
        if abs(self.ratio - 1) <= self.noise:
            return "within noise"
        return "faster" if self.ratio < 1 else "slower"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """One change per operation, case and contender that both have.

    The noise is the largest of: how far two instances of one contender lay apart in either run, and half the distance
    between the 20th and 80th percentile in either run.
    """
    old_records, new_records = timed(old), timed(new)
    old_noise, new_noise = group_noise(old), group_noise(new)
    changes = []
    for key, record in new_records.items():
        if key not in old_records:
            continue
        before, after = summary(old_records[key]), summary(record)
        group = key.operation, key.case
        spreads = [(times.p80 - times.p20) / 2 / times.median for times in (before, after)]
        noise = max(old_noise.get(group, 0.0), new_noise.get(group, 0.0), *spreads)
        changes.append(Change(key, after.median / before.median, noise))
    return changes


def print_comparison(old: dict[str, Any], new: dict[str, Any], console: Console) -> None:
    before, after = old["environment"], new["environment"]
    console.print(f"\n[bold]compared with {before['commit']} of {before['date']}[/bold]")
    for what in ("device", "threads"):
        if before[what] != after[what]:
            console.print(
                f"[yellow]the {what} differs ({before[what]} then, {after[what]} here): ratios of times say little"
            )
    changes = compare(old, new)
    if not changes:
        console.print("[yellow]the two have no operation, shape and contender in common")
        return
    table = Table(pad_edge=False)
    for column in ("operation", "case", "contender"):
        table.add_column(column)
    for column in ("new time / old time", "noise", ""):
        table.add_column(column, justify="right")
    for change in changes:
        operation, case, contender = change.key
        style = {"slower": "red", "faster": "green"}.get(change.verdict, "")
        ratio, noise = f"{change.ratio:.2f}", f"{change.noise:.2f}"
        table.add_row(TITLES.get(operation, operation), str(case), contender, ratio, noise, change.verdict, style=style)
    console.print(table)
