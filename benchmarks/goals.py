"""The project's goals for speed and memory, judged from recorded results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import Case
from benchmarks.results import Key, case_of, group_noise, summary, timed

Document = dict[str, Any]  # of one run
Record = dict[str, Any]  # of one operation, case and contender
Counts = Callable[[dict[str, Any], Case], bool]  # whether a goal is about this environment and case

GPU_ROWS = 4096  # from here on a GPU is bound by its memory, which the goals are about
GPU_VOCABULARIES = range(32000, 262144 + 1)
CPU_LOGITS = 24_000_000  # elements: large enough for memory, not caches or malloc's reuse, to decide
HALVES = ("bfloat16", "float16")


def _seconds(record: Record) -> float:
    return summary(record).median


def _noise(record: Record, run: Document) -> float:
    return group_noise(run).get((record["operation"], case_of(record)), 0.0)


def _extra_share(ours: Record, other: Record, run: Document) -> float | None:
    extra, of_other = ours["peak_extra_bytes"], other["peak_extra_bytes"]
    return extra / of_other if extra is not None and of_other else None


def _extra_gib(ours: Record, other: Record, run: Document) -> float | None:
    return None if ours["peak_extra_bytes"] is None else ours["peak_extra_bytes"] / 2**30


class Measure(NamedTuple):
    """What is taken of our record, the record that the goal compares it with, and the run; None says nothing."""

    unit: str
    of: Callable[[Record, Record, Document], float | None]


# fmt: off
# Of the bandwidth that the same run measured: the bytes that had to be moved per second.
READ_SHARE = Measure("{:.0%}", lambda ours, _, run: ours["floor_bytes"] / _seconds(ours) / run["bandwidth"]["read"])
COPY_SHARE = Measure("{:.0%}", lambda ours, _, run: ours["floor_bytes"] / _seconds(ours) / run["bandwidth"]["copy"])
SPEEDUP = Measure("{:.2f}x", lambda ours, other, run: _seconds(other) / _seconds(ours))
# The noise of the case counts in our favour: a smaller difference is none.
SPEEDUP_AND_NOISE = Measure("{:.2f}x", lambda ours, other, run: SPEEDUP.of(ours, other, run) * (1 + _noise(ours, run)))
TIME_SHARE = Measure("{:.2f}", lambda ours, other, run: _seconds(ours) / _seconds(other))
MEMORY_SHARE = Measure("{:.2f}", _extra_share)
MILLISECONDS = Measure("{:.1f}", lambda ours, _, run: _seconds(ours) * 1e3)
GIB = Measure("{:.1f}", _extra_gib)
MICROSECONDS = Measure("{:.0f}", lambda host, _, run: host["microseconds"]["median"])
FORWARD_LAUNCHES = Measure("{:.0f}", lambda host, _, run: host["launches_forward"])
BACKWARD_LAUNCHES = Measure("{:.0f}", lambda host, _, run: host["launches_backward"])
# fmt: on


def _h200(environment: dict[str, Any], case: Case) -> bool:
    large = case.rows >= GPU_ROWS and case.vocab_size in GPU_VOCABULARIES
    return "H200" in environment["device"] and case.dtype == "bfloat16" and large


def _h200_linear(ignored: float) -> Counts:
    goal = Case(8192, 128256, "bfloat16", hidden_size=4096, ignored=ignored)
    return lambda environment, case: "H200" in environment["device"] and case == goal


def _cpu(*dtypes: str) -> Counts:
    return lambda environment, case: (
        environment["device_type"] == "cpu" and case.dtype in dtypes and case.rows * case.vocab_size >= CPU_LOGITS
    )


def _cpu_linear(ignored: float) -> Counts:
    return lambda environment, case: environment["device_type"] == "cpu" and case.ignored == ignored


def _peer(contender: str) -> Callable[[Key], Key]:
    return lambda key: key._replace(contender=contender)


def _no_row_ignored(key: Key) -> Key:
    return key._replace(case=key.case._replace(ignored=0.0))


class Goal(NamedTuple):
    """The worst number of all cases that count is held against `target`."""

    text: str
    sign: str  # ">=" or "<="
    target: float
    measure: Measure
    counts: Counts | None  # None: the goal is about what the run says of its host
    contender: str = "pdl"
    other: Callable[[Key], Key] = lambda key: key  # the record that ours is compared with
    operation: str = "forward-backward"

    def met(self, number: float) -> bool:
        return number >= self.target if self.sign == ">=" else number <= self.target

    def shown(self, number: float) -> str:
        return self.measure.unit.format(number)

    def numbers(self, run: Document) -> dict[str, float]:
        """By the case; only those that were measured."""
        environment, host = run["environment"], run["host"]
        if self.counts is None:
            there = bool(host) and "microseconds" in host
            return {f"on {environment['cpu']}": self.measure.of(host, host, run)} if there else {}
        records = timed(run)
        numbers = {
            f"at {key.case}": self.measure.of(record, records[self.other(key)], run)
            for key, record in records.items()
            if (key.operation, key.contender) == (self.operation, self.contender)
            and self.counts(environment, key.case)
            and self.other(key) in records
        }
        return {case: number for case, number in numbers.items() if number is not None}


# fmt: off
TORCH, TORCH_LINEAR = _peer("torch"), _peer("torch linear")
LARGE = _cpu("float32", *HALVES)
GOALS = (
    Goal("H200, bf16: forward, of the read bandwidth", ">=", 0.95, READ_SHARE, _h200, operation="forward"),
    Goal("H200, bf16: forward + backward, of the 4-byte floor", ">=", 0.90, COPY_SHARE, _h200),
    Goal("H200, bf16: the same at an upstream gradient of 0.25", ">=", 0.90, COPY_SHARE, _h200,
         operation="forward-backward-scaled"),
    Goal("H200, bf16: times as fast as Liger", ">=", 2.0, SPEEDUP, _h200, other=_peer("liger")),
    Goal("H200, bf16: times as fast as torch.compile", ">=", 2.0, SPEEDUP, _h200, other=_peer("torch.compile")),
    Goal("H200, bf16: not behind QuACK, within noise", ">=", 1.0, SPEEDUP_AND_NOISE, _h200, other=_peer("quack")),
    Goal("H200, linear, 8192 x 4096 x 128256 bf16: ms", "<=", 34.0, MILLISECONDS, _h200_linear(0.0), "pdl linear"),
    Goal("H200, linear, the same: extra GiB", "<=", 1.2, GIB, _h200_linear(0.0), "pdl linear"),
    Goal("H200, linear, half the tokens ignored: ms", "<=", 18.0, MILLISECONDS, _h200_linear(0.5), "pdl linear"),
    Goal("CPU, float32: times as fast as torch", ">=", 2.0, SPEEDUP, _cpu("float32"), other=TORCH),
    Goal("CPU, 16 bits: times as fast as torch", ">=", 1.4, SPEEDUP, _cpu(*HALVES), other=TORCH),
    Goal("CPU, in place: times as fast as torch", ">=", 2.0, SPEEDUP, LARGE, "pdl in place", TORCH),
    Goal("CPU: extra memory, of torch's", "<=", 0.5, MEMORY_SHARE, LARGE, other=TORCH),
    Goal("CPU, in place: extra memory, of torch's", "<=", 0.5, MEMORY_SHARE, LARGE, "pdl in place", TORCH),
    Goal("CPU, linear: time, of torch's", "<=", 1.0, TIME_SHARE, _cpu_linear(0.0), "pdl linear", TORCH_LINEAR),
    Goal("CPU, linear: extra memory, of torch's", "<=", 0.2, MEMORY_SHARE, _cpu_linear(0.0), "pdl linear",
         TORCH_LINEAR),
    Goal("CPU, linear, half the rows ignored: time, of all rows'", "<=", 0.6, TIME_SHARE, _cpu_linear(0.5),
         "pdl linear", _no_row_ignored),
    Goal("Host: microseconds of Python per forward + backward", "<=", 160.0, MICROSECONDS, None),
    Goal("Host: launches forward", "<=", 3, FORWARD_LAUNCHES, None),
    Goal("Host: launches backward", "<=", 1, BACKWARD_LAUNCHES, None),
)
# fmt: on


class Judgement(NamedTuple):
    goal: Goal
    status: str  # "met", "missed" or "not measured"
    detail: str


def judge(documents: list[tuple[Path, Document]]) -> list[Judgement]:
    """Each goal by the newest complete run that measured it; `documents` are in the order of their dates."""
    complete = []
    for path, run in documents:
        options = run["options"]
        if run["complete"] and not options.get("quick") and options.get("pages", "fresh") == "fresh":
            complete.append((path, run))
    return [_judge(goal, complete) for goal in GOALS]


def _judge(goal: Goal, runs: list[tuple[Path, Document]]) -> Judgement:
    for path, run in reversed(runs):
        numbers = goal.numbers(run)
        if not numbers:
            continue
        case, worst = (min if goal.sign == ">=" else max)(numbers.items(), key=lambda entry: entry[1])
        detail = f"{goal.shown(worst)} {case} ({path.name})"
        if goal.met(worst):
            return Judgement(goal, "met", f"at worst {detail}")
        distance = abs(worst - goal.target) / goal.target
        missing = f"{sum(not goal.met(number) for number in numbers.values())} of {len(numbers)} cases miss it"
        return Judgement(goal, "missed", f"by {distance:.0%}: {detail}, goal {goal.shown(goal.target)}; {missing}")
    needed = "run on an H200 is recorded" if "H200" in goal.text else "recorded run has it"
    return Judgement(goal, "not measured", f"no complete {needed}")


def print_goals(judgements: list[Judgement], console: Console) -> None:
    table = Table(pad_edge=False)
    for column in ("goal", "status", "from the newest complete recorded run"):
        table.add_column(column)
    styles = {"met": "green", "missed": "red", "not measured": "yellow"}
    for goal, status, detail in judgements:
        table.add_row(f"{goal.text} {goal.sign} {goal.shown(goal.target)}", f"[{styles[status]}]{status}[/]", detail)
    console.print(table)
    console.print("[dim]Quick and interrupted runs are not counted.[/dim]")
