"""pdl-kernels doctor: versions, devices, which backend would run, and whether it is right and fast here."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pdl_kernels.doctor import environment
from pdl_kernels.doctor.check import SECONDS, Check, is_right
from pdl_kernels.weights.files import replace_file

LEGEND = (
    "right: cases; error, torch's: of the plain loss's gradient, against float64, in the 2-norm; worst: of all cases "
    "and tensors, as a share of what is allowed; ms: forward + backward; of copy: what a copy of the bytes that must "
    "be moved would take, over that; x torch: times as fast as F.cross_entropy(weight=)."
)

CheckOption = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Run every kernel that can be chosen on this machine's devices against float64, and time it. A minute "
        "with sixteen cores to compile on, or on a CPU. Exits with 1 where something is wrong.",
    ),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write what was found as JSON, for bug reports; - prints it."),
]
DeviceName = Annotated[
    str | None,
    typer.Option(help="Check this one: cpu, cuda, cuda:1. By default every GPU, or the CPU where there is none."),
]
Vocabularies = Annotated[
    list[int] | None,
    typer.Option(
        "--vocabulary", help="Check this size of the vocabulary; may be repeated. By default six from 1000 to 262144."
    ),
]
Seconds = Annotated[float, typer.Option(help="With --check: begin nothing after so many seconds.")]


def doctor(
    check: CheckOption = False,
    json_file: JsonFile = None,
    device: DeviceName = None,
    vocabularies: Vocabularies = None,
    seconds: Seconds = SECONDS,
) -> None:
    """Show versions, devices, and which backend would run on each, and why; with --check, whether it is right.

    What `pdl_cross_entropy(..., backend="auto")` chooses, for logits of each dtype on each device. Without --check it
    runs nothing.
    """
    if not check:
        if device is not None or vocabularies:
            raise ValueError("--device and --vocabulary are for --check, which alone runs something")
        _show_installation(json_file)
        return
    if json_file not in (None, "-") and not Path(json_file).resolve().parent.is_dir():
        raise ValueError(f"--json is {json_file}, and there is no folder {Path(json_file).parent}; make it first")
    for size in vocabularies or ():
        if not 2 <= size < 2**31:
            raise ValueError(f"--vocabulary is {size}; accepted are sizes from 2 to 2**31 - 1")
    right = [_check_device(each, json_file, vocabularies or [], seconds) for each in _devices_to_check(device)]
    if not all(right):
        raise typer.Exit(1)


def _show_installation(json_file: str | None) -> None:
    if json_file is not None:
        _write(json_file, environment.report())
        if json_file == "-":
            return
    console = Console(highlight=False)
    versions = Table(title="Versions", title_justify="left", show_header=False)
    for package, version in environment.versions().items():
        versions.add_row(package, Text(version, style="dim" if version == environment.NOT_INSTALLED else ""))
    console.print(versions)
    for device in environment.devices():
        console.print(_backends(device))
    settings = Table(title="Settings", title_justify="left")
    for name in ("environment variable", "value", "meaning"):
        settings.add_column(name)
    for setting in environment.settings():
        settings.add_row(setting.variable, setting.value or "not set", setting.meaning)
    console.print(settings)


def _backends(device: environment.Device) -> Table:
    facts = [device.name]
    if device.capability is not None:
        facts.append(f"capability {device.capability}")
    if device.memory is not None:
        facts.append(f"{device.memory / 2**30:.1f} GiB")
    table = Table(title=Text(f"Device {device.device}: {', '.join(facts)}"), title_justify="left")
    for name in ("logits", "backend", "why"):
        table.add_column(name)
    for dtype, (backend, why) in device.backends.items():
        table.add_row(dtype, Text(backend, style="bold"), why)
    return table


def _write(json_file: str, document: dict[str, Any]) -> None:
    content = json.dumps(document, indent=2)
    if json_file == "-":
        print(content)
    else:
        replace_file(json_file, content.encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# --check


def _devices_to_check(name: str | None) -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    device: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ValueError(f"--device is {name}; accepted here are cpu{''.join(f', cuda:{i}' for i in range(count))}")
    return [torch.device("cuda", device.index or 0) if device.type == "cuda" else device]


def _check_device(device: torch.device, json_file: str | None, vocabularies: list[int], seconds: float) -> bool:
    """Check one device, show what was found, and return whether everything on it is right."""
    path = json_file
    if json_file not in (None, "-") and device.index:  # every further GPU has a file of its own
        path = str(Path(json_file).with_suffix(f".{device.index}.json"))

    def save(document: dict[str, Any]) -> None:
        if path not in (None, "-"):
            _write(path, document)

    # Progress goes to standard error, and the findings to standard output unless that is for JSON.
    console = Console(file=sys.stderr if path == "-" else None, highlight=False)
    with tqdm(desc=f"checking {device}", unit="case", dynamic_ncols=True, leave=False) as bar:
        check = Check(device, vocabularies, seconds=seconds, save=save, progress=bar.update)
        bar.total = check.steps
        try:
            document = check.run()
        except KeyboardInterrupt:
            if path is not None:
                print(f"interrupted: what was found until then is in {path}", file=sys.stderr)
            raise
    if path == "-":
        _write(path, document)
    _show_check(document, console)
    if path not in (None, "-"):
        console.print(f"written: {path}", soft_wrap=True)
    return is_right(document)


def _show_check(document: dict[str, Any], console: Console) -> None:
    found = document["cases"]
    copy = document["copy_bytes_per_second"]
    console.print(_summary(document))
    console.print(LEGEND, soft_wrap=True)
    if copy:
        console.print(f"A copy of memory: {copy / 1e9:.0f} GB/s, read and written.")
    if document["kernels"]:
        console.print(f"Kernels launched: {', '.join(document['kernels'])}", soft_wrap=True)

    def show(kind: str, message: str, style: str) -> None:
        console.print(Text(f"{kind}: {message}", style=style), soft_wrap=True)

    for message in sorted({message for case in found for message in case.get("warnings", ())}):
        show("warning", message, "yellow")
    for case in found:
        if case["status"] != "right":
            where = f"{case['rows']} x {case['vocab_size']} {case['dtype']}, {case['recipe']}"
            show(case["status"], f"{where}: {case['problem']}", "bold red")
    for note in document["notes"]:
        show("note", note, "yellow")
    for problem in document["problems"]:
        show("problem", problem, "bold red")
    right = sum(case["status"] == "right" for case in found)
    console.print(f"{right} of {len(found)} cases right, {document['seconds']:.0f} s")


def _summary(document: dict[str, Any]) -> Table:
    """One row for every vocabulary and dtype."""
    found = document["cases"]
    speed = {(record["vocab_size"], record["dtype"]): record for record in document["speed"]}
    title = f"Device {document['device']}, {document['backend']} backend"
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("V", "logits", "right", "error", "torch's", "worst", "ms", "of copy", "x torch"):
        table.add_column(name, justify="left" if name == "logits" else "right", no_wrap=True)
    for key in dict.fromkeys((case["vocab_size"], case["dtype"]) for case in found):
        cases = [case for case in found if (case["vocab_size"], case["dtype"]) == key]
        times = _times(speed.get(key), document["copy_bytes_per_second"])
        table.add_row(str(key[0]), key[1], *_errors(cases), *times)
    return table


def _errors(cases: list[dict[str, Any]]) -> list[str | Text]:
    right = sum(case["status"] == "right" for case in cases)
    plain = next((case for case in cases if case["recipe"] == "plain"), {})
    worst = max((case["share_of_allowed"] for case in cases if "share_of_allowed" in case), default=None)
    return [
        Text(f"{right}/{len(cases)}", style="" if right == len(cases) else "bold red"),
        _shown(plain.get("gradient_error"), "{:.1e}"),
        _shown(plain.get("torch_gradient_error"), "{:.1e}"),
        _shown(worst, "{:.2f}"),
    ]


def _times(record: dict[str, Any] | None, copy_bytes_per_second: float | None) -> list[str]:
    if record is None:
        return ["", "", ""]
    share = record["floor_bytes"] / record["seconds"] / copy_bytes_per_second if copy_bytes_per_second else None
    faster = record["torch_seconds"] / record["seconds"]
    return [f"{record['seconds'] * 1e3:.3g}", _shown(share, "{:.0%}"), f"{faster:.2f}"]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
