"""Compiles, without a GPU, what a session on one will launch: into Triton's cache, in several processes.

    python -m benchmarks.compile_ahead --cache /tmp/pdl-kernels-cache/triton-3.9.0 --processes 2

What it compiles is what the package would launch for `pdl-kernels doctor --check` (whose kernels the
benchmark of the loss shares) and for the sweep; nothing is launched. Triton finds an entry again if its own version and
build, the kernels' source and the target are the same, and if the cache lies at the same path: it holds absolute ones.

Exit status: 0; 1 where something could not be compiled, apart from candidates of the sweep; 2 for wrong arguments.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are defined: interpreted ones cannot be compiled

import torch
import triton
from tqdm import tqdm

from benchmarks import candidates, inputs, sweep
from benchmarks.gpu_session.paths import cache_of
from benchmarks.peers.contender import named_error
from benchmarks.results import write_record
from benchmarks.roofline.compile import compiled_launches, described_device, public_calls_take_any_tensor
from pdl_kernels import backends
from pdl_kernels.doctor import correctness
from pdl_kernels.doctor.cases import RECIPES, Case, cases_for
from pdl_kernels.kernels import launch
from pdl_kernels.kernels.planner import RowLaunch
from pdl_kernels.ops.rows import empty_gradient
from pdl_kernels.options import LossInputs

TARGET = "sm_90"
DEVICE = described_device(TARGET, cache_known=True)
PROCESSES = 16
PARTS = ("doctor", "sweep")
SWEPT = ("bfloat16", "float32")  # what the session sweeps; float16 is like bfloat16


class Work(NamedTuple):
    """Something that launches kernels."""

    name: str
    vocab_size: int
    run: Callable[[], None]
    may_fail: bool = False  # a candidate of the sweep that cannot be compiled is a result of it


def default_cache() -> Path:
    """Where this Triton's entries belong."""
    return cache_of(triton.__version__)


def all_work(parts: list[str], vocabularies: list[int] | None = None) -> list[Work]:
    """Everything, what takes longest to compile first."""
    found: list[Work] = []
    if "doctor" in parts:
        cases = cases_for(DEVICE.multiprocessors, vocabularies or ())
        found += [Work(str(case), case.vocab_size, lambda case=case: compile_doctor_case(case)) for case in cases]
    if "sweep" in parts:
        chosen = candidates.planned_work(
            list(SWEPT), vocabularies or list(inputs.VOCABULARIES), [candidates.ROWS[0]], DEVICE,
            launch.TRITON_VERSION,
        )  # fmt: skip
        found += [
            Work(
                f"{case}, {plan.ctas} x {plan.warps} warps",
                case.vocab_size,
                lambda c=case, p=plan: compile_plan(c, p),
                True,
            )
            for case, plan in chosen
        ]
    return sorted(found, key=lambda work: -work.vocab_size)


def compile_doctor_case(case: Case) -> None:
    """The calls of `doctor --check`, on tensors without memory where no number has to be known."""
    recipe = RECIPES[case.recipe]
    problem = correctness.make_problem(case, torch.device("cpu" if recipe.linear else "meta"))
    call = correctness.make_call(problem, recipe, correctness.make_upstream(problem, recipe), "triton")
    with correctness.reading_twice(recipe.read_twice):
        call()


def compile_plan(case: inputs.Case, plan: RowLaunch) -> None:
    """The launch that the sweep times."""
    logits = torch.empty(1, case.rows, case.vocab_size, dtype=inputs.DTYPES[case.dtype], device="meta")
    given = LossInputs(
        logits, logits.new_empty(case.rows, dtype=torch.int64), logits.new_empty(case.vocab_size, dtype=torch.float32),
        None, None,
    )  # fmt: skip
    with sweep.planned_launch(given, empty_gradient(logits), plan) as run:
        run()


@contextmanager
def nothing_launched() -> Iterator[Callable[[], int]]:
    """Within, kernels are compiled for TARGET; the function says how many were, and not found in the cache."""
    with (
        compiled_launches(TARGET, cache_known=True),
        public_calls_take_any_tensor(),
        mock.patch.object(backends, "is_traced", return_value=False),  # as it is with the device's tensors
        mock.patch.object(torch, "autocast", return_value=nullcontext()),  # there is none for "meta"
        sweep.counted_compilations() as compilations,
    ):
        yield compilations


def compile_share(work: list[Work]) -> Iterator[dict[str, Any]]:
    """A record for each: its name, seconds, compilations, and what went wrong."""
    for one in work:
        start = time.perf_counter()
        problem = None
        with nothing_launched() as compilations, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                one.run()
            except Exception as error:  # whatever the compiler raises
                problem = named_error(error)
            yield {
                "name": one.name,
                "seconds": time.perf_counter() - start,
                "compilations": compilations(),
                "problem": problem,
                "may_fail": one.may_fail,
            }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compile_ahead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, PROCESSES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vocabularies", nargs="+", type=int, help="default: those that the parts use")
    parser.add_argument("--most", type=int, help="so many calls alone, for a rehearsal")
    parser.add_argument("--json", type=Path, help="also write the records, and the total, here")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # NUMBER/PROCESSES, of a process started by this program
    chosen = parser.parse_args(arguments)
    if chosen.processes < 1:
        parser.error(f"--processes {chosen.processes}: at least 1 is accepted")
    os.environ["TRITON_CACHE_DIR"] = str(chosen.cache)
    work = all_work(chosen.parts, chosen.vocabularies)[: chosen.most]
    if chosen.share:
        number, processes = map(int, chosen.share.split("/"))
        for record in compile_share(work[number::processes]):
            print(json.dumps(record), flush=True)
        return 0
    start = time.perf_counter()
    records = list(tqdm(_in_processes(chosen), total=len(work), desc="compiling", unit="call", leave=False))
    failed = [record for record in records if record["problem"] and not record["may_fail"]]
    for record in failed:
        print(f"{record['name']}: {record['problem']}")
    if len(records) < len(work):
        print(f"{len(work) - len(records)} calls were not compiled: a process ended early")
    total = {
        "triton": triton.__version__,
        "calls": len(records),
        "compilations": sum(record["compilations"] for record in records),
        "not compilable": sum(bool(record["problem"]) for record in records),
        "seconds": time.perf_counter() - start,
        "compiler_seconds": sum(record["seconds"] for record in records),
    }
    print(
        ", ".join(
            f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in total.items()
        )
    )
    if chosen.json:
        write_record(chosen.json, {**total, "records": records})
    return 1 if failed or len(records) < len(work) else 0


def _in_processes(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of all shares as they come."""
    command = [sys.executable, "-m", "benchmarks.compile_ahead", "--cache", str(chosen.cache), "--parts", *chosen.parts]
    if chosen.vocabularies:
        command += ["--vocabularies", *map(str, chosen.vocabularies)]
    if chosen.most is not None:
        command += ["--most", str(chosen.most)]
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found.put(json.loads(line))
        process.wait()
        found.put(None)

    processes = [
        subprocess.Popen([*command, "--share", f"{number}/{chosen.processes}"], stdout=subprocess.PIPE, text=True)
        for number in range(chosen.processes)
    ]
    try:
        for process in processes:
            threading.Thread(target=listen, args=(process,), daemon=True).start()
        running = len(processes)
        while running:
            record = found.get()
            if record is None:
                running -= 1
            else:
                yield record
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
