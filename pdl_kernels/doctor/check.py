"""`pdl-kernels doctor --check`: orders to processes, and what they find as one document.

Cases run in processes of their own, several at once on a GPU, where compiling takes most of the time. A case that
crashes, or hangs, or breaks the device for its process is a finding; the cases after it run in another.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pdl_kernels import backends
from pdl_kernels.doctor import environment
from pdl_kernels.doctor.cases import DTYPES, Case, check_cases
from pdl_kernels.doctor.processes import Watch, kill_group

SCHEMA, VERSION = "pdl-kernels doctor check", 1
CASE_SECONDS = 120.0  # one case, compilation included; also the start of a process
SECONDS = 300.0  # everything: what has not begun by then is not run
MOST_PROCESSES = 16
PROCESS_BYTES = 4 << 30  # of GPU memory that a process may need

WORKER = ("-m", "pdl_kernels.doctor.worker")  # what Python runs in a process

Save = Callable[[dict[str, Any]], None]


class Check:
    """One run on one device. `document` is complete only at the end, and can be saved at any time."""

    def __init__(
        self,
        device: torch.device,
        vocabularies: Sequence[int] = (),
        *,
        seconds: float = SECONDS,
        case_seconds: float = CASE_SECONDS,
        save: Save = lambda document: None,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """`vocabularies` are those of `cases.VOCABULARIES` by default."""
        self.device = device
        self.deadline = time.monotonic() + seconds
        self.case_seconds = case_seconds
        self.save = save
        self.progress = progress
        self.interpreted = device.type == "cpu" and backends.interpreted()
        problem = backends.triton_problem(device, torch.float32)
        wants_triton = device.type == "cuda" or self.interpreted
        self.backend = "triton" if wants_triton and problem is None else "eager"
        self.cases = check_cases(device, vocabularies, interpreted=self.interpreted)
        # (vocabulary, dtype) whose speed is measured. Interpreted kernels have none.
        groups = dict.fromkeys(case.group for case in self.cases)
        self.shapes: list[tuple[int, str]] = [] if self.interpreted else list(groups)
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "version": VERSION,
            "complete": False,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "seconds": None,
            "device": str(device),
            "backend": self.backend,
            "problems": [f"the Triton backend cannot run: {problem}"] if wants_triton and problem else [],
            "notes": [],  # what was not looked at
            "kernels": [],
            "cases": [],
            "copy_bytes_per_second": None,
            "speed": [],
            "installation": environment.report(),
        }
        if not wants_triton:
            self.document["notes"].append(
                "this is the eager backend; the Triton kernels run on a GPU, or, interpreted, with TRITON_INTERPRET=1"
            )
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopping = False

    @property
    def steps(self) -> int:
        return len(self.cases) + len(self.shapes)

    def run(self) -> dict[str, Any]:
        """The document. KeyboardInterrupt ends the processes and passes through; what was found is in `document`."""
        try:
            shares = _shares(self.cases, self._process_count())
            with ThreadPoolExecutor(max(len(shares), 1)) as pool:
                try:
                    for done in [pool.submit(self._check, share) for share in shares]:
                        done.result()
                except BaseException:
                    self._stop()
                    raise
            self._measure()
        except BaseException:
            self._stop()
            raise
        finally:
            self._finish()
        self.document["complete"] = True
        self._save()
        return self.document

    def _finish(self) -> None:
        document = self.document
        document["cases"].sort(key=lambda record: record["number"])
        document["kernels"] = sorted({name for case in document["cases"] for name in case.get("kernels") or ()})
        if self.backend == "triton" and not self.interpreted:
            missing = sorted(_kernels_to_see(self.device, self.cases) - set(document["kernels"]))
            if missing:
                document["problems"].append(f"kernels that no case launched: {', '.join(missing)}")
        self._save()

    def _save(self) -> None:
        with self._lock:
            self.document["seconds"] = round(time.monotonic() - self._started, 1)
            self.save(self.document)

    # Correctness

    def _check(self, cases: list[tuple[int, Case]]) -> None:
        """These cases one after the other, in as many processes as it takes."""
        while cases:
            if self._stopping or time.monotonic() > self.deadline:
                reason = "it was interrupted" if self._stopping else "the time was over"
                for number, case in cases:
                    self._record(number, case, {"status": "not run", "problem": reason})
                return
            begun = done = 0
            died = None
            for answer in self._answers({"cases": [list(case) for _, case in cases]}):
                died = answer.get("died")
                if "begin" in answer:
                    begun += 1
                elif "end" in answer:
                    self._record(*cases[done], answer["record"])
                    done += 1
                    if time.monotonic() > self.deadline:
                        break  # which ends the process
            if begun > done or done == 0:  # it ended in the middle of a case, or before the first one
                problem = died or "the process ended without an answer"
                self._record(*cases[done], {"status": "failed", "problem": problem})
                done += 1
            cases = cases[done:]

    def _record(self, number: int, case: Case, found: dict[str, Any]) -> None:
        with self._lock:
            self.document["cases"].append({"number": number, **case._asdict(), **found})
        self.progress(1)
        self._save()

    def _process_count(self) -> int:
        if self.device.type != "cuda":
            return 1  # torch's threads take the cores; the interpreter compiles nothing
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(cores, MOST_PROCESSES, free // PROCESS_BYTES))

    # Speed

    def _measure(self) -> None:
        """In one process, alone on the device, after the kernels have been compiled."""
        if self.shapes and time.monotonic() <= self.deadline:
            self._time_shapes()
        missing = len(self.shapes) - len(self.document["speed"])
        if missing and time.monotonic() > self.deadline:
            self.document["notes"].append(
                f"{missing} of {len(self.shapes)} shapes were not timed: the time was over (--seconds)"
            )

    def _time_shapes(self) -> None:
        for answer in self._answers({"shapes": [list(shape) for shape in self.shapes]}):
            if "copy" in answer:
                self.document["copy_bytes_per_second"] = answer["copy"]
            elif "record" in answer:
                self.document["speed"].append(answer["record"])
                self.progress(1)
                if time.monotonic() > self.deadline:
                    break
            elif "died" in answer:
                self.document["problems"].append(f"measuring ended early: {answer['died']}")

    # Processes

    def _answers(self, order: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a process answers to the order, and last {"died": why} if it did not end well."""
        order = {**order, "device": str(self.device), "backend": self.backend}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, *WORKER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip
            self._processes.add(process)
            watch = Watch(self.case_seconds, lambda: kill_group(process))
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                try:
                    process.stdin.write(json.dumps(order))
                    process.stdin.close()
                except BrokenPipeError:
                    pass  # it ended at once; its exit status tells
                for line in process.stdout:
                    watch.restart()
                    if line.endswith("\n"):  # otherwise it was killed in the middle of it
                        yield json.loads(line)
                status = process.wait(10)
            finally:
                watch.stop()
                kill_group(process)
                self._processes.discard(process)
            if watch.expired:
                yield {"died": f"it did not end within {self.case_seconds:.0f} s"}
            elif status != 0:
                errors.seek(0)
                lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
                yield {
                    "died": f"the process ended with {_described(status)}: {lines[-1] if lines else 'no message'}"[:500]
                }

    def _stop(self) -> None:
        self._stopping = True
        for process in list(self._processes):
            kill_group(process)


def is_right(document: dict[str, Any]) -> bool:
    """Whether everything ran and nothing was wrong."""
    found = document["cases"]
    return bool(found) and not document["problems"] and all(case["status"] == "right" for case in found)


def _shares(cases: list[Case], processes: int) -> list[list[tuple[int, Case]]]:
    """Numbered cases for each process: those that share kernels stay together, and shares are about equal."""
    groups: dict[tuple[int, str, str], list[tuple[int, Case]]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(case.kernels, []).append((number, case))
    shares: list[list[tuple[int, Case]]] = [[] for _ in range(min(processes, len(groups)))]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares


def _kernels_to_see(device: torch.device, cases: list[Case]) -> set[str]:
    """All kernels of the loss; the one that holds rows on chip where the planner chooses it for one of the cases."""
    from pdl_kernels.kernels import launch, planner
    from pdl_kernels.kernels import row_kernels as kernels

    found = {name for name in vars(kernels) if name.endswith("_kernel")}
    described = launch.device_of(device)
    for case in cases:
        itemsize = DTYPES[case.dtype].itemsize
        plans = planner.plan_loss(
            case.rows, case.vocab_size, itemsize, described, launch.TRITON_VERSION,
            head=case.vocab_size * itemsize % planner.VECTOR_BYTES != 0, clusters=launch.clusters_wanted(),
        )  # fmt: skip
        if plans[0].kernel == planner.SINGLE_PASS:
            found.add("single_pass_rows_kernel")
    return found


def _described(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
