"""pdl-kernels doctor: versions, devices, and which backend would run."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdl_kernels import doctor as examination


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for bug reports.")] = False,
) -> None:
    """Show versions, devices, and which backend would run on each, and why.

    What `pdl_cross_entropy(..., backend="auto")` chooses, for logits of each dtype on each device. It runs nothing.
    """
    if as_json:
        print(json.dumps(examination.report(), indent=2))
        return
    console = Console(highlight=False)
    versions = Table(title="Versions", title_justify="left", show_header=False)
    for package, version in examination.versions().items():
        versions.add_row(package, Text(version, style="dim" if version == examination.NOT_INSTALLED else ""))
    console.print(versions)
    for device in examination.devices():
        console.print(_backends(device))
    settings = Table(title="Settings", title_justify="left")
    for name in ("environment variable", "value", "meaning"):
        settings.add_column(name)
    for setting in examination.settings():
        settings.add_row(setting.variable, setting.value or "not set", setting.meaning)
    console.print(settings)


def _backends(device: examination.Device) -> Table:
    facts = [device.device, device.name]
    if device.capability is not None:
        facts.append(f"capability {device.capability}")
    if device.memory is not None:
        facts.append(f"{device.memory / 2**30:.1f} GiB")
    table = Table(title=Text(f"Device {facts[0]}: {', '.join(facts[1:])}"), title_justify="left")
    for name in ("logits", "backend", "why"):
        table.add_column(name)
    for dtype, (backend, why) in device.backends.items():
        table.add_row(dtype, Text(backend, style="bold"), why)
    return table
