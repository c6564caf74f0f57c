"""What is done, and what the rest would cost by what the finished runs took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.quality import records
from benchmarks.quality.errors import UserError
from benchmarks.quality.matrix import Run, is_done, require_same
from benchmarks.quality.settings import Settings


def print_list(folder: Path, runs: Sequence[Run], settings: Settings) -> None:
    """`settings` are those of a run; records that were made with others are told, since it would refuse them."""
    done = {
        run: sum(records.read(records.record_path(folder, run.task, run.arm, run.seed))["seconds"].values())
        for run in runs
        if is_done(folder, run)
    }
    table = Table()
    tasks = list(dict.fromkeys(run.task for run in runs))
    table.add_column("arm")
    for task in tasks:
        table.add_column(task, justify="right")
    for arm in dict.fromkeys(run.arm for run in runs):
        cells = []
        for task in tasks:
            seconds = [done[run] for run in done if (run.task, run.arm) == (task, arm)]
            of = sum((run.task, run.arm) == (task, arm) for run in runs)
            took = f" ({sum(seconds):,.0f} s)" if seconds else ""
            cells.append(f"{len(seconds)} of {of}{took}")
        table.add_row(arm, *cells)
    console = Console()
    console.print(f"seeds done, records in {folder}", soft_wrap=True, highlight=False)
    console.print(table)
    for task in tasks:
        if (path := records.task_path(folder, task)).exists():
            try:
                require_same(path, settings)
            except UserError as error:
                console.print(str(error), soft_wrap=True, highlight=False)
    left = [run for run in runs if run not in done]
    if left and done:
        console.print(f"{len(left)} runs left, about {expected_seconds(done, left) / 3600:.1f} h of one process")
    elif left:
        console.print(f"{len(left)} runs left; none is done, so nothing is known of what they cost")


def expected_seconds(done: dict[Run, float], left: Sequence[Run]) -> float:
    """By the mean of the finished runs of the same task, or of all where there is none."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for run, seconds in done.items():
        by_task[run.task].append(seconds)
    overall = sum(done.values()) / len(done)
    means = {task: sum(values) / len(values) for task, values in by_task.items()}
    return sum(means.get(run.task, overall) for run in left)
