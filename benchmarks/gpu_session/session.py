"""Runs the stages one after another: each a process group with a time limit, whatever became of those before it."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.paths import KIT_SITE, PEERS_SITE, cache_of
from benchmarks.gpu_session.report import readme
from benchmarks.gpu_session.stages import Stage
from pdl_kernels.doctor.processes import kill_group
from pdl_kernels.weights.files import replace_file

ROOT = Path(__file__).resolve().parents[2]
MOST_WORKERS = 16
LEAST_SECONDS = 5.0  # a stage that has less left is not begun
LAST_WORDS_SECONDS = 3.0  # of a stage whose time is over: from its interruption to its end
LEAST_REHEARSAL = 150  # seconds of a stage of a rehearsal, which has a slower machine and no call that ends
TAIL_LINES = 12  # of a failed stage's output, on the terminal
PASSED = ("passed", "passed again")  # the second: what failed at first passed when it ran again


class Session:
    """`records` has one entry per stage: name, status, problem, seconds.

    In the output folder: session.log (what every stage printed), session.json, README.md, results.tar.gz, which unpacks
    to benchmarks/results/<device>. Nothing there is left half written, and what cannot be written there is said.
    """

    def __init__(
        self, out: Path, kit: Path | None, stages: tuple[Stage, ...], *, rehearsal: bool, seconds: float,
        say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.out = out
        self.kit = kit
        self.stages = stages
        self.rehearsal = rehearsal
        self.say = say
        self.facts: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.interrupted = False
        self._deadline = time.monotonic() + seconds
        self._work = Path(tempfile.mkdtemp(prefix="pdl-kernels-session-"))
        self._results = self._work / "results"
        self._results.mkdir()
        self._began = time.strftime("%Y-%m-%dT%H:%M:%S")

    @property
    def passed(self) -> bool:
        """Whether every stage about correctness that could run did pass."""
        judged = {stage.name for stage in self.stages if stage.correctness}
        ran = [record for record in self.records if record["name"] in judged and record["status"] != "skipped"]
        return bool(ran) and all(record["status"] in PASSED for record in ran) and not self.interrupted

    def run(self) -> None:
        """All stages. Ctrl-C ends the one that runs and leaves out the others; what was found is kept."""
        try:
            for number, stage in enumerate(self.stages, 1):
                reason = "interrupted" if self.interrupted else self._not_run(stage)
                skipped = None if reason else self._skipped(stage)
                if reason or skipped:
                    status = "not run" if reason else "skipped"
                    record = {"name": stage.name, "status": status, "problem": reason or skipped, "seconds": 0.0}
                else:
                    self.say(f"[{number}/{len(self.stages)}] {stage.name}: {stage.answers}")
                    record = self._run(stage)
                self.records.append(record)
                self.say(
                    f"    {record['status']}, {record['seconds']:.0f} s"
                    + f": {record['problem']}" * bool(record["problem"])
                )
                if stage.name == "prepare":
                    self._read_facts()
                self._keep()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _read_facts(self) -> None:
        try:
            self.facts = json.loads((self._work / "facts.json").read_text())
        except (OSError, ValueError):
            self.facts = {"problem": "the stage prepare did not end, so that nothing is known of the GPU"}

    def _not_run(self, stage: Stage) -> str | None:
        if stage.name != "prepare" and self.facts.get("problem"):
            return str(self.facts["problem"])
        if self._deadline - time.monotonic() < LEAST_SECONDS:
            return "the time of the session was over"
        return None

    def _skipped(self, stage: Stage) -> str | None:
        """Why a stage has nothing to answer on this machine; a rehearsal runs all of them."""
        if self.rehearsal:
            return None
        if stage.kit and not self.facts.get("kit_triton"):
            return "no offline kit with another Triton was given"
        if stage.name == "compile" and self.facts.get("kit_cache"):
            return "the compiled cache was brought along"
        if stage.tool and shutil.which(stage.tool) is None:
            return f"{stage.tool} is not on the PATH"
        if stage.distribution:
            try:
                metadata.distribution(stage.distribution)
            except metadata.PackageNotFoundError:
                return f"{stage.distribution} is not installed: pip install --no-deps {stage.distribution}"
        return None

    # One stage

    def _run(self, stage: Stage) -> dict[str, Any]:
        start = time.monotonic()
        limit = max(stage.seconds, LEAST_REHEARSAL) if self.rehearsal else stage.seconds
        end = min(start + limit, self._deadline)
        command = stage.rehearsal if self.rehearsal else stage.command
        output = self._work / "output.txt"
        status, problem = "passed", None
        try:
            code = self._process(stage, command, output, end)
            if code == 1 and stage.again is not None and not self.rehearsal:
                code = self._process(stage, stage.again, output, end)
                status = "passed again"
            if code != 0:
                status, problem = "failed", _described(code)
        except subprocess.TimeoutExpired:
            status, problem = "failed", f"it did not end within {end - start:.0f} s"
        except KeyboardInterrupt:
            status, problem, self.interrupted = "failed", "interrupted", True
        except OSError as error:
            status, problem = "failed", f"it could not be started: {error}"
        self._log(stage, command, output, status, problem)
        return {"name": stage.name, "status": status, "problem": problem, "seconds": round(time.monotonic() - start, 1)}

    def _process(self, stage: Stage, command: str, output: Path, end: float) -> int:
        """Its exit status; TimeoutExpired after its group was killed.

        A little before that it is interrupted, on which our programs write and print what they have found.
        """
        variables, arguments = self._arguments(command)
        with open(output, "ab") as file:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env={**self._environment(stage), **variables}, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(max(end - LAST_WORDS_SECONDS - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(end - time.monotonic(), 0.1))
                raise
            finally:
                kill_group(process, LEAST_SECONDS)

    def _arguments(self, command: str) -> tuple[dict[str, str], list[str]]:
        workers = min(os.cpu_count() or 1, MOST_WORKERS)
        values = {
            "python": sys.executable, "results": self._results, "work": self._work, "workers": workers,
            "kit": self.kit or "", "cache": cache_of(self.facts.get("kit_triton")),
        }  # fmt: skip
        words = [word.format(**values) for word in shlex.split(command)]
        variables = {}
        while "=" in words[0] and not words[0].startswith("-"):
            name, _, variables[name] = words.pop(0).partition("=")
        return variables, [word for word in words if word]

    def _environment(self, stage: Stage) -> dict[str, str]:
        with_kit = stage.kit and bool(self.facts.get("kit_triton"))
        paths = [KIT_SITE] if with_kit else [PEERS_SITE] if PEERS_SITE.is_dir() else []
        version = self.facts.get("kit_triton" if with_kit else "triton")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])),
            "PYTHONUNBUFFERED": "1",
            "PYTHON": sys.executable,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        if version and not self.rehearsal:
            environment["TRITON_CACHE_DIR"] = str(cache_of(version))
        return environment

    # What is kept

    def _log(self, stage: Stage, command: str, output: Path, status: str, problem: str | None) -> None:
        text = output.read_bytes() if output.exists() else b""
        output.unlink(missing_ok=True)
        header = f"\n{'=' * 100}\n{stage.name}: {status}{f', {problem}' if problem else ''}\n{command}\n{'=' * 100}\n"
        with self._whatever_the_disk_says("session.log"), open(self.out / "session.log", "ab") as log:
            log.write(header.encode() + text)
        if status == "failed":
            for line in text.decode(errors="replace").splitlines()[-TAIL_LINES:]:
                self.say(f"    | {line[:200]}")

    def _keep(self) -> None:
        """The state of the session, after every stage."""
        summary = {
            "date": self._began, "rehearsal": self.rehearsal, "facts": self.facts, "passed": self.passed,
            "stages": [{**record, "answers": stage.answers, "limit": stage.seconds}
                       for record, stage in zip(self.records, self.stages, strict=False)],
        }  # fmt: skip
        state = json.dumps(summary, indent=1).encode() + b"\n"
        text = readme(summary, self._results).encode()
        folder = f"benchmarks/results/{self.facts.get('folder', 'unknown')}"
        with self._whatever_the_disk_says("session.json"):
            replace_file(self.out / "session.json", state)
        with self._whatever_the_disk_says("README.md"):
            replace_file(self.out / "README.md", text)
        with self._whatever_the_disk_says("results.tar.gz"):
            replace_file(self.out / "results.tar.gz", self._packed(folder, {"README.md": text, "session.json": state}))

    def _packed(self, folder: str, extra: dict[str, bytes]) -> bytes:
        """Every result, by the name it has in the repository; files in a folder of the device's name lie at the top."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path in sorted(self._results.rglob("*")):
                if path.is_file():
                    archive.add(path, arcname=f"{folder}/{path.name}")
            for name, content in extra.items():
                entry = tarfile.TarInfo(f"{folder}/{name}")
                entry.size = len(content)
                entry.mtime = int(time.time())
                archive.addfile(entry, io.BytesIO(content))
        return packed.getvalue()

    @contextlib.contextmanager
    def _whatever_the_disk_says(self, what: str) -> Any:
        try:
            yield
        except OSError as error:
            self.say(f"    {self.out / what} cannot be written ({error.strerror or error}); going on")


def _described(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit status {code}"
