"""The command line: measure, compare, judge.

    python -m benchmarks                       everything that is installed and fits, a table, JSON and plots
    python -m benchmarks --quick               under two minutes on two cores
    python -m benchmarks --goals               the goals, from recorded results
    python -m benchmarks --compare OLD.json [NEW.json]

Exit status: 0; 1 where this package's own contenders were wrong or failed; 2 for input that cannot be used;
130 after Ctrl-C.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import environment, peers, results, shapes
from benchmarks.compare import print_comparison
from benchmarks.goals import judge, print_goals
from benchmarks.inputs import DTYPES, Case
from benchmarks.operations import OPERATIONS
from benchmarks.plots import write_plots
from benchmarks.suite import SuitePlan, Watcher, run_suite
from benchmarks.table import make_console, print_results

RECORDED = Path(__file__).parent / "results"
ROUNDS = {"cpu": (9, 5), "cuda": (25, 11)}  # (full, quick)
SECONDS = {"cpu": (30.0, 3.0), "cuda": (3.0, 2.0)}  # (full, quick), for the rounds of one operation of one case
ABBREVIATIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class InputError(Exception):
    """Something on the command line that cannot be used; the message says what and what would be."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", help=f"comma-separated, of: {', '.join(OPERATIONS)} (default: all)")
    parser.add_argument("--loss", help="comma-separated, of: logits, linear (default: both)")
    parser.add_argument(
        "--shapes",
        help="comma-separated ROWSxVOCABULARY, such as 1024x32000, or ROWSxHIDDENxVOCABULARY for the linear loss "
        "(default: real models'); what does not fit, or belongs to a loss that --loss leaves out, is left out with its "
        "reason, and the rest is measured",
    )
    parser.add_argument("--dtypes", help=f"comma-separated, of: {', '.join(DTYPES)}")
    parser.add_argument(
        "--peers",
        help=f"comma-separated, of: {', '.join(peers.PEERS)}; or none (default: all). What cannot run is left out with "
        "its reason, and the rest is measured",
    )
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds; never counted for goals")
    parser.add_argument("--rounds", type=int, help="samples per contender, however long they take")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU (default: %(default)s)")
    parser.add_argument(
        "--pages",
        choices=("fresh", "kept"),
        default="fresh",
        help="on a CPU: whether malloc gives free pages back before every sample (default), or may keep them, which "
        "makes large temporaries cheap",
    )
    parser.add_argument(
        "--host",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Python's time per call, which takes half a minute of compilation (default: yes, but for --quick)",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--goals", action="store_true", help="judge the goals from recorded results, measure nothing")
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="JSON", help="OLD against this run, or OLD NEW without a run"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    console = make_console()
    try:
        return _main(arguments, console)
    except (InputError, results.ResultsError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.goals:
        print_goals(judge(results.recorded([RECORDED, arguments.out])), console)
        return 0
    compared = [results.load(path) for path in arguments.compare or []]
    if len(compared) > 2:
        raise InputError("--compare takes one file, or two")
    if len(compared) == 2:
        print_comparison(compared[0], compared[1], console)
        return 0
    if arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is a file; a directory is accepted")
    plan, document = prepare(arguments)
    path = results.free_path(arguments.out / environment.device_folder(plan.device), document["environment"])
    _warn(plan, document, bool(arguments.peers or arguments.shapes), console)
    interrupted = _run(plan, document, path, console)
    print_results(document, console)
    plots = write_plots(document, path)
    console.print(f"\nwritten: {', '.join(str(written) for written in [path, *plots])}", soft_wrap=True)
    if compared:
        print_comparison(compared[0], document, console)
    if interrupted:
        console.print("[yellow]interrupted: what was measured until then is above and in the file")
        return 130
    return 1 if _ours_failed(document) else 0


def prepare(arguments: argparse.Namespace) -> tuple[SuitePlan, dict[str, Any]]:
    """The plan that the arguments ask for and its empty document; InputError for what cannot be used."""
    device = _device(arguments.device)
    if arguments.threads < 1:
        raise InputError(f"--threads {arguments.threads}: at least 1 is accepted")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds}: at least 1 is accepted")
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    operations = _chosen(arguments.op, list(OPERATIONS), "--op")
    default_dtypes = shapes.default_dtypes(device, quick=quick)
    dtypes = default_dtypes if arguments.dtypes is None else _chosen(arguments.dtypes, list(DTYPES), "--dtypes")
    left_out: dict[str, str] = {}
    losses = _chosen(arguments.loss, list(peers.LOSSES), "--loss")
    cases = _cases(arguments.shapes, dtypes, losses, device, quick, left_out)
    measured = {case.loss for case in cases}
    contenders = _contenders(arguments.peers, measured, device, quick, left_out)
    rounds = arguments.rounds or ROUNDS[device.type][quick]
    seconds = float("inf") if arguments.rounds else SECONDS[device.type][quick]
    # A fresh process per contender and case takes seconds: --quick has time for one shape.
    slow_memory = quick and device.type != "cuda"
    first_shapes = {case.linear: (case.rows, case.vocab_size) for case in reversed(cases)}
    few = [case for case in cases if (case.rows, case.vocab_size) == first_shapes[case.linear]]
    memory_cases = few if slow_memory else cases
    plan = SuitePlan(
        device=device,
        operations=[OPERATIONS[name] for name in operations],
        cases=cases,
        contenders=contenders,
        rounds=rounds,
        seconds=seconds,
        memory_cases=memory_cases,
        fresh_pages=arguments.pages == "fresh",
        host=not quick and arguments.host,
    )
    options = {"quick": quick, "rounds": rounds, "operations": operations, "cases": cases, "pages": arguments.pages}
    document = results.new_document(environment.describe(device, contenders), options, left_out)
    return plan, document


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: accepted are cpu and cuda (CUDA and ROCm)")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device")
    if name == "cuda" and os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise InputError("TRITON_INTERPRET=1 is set: interpreted kernels are not worth timing; unset it")
    return torch.device(name)


def _chosen(text: str | None, accepted: list[str], option: str) -> list[str]:
    if text is None:
        return accepted
    names = [ABBREVIATIONS.get(name.strip(), name.strip()) for name in text.split(",")]
    unknown = [name for name in names if name not in accepted]
    if unknown:
        raise InputError(f"{option} {', '.join(map(repr, unknown))}: accepted are {', '.join(accepted)}")
    return list(dict.fromkeys(names))


def _cases(
    text: str | None,
    dtypes: list[str],
    losses: list[str],
    device: torch.device,
    quick: bool,
    left_out: dict[str, str],
) -> list[Case]:
    """The shapes that can be measured; the others are left out with their reasons. InputError where none is left."""
    if text is None:
        asked = shapes.default_cases(device, dtypes, quick=quick) if "logits" in losses else []
        asked += shapes.default_linear_cases(device, dtypes, quick=quick) if "linear" in losses else []
    else:
        try:
            sizes = shapes.parse_shapes(text)
        except ValueError as error:
            raise InputError(f"--shapes: {error}") from error
        asked = [Case(rows, vocab_size, dtype, hidden) for dtype in dtypes for rows, vocab_size, hidden in sizes]
    fitting = []
    for case in dict.fromkeys(asked):
        unasked = None if case.loss in losses else f"it is a shape of the {case.loss} loss, which --loss leaves out"
        reason = unasked or shapes.misfit(case, device)
        if reason is None:
            fitting.append(case)
        else:
            left_out[str(case)] = reason
    if not fitting:
        raise InputError("nothing is left to measure: " + "; ".join(f"{what}: {why}" for what, why in left_out.items()))
    return fitting


def _contenders(
    text: str | None, losses: set[str], device: torch.device, quick: bool, left_out: dict[str, str]
) -> list[peers.Contender]:
    """Those that can run. Names have to be known; who is not there, or cannot do something, is left out."""
    if text is None:
        chosen = list(peers.PEERS)
    else:
        chosen = [] if text.strip() == "none" else _chosen(text, list(peers.PEERS), "--peers")
    contenders, reasons = peers.available(device, chosen, losses, quick=quick and text is None)
    left_out.update(reasons)
    if text is not None:
        able = {contender.peer for contender in peers.CONTENDERS.values() if contender.loss in losses}
        what = " and ".join(sorted(losses))
        left_out.update({peer: f"it has nothing for the {what} loss" for peer in chosen if peer not in able})
    return contenders


def _warn(plan: SuitePlan, document: dict[str, Any], asked: bool, console: Console) -> None:
    for what, why in document["left_out"].items() if asked else ():
        console.print(f"left out: {what}: {why}", style="yellow", markup=False, soft_wrap=True)
    if plan.device.type != "cuda":
        console.print(
            f"CPU, {torch.get_num_threads()} threads: the eager backend is timed; the Triton kernels run on a CPU only "
            "in Triton's interpreter, whose time means nothing."
        )
    load = document["environment"]["load_at_start"]
    if load is not None and plan.device.type != "cuda" and load > 0.5:
        console.print(
            f"[yellow]the machine is busy (load {load:.1f}): whatever takes one of the cores delays every thread here"
        )


def _run(plan: SuitePlan, document: dict[str, Any], path: Path, console: Console) -> bool:
    """Whether it was interrupted."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Drawn between samples, not by a thread beside them: on a CPU that thread would take part in the measurement.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=plan.steps)
        watcher = Watcher(
            advance=lambda steps: bar.update(task, advance=steps, refresh=True),
            describe=lambda text: bar.update(task, description=text, refresh=True),
        )
        try:
            run_suite(plan, document, lambda: results.save(path, document), watcher)
        except KeyboardInterrupt:
            results.save(path, document)
            return True
    return False


def _ours_failed(document: dict[str, Any]) -> bool:
    ours = {name for name, contender in peers.CONTENDERS.items() if contender.peer == peers.OURS}
    return any(record["status"] in ("wrong", "failed") for record in document["records"] if record["contender"] in ours)


if __name__ == "__main__":
    sys.exit(main())
