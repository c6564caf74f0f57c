"""`pdl-kernels doctor --check`: what runs in which process, and what is found, as one document.

Cases run in processes of their own, several at once on a GPU, where compiling takes most of the time. A case that
crashes, or hangs, or breaks the device for its process is a finding; the cases after it run in another process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pdl_kernels import backends
from pdl_kernels.doctor import environment
from pdl_kernels.doctor.cases import Case, check_cases
from pdl_kernels.doctor.kernels import kernels_to_see
from pdl_kernels.doctor.processes import Workers

SCHEMA, VERSION = "pdl-kernels doctor check", 1
CASE_SECONDS = 120.0  # for one case, compilation included, and for the start of a process
SECONDS = 300.0  # for everything: what has not begun by then is not run
MOST_PROCESSES = 16
PROCESS_BYTES = 4 << 30  # of GPU memory that a process may need

WORKER = ("-m", "pdl_kernels.doctor.worker")  # what Python runs in a process

Numbered = tuple[int, Case]  # a case and its place in the document
Save = Callable[[dict[str, Any]], None]


class Check:
    """One run on one device. `document` can be saved at any time; it says "complete" only at the end."""

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
        self.workers = Workers(WORKER, case_seconds)
        self.save = save
        self.progress = progress
        self.interpreted = device.type == "cpu" and backends.interpreted()
        problem = backends.triton_problem(device, torch.float32)
        wants_triton = device.type == "cuda" or self.interpreted
        self.backend = "triton" if wants_triton and problem is None else "eager"
        self.cases = check_cases(device, vocabularies, interpreted=self.interpreted)
        # (vocabulary, dtype) of which the speed is measured; of interpreted kernels it would say nothing.
        groups = dict.fromkeys(case.group for case in self.cases)
        self.shapes: list[tuple[int, str]] = [] if self.interpreted else list(groups)
        self.document = _new_document(device, self.backend)
        if not wants_triton:
            self.document["notes"].append(
                "this is the eager backend; the Triton kernels run on a GPU, or, interpreted, with TRITON_INTERPRET=1"
            )
        elif problem is not None:
            self.document["problems"].append(f"the Triton backend cannot run: {problem}")
        self._started = time.monotonic()
        self._lock = threading.Lock()

    @property
    def steps(self) -> int:
        return len(self.cases) + len(self.shapes)

    def run(self) -> dict[str, Any]:
        """The document. KeyboardInterrupt ends the processes and passes through; what was found is in `document`."""
        try:
            self._check_all()
            self._measure()
        except BaseException:
            self.workers.stop()
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
            missing = sorted(kernels_to_see(self.device, self.cases) - set(document["kernels"]))
            if missing:
                document["problems"].append(f"kernels that no case launched: {', '.join(missing)}")
        self._save()

    def _save(self) -> None:
        with self._lock:
            self.document["seconds"] = round(time.monotonic() - self._started, 1)
            self.save(self.document)

    def _time_is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def _answers(self, order: dict[str, Any]) -> Iterator[dict[str, Any]]:
        return self.workers.answers({**order, "device": str(self.device), "backend": self.backend})

    # Correctness

    def _check_all(self) -> None:
        shares = shares_of(self.cases, self._process_count())
        with ThreadPoolExecutor(max(len(shares), 1)) as pool:
            try:
                for done in [pool.submit(self._check_share, share) for share in shares]:
                    done.result()
            except BaseException:
                self.workers.stop()  # before the pool waits for its threads
                raise

    def _process_count(self) -> int:
        if self.device.type != "cuda":
            return 1  # torch's threads take all cores anyway
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(cores, MOST_PROCESSES, free // PROCESS_BYTES))

    def _check_share(self, cases: list[Numbered]) -> None:
        """These cases, one after the other, in as many processes as it takes."""
        while cases:
            if self.workers.stopped or self._time_is_over():
                reason = "it was interrupted" if self.workers.stopped else "the time was over"
                for number, case in cases:
                    self._record(number, case, {"status": "not run", "problem": reason})
                return
            cases = cases[self._check_in_one_process(cases) :]

    def _check_in_one_process(self, cases: list[Numbered]) -> int:
        """How many of these cases have a record after it: at least one, even if the process ended at once."""
        begun = ended = 0
        died = "the process ended without an answer"
        for answer in self._answers({"cases": [list(case) for _, case in cases]}):
            if "begin" in answer:
                begun += 1
            elif "end" in answer:
                self._record(*cases[ended], answer["record"])
                ended += 1
                if self._time_is_over():
                    break
            else:
                died = answer["died"]
        if begun > ended or ended == 0:  # it ended in the middle of a case, or before the first one
            self._record(*cases[ended], {"status": "failed", "problem": died})
            ended += 1
        return ended

    def _record(self, number: int, case: Case, found: dict[str, Any]) -> None:
        with self._lock:
            self.document["cases"].append({"number": number, **case._asdict(), **found})
        self.progress(1)
        self._save()

    # Speed

    def _measure(self) -> None:
        """In one process, alone on the device, after the kernels have been compiled."""
        if self.shapes and not self._time_is_over():
            self._time_shapes()
        missing = len(self.shapes) - len(self.document["speed"])
        if missing and self._time_is_over():
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
                if self._time_is_over():
                    break
            elif "died" in answer:
                self.document["problems"].append(f"measuring ended early: {answer['died']}")


def is_right(document: dict[str, Any]) -> bool:
    """Whether everything ran and nothing was wrong."""
    found = document["cases"]
    return bool(found) and not document["problems"] and all(case["status"] == "right" for case in found)


def _new_document(device: torch.device, backend: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": False,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "seconds": None,
        "device": str(device),
        "backend": backend,
        "problems": [],
        "notes": [],  # what was not looked at
        "kernels": [],
        "cases": [],
        "copy_bytes_per_second": None,
        "speed": [],
        "installation": environment.report(),
    }


def shares_of(cases: list[Case], processes: int) -> list[list[Numbered]]:
    """Numbered cases for each process. Those that share kernels stay together, and shares are about equal."""
    groups: dict[tuple[int, str, str], list[Numbered]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(case.kernels, []).append((number, case))
    shares: list[list[Numbered]] = [[] for _ in range(min(processes, len(groups)))]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares
