"""Times every way to launch loss + gradient that the planner could choose, so that it can be set from measurements.

    python -m benchmarks.sweep --out benchmarks/results/h200/sweep.json        on a GPU, in less than 10 minutes

For every shape and dtype: the planner's own choice; the two-pass kernel with 8 to 32 warps and 2 to 8 vectors in
flight per thread; and the twenty best by benchmarks.ranking of the rows held on chip by clusters of 1 to 16 blocks of 4
to 16 warps with several limits on registers. Shapes come in the order of their value. One JSON record per candidate,
written as they come; a table of the best ones against the planner's choice at the end. Ctrl-C and the end of the time
keep what was measured.

Compiling is most of the time: benchmarks.compile_ahead does it beforehand, in several processes. Each record has the
number of kernels that were compiled for it all the same, and the seconds of its first launch, apart from those of the
kernel.

Exit status: 0; 2 without a GPU, or for input that cannot be used; 130 after Ctrl-C.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from triton import knobs

from benchmarks import environment
from benchmarks.arguments import at_least
from benchmarks.candidates import MOST_CANDIDATES, ROWS, planned_work
from benchmarks.inputs import DTYPES, VOCABULARIES, Case, make_inputs
from benchmarks.peers.contender import named_error
from benchmarks.results import save as save_document
from benchmarks.shapes import misfit
from benchmarks.timing import make_stopwatch, summarize, time_limit
from pdl_kernels.backends import interpreted
from pdl_kernels.kernels import launch
from pdl_kernels.kernels.planner import RowLaunch
from pdl_kernels.ops.rows import as_rows, empty_gradient
from pdl_kernels.options import LossInputs, LossOptions

WARM_UP, ROUNDS = 2, 7
SAVE_EVERY = 2.0  # seconds
CANDIDATE_SECONDS = 30.0  # at most, compilation included: up to 25 on two slow cores


@contextmanager
def planned_launch(inputs: LossInputs, gradient: torch.Tensor, plan: RowLaunch) -> Iterator[Callable[[], None]]:
    """Within, the function launches the row kernel alone, as the plan says."""
    options = LossOptions()
    with launch.planned_by(lambda *_, **__: [plan]):
        scalars, _ = launch.denominators(inputs, options)
        yield lambda: launch.loss_rows(inputs, options, scalars, gradient)


def time_candidate(
    inputs: LossInputs,
    gradient: torch.Tensor,
    plan: RowLaunch,
    stopwatch: Callable[[Callable[[], object]], float],
    limit: float,
) -> dict[str, Any]:
    """Seconds of the row kernel alone, or why there are none.

    Beside them the seconds of the first launch, which compiles unless Triton's cache has the kernel, and how many
    kernels were compiled. After `limit` seconds it is given up, or makes do with the samples that it has.
    """
    seconds: list[float] = []
    compile_seconds = 0.0
    problem = None
    with (
        planned_launch(inputs, gradient, plan) as run,
        warnings.catch_warnings(),
        counted_compilations() as compilations,
    ):
        warnings.simplefilter("ignore", UserWarning)
        start = time.perf_counter()
        try:
            with time_limit(limit):
                try:
                    run()
                finally:
                    compile_seconds = time.perf_counter() - start
                if launch.was_refused(plan, launch.device_of(inputs.logits.device)):
                    problem = "cannot be compiled"
                else:
                    for _ in range(WARM_UP):
                        stopwatch(run)
                    for _ in range(ROUNDS):
                        seconds.append(stopwatch(run))
        except Exception as error:  # a launch that the device refuses, such as a cluster of 16, is a result
            if not (seconds and isinstance(error, TimeoutError)):
                problem, seconds = named_error(error), []
    return {
        "problem": problem,
        "seconds": seconds,
        "compilations": compilations(),
        "compile_seconds": compile_seconds,
    }


@contextmanager
def counted_compilations() -> Iterator[Callable[[], int]]:
    """The function says how many kernels were compiled since, and not found in Triton's cache."""
    compiled = 0

    def count(**what: Any) -> None:
        nonlocal compiled
        compiled += not what["cache_hit"]

    with mock.patch.object(knobs.compilation, "listener", count):
        yield lambda: compiled


def new_document(device: torch.device) -> dict[str, Any]:
    return {
        "triton": triton.__version__,
        "environment": environment.describe(device, []),
        "complete": False,
        "compilations": 0,
        "compile_seconds": 0.0,  # of all first launches
        "left_out": {},  # shapes, with their reasons
        "records": [],
    }


def sweep(
    work: list[tuple[Case, RowLaunch]],  # of `planned_work`
    device: torch.device,
    seconds: float,
    document: dict[str, Any],
    save: Callable[[], None],
    candidate_seconds: float = CANDIDATE_SECONDS,
) -> None:
    """Fill `document`, saving every few seconds and at the end. KeyboardInterrupt passes through."""
    deadline = time.monotonic() + seconds
    stopwatch = make_stopwatch(device)
    saved = time.monotonic()
    done = 0  # or left out
    with tqdm(total=len(work), desc="sweep", unit="candidate") as progress:
        try:
            for case, group in groupby(work, key=lambda entry: entry[0]):
                if time.monotonic() > deadline:
                    return
                progress.set_postfix_str(str(case))
                plans = [plan for _, plan in group]
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # of the shape before
                reason = misfit(case, device)
                if reason is not None:
                    document["left_out"][str(case)] = reason
                    done += len(plans)
                    progress.update(len(plans))
                    continue
                for record in _timed(case, plans, device, stopwatch, deadline, candidate_seconds):
                    document["records"].append(record)
                    document["compilations"] += record["compilations"]
                    document["compile_seconds"] += record["compile_seconds"]
                    done += 1
                    progress.update()
                    if time.monotonic() - saved > SAVE_EVERY:
                        save()
                        saved = time.monotonic()
        finally:  # also after Ctrl-C and at the end of the time
            document["complete"] = done == len(work)
            if document["records"] or document["left_out"]:
                save()


def _timed(
    case: Case,
    plans: list[RowLaunch],
    device: torch.device,
    stopwatch: Callable[[Callable[[], object]], float],
    deadline: float,
    candidate_seconds: float,
) -> Iterator[dict[str, Any]]:
    """A record of each plan, of which the first is the planner's, until the time is over."""
    made = make_inputs(case, device)
    logits = as_rows(made.logits)
    inputs = LossInputs(logits, made.targets, made.weights, None, None)
    gradient = empty_gradient(logits)
    for number, plan in enumerate(plans):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        timed = time_candidate(inputs, gradient, plan, stopwatch, min(candidate_seconds, left))
        yield {**case._asdict(), "plan": plan._asdict(), "planned": number == 0, **timed}


def best(records: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(shape, the planner's record, the fastest one) of every shape whose planned launch was timed."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["seconds"]:
            shapes.setdefault(f"{record['rows']} x {record['vocab_size']} {record['dtype']}", []).append(record)
    found = []
    for name, timed in shapes.items():
        planned = next((record for record in timed if record["planned"]), None)
        if planned is not None:
            found.append((name, planned, min(timed, key=lambda record: summarize(record["seconds"]).median)))
    return found


def print_best(records: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="loss + gradient: the planner's choice and the fastest candidate")
    for column in ("shape", "planned", "GB/s", "fastest", "GB/s"):
        table.add_column(column, justify="right" if column == "GB/s" else "left")
    for name, planned, fastest in best(records):
        table.add_row(name, *_shown(planned), *_shown(fastest))
    console.print(table)


def _shown(record: dict[str, Any]) -> tuple[str, str]:
    plan = record["plan"]
    shape = f"{plan['kernel']}, {plan['ctas']} x {plan['warps']} warps, {plan['registers']} registers"
    moved = 2 * record["rows"] * record["vocab_size"] * DTYPES[record["dtype"]].itemsize
    return shape, f"{moved / summarize(record['seconds']).median / 1e9:.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bfloat16", "float32", "float16"])
    parser.add_argument("--vocabularies", nargs="+", type=at_least(2), default=list(VOCABULARIES))
    parser.add_argument("--rows", nargs="+", type=at_least(1), default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=540.0, help="stop after so many (default: %(default)s)")
    parser.add_argument(
        "--candidate-seconds",
        type=float,
        default=CANDIDATE_SECONDS,
        help="give one up after so many (default: %(default)s)",
    )
    parser.add_argument(
        "--candidates",
        type=at_least(0),
        default=MOST_CANDIDATES,
        help="of a shape, beside the planner's, the best by benchmarks.ranking (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="every candidate, which takes an hour")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: under TRITON_INTERPRET=1, to rehearse; its times mean nothing",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; an existing one is refused")
    chosen = parser.parse_args(arguments)
    problem = _problem(chosen)
    if problem is not None:
        print(f"python -m benchmarks.sweep: {problem}", file=sys.stderr)
        return 2
    if chosen.device == "cpu":
        print("a rehearsal: interpreted kernels have no speed, and the times mean nothing")
    device = torch.device(chosen.device)
    most = None if chosen.all else chosen.candidates
    described = launch.device_of(device)
    work = planned_work(chosen.dtypes, chosen.vocabularies, chosen.rows, described, launch.TRITON_VERSION, most)
    document = new_document(device)
    status = 0
    try:
        sweep(
            work,
            device,
            chosen.seconds,
            document,
            lambda: save_document(chosen.out, document),
            chosen.candidate_seconds,
        )
    except KeyboardInterrupt:
        status = 130
    print_best(document["records"], Console())
    for what, reason in document["left_out"].items():
        print(f"left out: {what}: {reason}")
    print(
        f"{len(document['records'])} of {len(work)} candidates; compiled: {document['compilations']}; "
        f"first launches took {document['compile_seconds']:.1f} s"
    )
    return status


def _problem(chosen: argparse.Namespace) -> str | None:
    """Why the sweep cannot begin, or None."""
    if chosen.device == "cpu" and not interpreted():
        return "--device cpu is for rehearsals under TRITON_INTERPRET=1"
    if chosen.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU, and interpreted kernels have no speed"
    if chosen.device == "cuda" and interpreted():
        return "TRITON_INTERPRET=1 is set: interpreted kernels have no speed; unset it"
    if chosen.out.exists():
        return f"--out {chosen.out} exists; name another file"
    return None


if __name__ == "__main__":
    sys.exit(main())
