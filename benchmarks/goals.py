"""The project's goals for speed and memory, judged from recorded results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.results import Key, group_noise, summary, timed

Document = dict[str, Any]
Records = dict[Key, dict[str, Any]]

GPU_ROWS = 4096  # from here on a GPU is bound by its memory, which the goals are about
LINEAR_GOAL = (8192, 4096, 128256)  # rows, hidden size, V
GPU_VOCABULARIES = range(32000, 262144 + 1)
CPU_LOGITS = 24_000_000  # elements: large enough for memory, not caches or malloc's reuse, to decide
HALVES = ("bfloat16", "float16")


class Value(NamedTuple):
    where: str
    number: float


@dataclass(frozen=True)
class Goal:
    """`measure` gives one value per case of a document; the worst one counts. None of them: not measured there."""

    text: str
    target: float
    measure: Callable[[Document], list[Value]]
    at_least: bool = True
    unit: str = "{:.2f}"
    why_not: str = "no complete recorded run has it"

    def worst(self, values: list[Value]) -> Value:
        return (min if self.at_least else max)(values, key=lambda value: value.number)

    def met(self, number: float) -> bool:
        return number >= self.target if self.at_least else number <= self.target


class Judgement(NamedTuple):
    goal: Goal
    status: str  # "met", "missed" or "not measured"
    detail: str


def judge(documents: list[tuple[Path, Document]]) -> list[Judgement]:
    """Each goal by the newest complete run that measured it; `documents` are in the order of their dates."""
    complete = [
        (path, document)
        for path, document in documents
        if document["complete"]
        and not document["options"].get("quick")
        and document["options"].get("pages", "fresh") == "fresh"
    ]
    return [_judge(goal, complete) for goal in GOALS]


def _judge(goal: Goal, documents: list[tuple[Path, Document]]) -> Judgement:
    for path, document in reversed(documents):
        values = goal.measure(document)
        if not values:
            continue
        worst = goal.worst(values)
        number, target = goal.unit.format(worst.number), goal.unit.format(goal.target)
        detail = f"{number} {worst.where} ({path.name})"
        if goal.met(worst.number):
            return Judgement(goal, "met", f"at worst {detail}")
        distance = abs(worst.number - goal.target) / goal.target
        missing = sum(not goal.met(value.number) for value in values)
        return Judgement(
            goal, "missed", f"by {distance:.0%}: {detail}, goal {target}; {missing} of {len(values)} cases miss it"
        )
    return Judgement(goal, "not measured", goal.why_not)


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def _gpu_records(document: Document) -> Records:
    if "H200" not in document["environment"]["device"]:
        return {}
    return {
        key: record
        for key, record in timed(document).items()
        if key.case.dtype == "bfloat16" and key.case.rows >= GPU_ROWS and key.case.vocab_size in GPU_VOCABULARIES
    }


def _share_of(bandwidth: str, operation: str) -> Callable[[Document], list[Value]]:
    """Bytes that had to be moved per second, as a share of the bandwidth measured in the same run."""

    def measure(document: Document) -> list[Value]:
        return [
            Value(f"at {key.case}", record["floor_bytes"] / summary(record).median / document["bandwidth"][bandwidth])
            for key, record in _gpu_records(document).items()
            if (key.operation, key.contender) == (operation, "pdl")
        ]

    return measure


def _times_as_fast(records: Records, peer: str, contender: str, operation: str = "forward-backward") -> list[Value]:
    values = []
    for key, record in records.items():
        other = records.get(key._replace(contender=peer))
        if (key.operation, key.contender) == (operation, contender) and other is not None:
            values.append(Value(f"at {key.case}", summary(other).median / summary(record).median))
    return values


def _against(peer: str) -> Callable[[Document], list[Value]]:
    return lambda document: _times_as_fast(_gpu_records(document), peer, "pdl")


def _not_behind(peer: str) -> Callable[[Document], list[Value]]:
    """As `_against`, with the noise of the case in our favour: a smaller difference is none."""

    def measure(document: Document) -> list[Value]:
        records = _gpu_records(document)
        noise = group_noise(document)
        bounds = {f"at {case}": bound for (operation, case), bound in noise.items() if operation == "forward-backward"}
        values = _times_as_fast(records, peer, "pdl")
        return [value._replace(number=value.number * (1 + bounds.get(value.where, 0.0))) for value in values]

    return measure


def _cpu_records(document: Document, dtypes: tuple[str, ...]) -> Records:
    if document["environment"]["device_type"] != "cpu":
        return {}
    return {
        key: record
        for key, record in timed(document).items()
        if key.case.dtype in dtypes and key.case.rows * key.case.vocab_size >= CPU_LOGITS
    }


def _cpu_speed(contender: str, *dtypes: str) -> Callable[[Document], list[Value]]:
    return lambda document: _times_as_fast(_cpu_records(document, dtypes), "torch", contender)


def _cpu_memory(contender: str) -> Callable[[Document], list[Value]]:
    def measure(document: Document) -> list[Value]:
        records = _cpu_records(document, ("float32", *HALVES))
        values = []
        for key, record in records.items():
            other = records.get(key._replace(contender="torch"))
            if (key.operation, key.contender) != ("forward-backward", contender) or other is None:
                continue
            if record["peak_extra_bytes"] is not None and other["peak_extra_bytes"]:
                values.append(Value(f"at {key.case}", record["peak_extra_bytes"] / other["peak_extra_bytes"]))
        return values

    return measure


def _host(read: Callable[[dict[str, Any]], float]) -> Callable[[Document], list[Value]]:
    def measure(document: Document) -> list[Value]:
        host = document["host"]
        return [Value(f"on {document['environment']['cpu']}", read(host))] if host and "microseconds" in host else []

    return measure


def _linear_records(document: Document, ignored: float) -> Records:
    """Forward + backward of this package's linear loss."""
    return {
        key: record
        for key, record in timed(document).items()
        if (key.operation, key.contender) == ("forward-backward", "pdl linear") and key.case.ignored == ignored
    }


def _linear_gpu(ignored: float, read: Callable[[dict[str, Any]], float | None]) -> Callable[[Document], list[Value]]:
    def measure(document: Document) -> list[Value]:
        if "H200" not in document["environment"]["device"]:
            return []
        values = []
        for key, record in _linear_records(document, ignored).items():
            number = read(record)
            if (key.case.rows, key.case.hidden_size, key.case.vocab_size) == LINEAR_GOAL and number is not None:
                values.append(Value(f"at {key.case}", number))
        return values

    return measure


def _milliseconds(record: dict[str, Any]) -> float:
    return summary(record).median * 1e3


def _extra_gib(record: dict[str, Any]) -> float | None:
    extra = record["peak_extra_bytes"]
    return None if extra is None else extra / 2**30


def _linear_cpu_against_torch(read: Callable[[dict[str, Any]], float | None]) -> Callable[[Document], list[Value]]:
    """Our number as a share of that of F.linear + F.cross_entropy(weight=)."""

    def measure(document: Document) -> list[Value]:
        if document["environment"]["device_type"] != "cpu":
            return []
        values = []
        for key, record in _linear_records(document, 0.0).items():
            other = timed(document).get(key._replace(contender="torch linear"))
            ours, theirs = read(record), None if other is None else read(other)
            if ours is not None and theirs:
                values.append(Value(f"at {key.case}", ours / theirs))
        return values

    return measure


def _linear_half_ignored(document: Document) -> list[Value]:
    """Time with half the rows ignored, as a share of the time without."""
    if document["environment"]["device_type"] != "cpu":
        return []
    whole = _linear_records(document, 0.0)
    return [
        Value(f"at {key.case}", summary(record).median / summary(whole[all_rows]).median)
        for key, record in _linear_records(document, 0.5).items()
        if (all_rows := key._replace(case=key.case._replace(ignored=0.0))) in whole
    ]


_NO_GPU_RUN = "no complete run on an H200 is recorded"
_BANDWIDTH: dict[str, Any] = {"unit": "{:.0%}", "why_not": _NO_GPU_RUN}
_SPEED: dict[str, Any] = {"unit": "{:.2f}x", "why_not": _NO_GPU_RUN}
_CPU: dict[str, Any] = {"unit": "{:.2f}x"}
_SHARE: dict[str, Any] = {"at_least": False, "unit": "{:.2f}"}
_LINEAR_GPU: dict[str, Any] = {"at_least": False, "unit": "{:.1f}", "why_not": _NO_GPU_RUN}

GOALS = (
    Goal("H200, bf16: forward, of the read bandwidth", 0.95, _share_of("read", "forward"), **_BANDWIDTH),
    Goal(
        "H200, bf16: forward + backward, of the 4-byte floor", 0.90, _share_of("copy", "forward-backward"), **_BANDWIDTH
    ),
    Goal(
        "H200, bf16: the same at an upstream gradient of 0.25",
        0.90,
        _share_of("copy", "forward-backward-scaled"),
        **_BANDWIDTH,
    ),
    Goal("H200, bf16: times as fast as Liger", 2.0, _against("liger"), **_SPEED),
    Goal("H200, bf16: times as fast as torch.compile", 2.0, _against("torch.compile"), **_SPEED),
    Goal("H200, bf16: not behind QuACK, within noise", 1.0, _not_behind("quack"), **_SPEED),
    Goal("H200, linear, 8192 x 4096 x 128256 bf16: ms", 34.0, _linear_gpu(0.0, _milliseconds), **_LINEAR_GPU),
    Goal("H200, linear, the same: extra GiB", 1.2, _linear_gpu(0.0, _extra_gib), **_LINEAR_GPU),
    Goal("H200, linear, half the tokens ignored: ms", 18.0, _linear_gpu(0.5, _milliseconds), **_LINEAR_GPU),
    Goal("CPU, float32: times as fast as torch", 2.0, _cpu_speed("pdl", "float32"), **_CPU),
    Goal("CPU, 16 bits: times as fast as torch", 1.4, _cpu_speed("pdl", *HALVES), **_CPU),
    Goal("CPU, in place: times as fast as torch", 2.0, _cpu_speed("pdl in place", "float32", *HALVES), **_CPU),
    Goal("CPU: extra memory, of torch's", 0.5, _cpu_memory("pdl"), **_SHARE),
    Goal("CPU, in place: extra memory, of torch's", 0.5, _cpu_memory("pdl in place"), **_SHARE),
    Goal("CPU, linear: time, of torch's", 1.0, _linear_cpu_against_torch(_milliseconds), **_SHARE),
    Goal("CPU, linear: extra memory, of torch's", 0.2, _linear_cpu_against_torch(_extra_gib), **_SHARE),
    Goal("CPU, linear, half the rows ignored: time, of all rows'", 0.6, _linear_half_ignored, **_SHARE),
    Goal(
        "Host: microseconds of Python per forward + backward",
        160.0,
        _host(lambda host: host["microseconds"]["median"]),
        at_least=False,
        unit="{:.0f}",
    ),
    Goal("Host: launches forward", 3, _host(lambda host: host["launches_forward"]), at_least=False, unit="{:.0f}"),
    Goal("Host: launches backward", 1, _host(lambda host: host["launches_backward"]), at_least=False, unit="{:.0f}"),
)


def print_goals(judgements: list[Judgement], console: Console) -> None:
    table = Table(pad_edge=False)
    for column in ("goal", "status", "from the newest complete recorded run"):
        table.add_column(column)
    styles = {"met": "green", "missed": "red", "not measured": "yellow"}
    for goal, status, detail in judgements:
        sign = ">=" if goal.at_least else "<="
        text = f"{goal.text} {sign} {goal.unit.format(goal.target)}"
        table.add_row(text, f"[{styles[status]}]{status}[/]", detail)
    console.print(table)
    console.print("[dim]Quick and interrupted runs are not counted.[/dim]")
