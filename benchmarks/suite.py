"""The run: for every case, check each contender, then time the right ones interleaved, then measure memory."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import correctness, memory
from benchmarks.bandwidth import measure_bandwidth
from benchmarks.host import measure_host
from benchmarks.inputs import Case, Inputs, make_inputs
from benchmarks.operations import Operation, Run
from benchmarks.peers import OURS
from benchmarks.peers.contender import Contender, named_error
from benchmarks.peers.pdl import backend_of, rows_are_held
from benchmarks.timing import OUT_OF_MEMORY, Lane, make_stopwatch, time_interleaved
from benchmarks.traffic import floor_bytes, floor_flops, planned_linear_memory, planned_traffic

Record = dict[str, Any]


@dataclass(frozen=True)
class SuitePlan:
    device: torch.device
    operations: list[Operation]
    cases: list[Case]
    contenders: list[Contender]  # of each kind the first one runs twice, to bound the noise
    rounds: int
    seconds: float  # for the rounds of one operation of one case, after which fewer must do
    memory_cases: list[Case]
    fresh_pages: bool  # see make_stopwatch
    host: bool  # whether Python's time per call is measured

    def contenders_of(self, case: Case) -> list[Contender]:
        return [contender for contender in self.contenders if contender.linear == case.linear]

    @property
    def steps(self) -> int:
        """Of the progress bar."""
        steps = 1 + self.host
        for case in self.cases:
            contenders = len(self.contenders_of(case))
            steps += contenders + len(self.operations) * (contenders + 1) * (self.rounds + 1)
            if self.device.type != "cuda" and case in self.memory_cases:
                steps += contenders
        return steps


@dataclass
class Watcher:
    """What the suite tells whoever watches."""

    advance: Callable[[int], None] = lambda steps: None
    describe: Callable[[str], None] = lambda text: None


def run_suite(plan: SuitePlan, document: dict[str, Any], save: Callable[[], None], progress: Watcher) -> None:
    """Fill `document`, saving after every case. KeyboardInterrupt passes through; what was measured stays."""
    stopwatch = make_stopwatch(plan.device, fresh_pages=plan.fresh_pages)
    progress.describe("bandwidth")
    document["bandwidth"] = measure_bandwidth(plan.device, stopwatch)
    progress.advance(1)
    for case in plan.cases:
        try:
            _measure_case(plan, case, document["records"], stopwatch, progress)
        finally:
            _settle(document["records"])
            _release(plan.device)
            save()
    if plan.host:
        progress.describe("Python's time per call")
        document["host"] = measure_host()
        progress.advance(1)
    document["complete"] = True
    save()


def _measure_case(
    plan: SuitePlan,
    case: Case,
    records: list[Record],
    stopwatch: Callable[[Callable[[], object]], float],
    progress: Watcher,
) -> None:
    progress.describe(f"{case}: inputs")
    inputs = make_inputs(case, plan.device)
    contenders = plan.contenders_of(case)
    overwritten = any(contender.overwrites for contender in contenders)
    scratch = torch.empty_like(inputs.logits) if overwritten else None
    fresh: dict[tuple[str, str], Record] = {}  # by operation and contender
    right: list[Run] = []
    for contender in contenders:
        progress.describe(f"{case}: checking {contender.name}")
        for record in _new_records(plan, case, contender):
            fresh[record["operation"], contender.name] = record
            records.append(record)
        run = _check(contender, inputs, scratch, plan.operations, fresh)
        right += [run] if run is not None else []
        progress.advance(1)

    for operation in plan.operations:
        progress.describe(f"{case}: {operation.name}")
        runs = [run for run in right if fresh[operation.name, run.contender.name]["status"] == "pending"]
        lanes = [Lane(run, fresh[operation.name, run.contender.name]["seconds"]) for run in runs]
        if runs and runs[0].contender is contenders[0]:
            again = fresh[operation.name, runs[0].contender.name]["again"] = []
            lanes.append(Lane(runs[0], again))
        given_up = time_interleaved(lanes, operation, plan.rounds, plan.seconds, stopwatch, progress.advance)
        for lane, error in given_up:
            record = fresh[operation.name, lane.run.contender.name]
            record.update(_failure(error), seconds=[])
            runs = [run for run in runs if run is not lane.run]
        if plan.device.type == "cuda" and case in plan.memory_cases:
            for run in runs:
                _measure_gpu_memory(run, operation, fresh[operation.name, run.contender.name])

    if plan.device.type != "cuda" and case in plan.memory_cases:
        names = [run.contender.name for run in right]
        del inputs, scratch, right, runs, lanes  # the fresh processes have inputs of their own
        gc.collect()
        for name in names:
            progress.describe(f"{case}: memory of {name}")
            peaks, problem = memory.peaks_on_cpu(name, case, torch.get_num_threads())
            for operation in plan.operations:
                fresh[operation.name, name].update(peak_extra_bytes=peaks.get(operation.name), memory_problem=problem)
            progress.advance(1)


def _new_records(plan: SuitePlan, case: Case, contender: Contender) -> list[Record]:
    made = []
    for operation in plan.operations:
        planned = planned_extra = None
        if contender.peer == OURS and case.linear:
            planned_extra = planned_linear_memory(case, operation)
        elif contender.peer == OURS:
            backend = backend_of(plan.device.type)
            held = backend == "triton" and rows_are_held(case, plan.device)
            traffic = planned_traffic(case, operation, backend=backend, inplace=contender.overwrites, held=held)
            planned = {**traffic._asdict(), "moved": traffic.moved}
        made.append(
            {
                "operation": operation.name,
                "rows": case.rows,
                "counted_rows": case.counted,
                "vocab_size": case.vocab_size,
                "dtype": case.dtype,
                "hidden_size": case.hidden_size,
                "ignored": case.ignored,
                "contender": contender.name,
                "weighted": contender.weighted,
                "overwrites_logits": contender.overwrites,
                "status": "pending",
                "problem": None,
                "seconds": [],
                "floor_bytes": 0 if case.linear else floor_bytes(case, operation),
                "floor_flops": floor_flops(case, operation),
                "planned_bytes": planned,
                "planned_extra_bytes": planned_extra,
                "peak_extra_bytes": None,
            }
        )
    return made


def _check(
    contender: Contender,
    inputs: Inputs,
    scratch: torch.Tensor | None,
    operations: list[Operation],
    records: dict[tuple[str, str], Record],
) -> Run | None:
    """The contender bound to the inputs, with verdicts noted in its records; None if nothing of it can be timed."""
    mine = {operation.name: records[operation.name, contender.name] for operation in operations}
    try:
        run = Run(contender, inputs, scratch)
        verdicts = correctness.check(run, operations)
    except Exception as error:  # a peer that fails is a result, not the end of the run
        for record in mine.values():
            record.update(_failure(error))
        del error
        _release(inputs.device)
        return None
    for name, verdict in verdicts.items():
        mine[name].update(loss_error=verdict.loss_error, gradient_error=verdict.gradient_error)
        if verdict.problem is not None:
            mine[name].update(status="wrong", problem=verdict.problem)
    return run


def _failure(error: Exception) -> Record:
    """What a record says of a contender that raised."""
    if isinstance(error, OUT_OF_MEMORY):
        return {"status": "out of memory"}
    return {"status": "failed", "problem": named_error(error)}


def _settle(records: list[Record]) -> None:
    """Nothing stays pending: an interrupted case keeps the samples that it has."""
    for record in records:
        if record["status"] == "pending":
            record["status"] = "timed" if record["seconds"] else "not timed"


def _measure_gpu_memory(run: Run, operation: Operation, record: Record) -> None:
    try:
        record["peak_extra_bytes"] = memory.peak_on_gpu(run, operation)
    except OUT_OF_MEMORY:
        torch.cuda.empty_cache()


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
