"""A results document as tables on the screen."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import Case
from benchmarks.operations import TITLES
from benchmarks.results import Key, case_of, group_noise, summary, timed

MIN_WIDTH = 132  # columns, where the output is no terminal


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=MIN_WIDTH)


def print_results(document: dict[str, Any], console: Console) -> None:
    environment, bandwidth = document["environment"], document["bandwidth"]
    packages = environment["packages"]
    console.print(
        f"[bold]{environment['device']}[/bold], torch {packages.get('torch')}, triton {packages.get('triton')}, "
        f"{environment['threads']} threads, commit {environment['commit']}, {environment['date']}"
    )
    if bandwidth:
        console.print(
            f"measured in this run: copy {bandwidth['copy'] / 1e9:.1f} GB/s (read + written), "
            f"reading alone {bandwidth['read'] / 1e9:.1f} GB/s"
        )
    cases = list(dict.fromkeys(case_of(record) for record in document["records"]))
    for case in cases:
        console.print(_case_table(document, case))
    if document["host"] and "microseconds" in document["host"]:
        host = document["host"]
        console.print(
            f"Python's time per forward + backward at 16 x 1000: {host['microseconds']['median']:.0f} microseconds; "
            f"launches: {host['launches_forward']} forward, {host['launches_backward']} backward"
        )
    for record in document["records"]:
        if record["problem"]:
            what = f"{record['contender']}, {TITLES.get(record['operation'], record['operation'])}, {case_of(record)}"
            console.print(f"{record['status']}: {what}: {record['problem']}", style="yellow", markup=False)
    for what, reason in document["left_out"].items():
        console.print(f"left out: {what}: {reason}", style="dim", markup=False)


def _case_table(document: dict[str, Any], case: Case) -> Table:
    noise = group_noise(document)
    samples = timed(document)
    table = Table(title=f"{case}, logits {case.logits_bytes / 1e6:.0f} MB", title_justify="left")
    table.add_column("contender", min_width=24)
    columns = ["ms", "p20", "p80", "GB/s", "of copy", "x torch", "extra MB", "moves MB", "floor MB"]
    if case.linear:
        columns = ["ms", "p20", "p80", "GFLOP/s", "x torch", "extra MB", "plan MB"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    records = [record for record in document["records"] if case_of(record) == case]
    for operation in dict.fromkeys(record["operation"] for record in records):
        bound = noise.get((operation, case))
        title = TITLES.get(operation, operation) + (f", noise {bound:.0%}" if bound is not None else "")
        table.add_section()
        table.add_row(f"[italic]{title}[/italic]")
        torch_record = samples.get(Key(operation, case, "torch linear" if case.linear else "torch"))
        for record in records:
            if record["operation"] == operation:
                table.add_row(*_row(record, torch_record, document["bandwidth"]))
    return table


def _row(record: dict[str, Any], torch_record: dict[str, Any] | None, bandwidth: dict[str, float]) -> list[str]:
    name = record["contender"] + ("" if record["weighted"] else " (unweighted)")
    if record["status"] != "timed":
        style = "red" if record["status"] == "wrong" else "yellow"
        return [name, f"[{style}]{record['status']}[/{style}]"]
    times = summary(record)
    ratio = "" if torch_record is None else f"{summary(torch_record).median / times.median:.2f}x"
    extra, planned = record["peak_extra_bytes"], record.get("planned_bytes")
    if case_of(record).linear:
        planned = record.get("planned_extra_bytes")
        return [
            name,
            *(_milliseconds(seconds) for seconds in times),
            f"{record['floor_flops'] / times.median / 1e9:.0f}",
            ratio,
            "" if extra is None else f"{extra / 1e6:.1f}",
            "" if planned is None else f"{planned / 1e6:.1f}",
        ]
    rate = record["floor_bytes"] / times.median  # bytes that had to be moved, per second
    return [
        name,
        *(_milliseconds(seconds) for seconds in times),
        f"{rate / 1e9:.1f}",
        f"{rate / bandwidth['copy']:.0%}" if bandwidth else "",
        ratio,
        "" if extra is None else f"{extra / 1e6:.1f}",
        "" if planned is None else f"{planned['moved'] / 1e6:.1f}",
        f"{record['floor_bytes'] / 1e6:.1f}",
    ]


def _milliseconds(seconds: float) -> str:
    """Four digits, and all of those before the point."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 1000 else f"{milliseconds:#.4g}"
