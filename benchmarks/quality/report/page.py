"""docs/evidence.md: its prose is written by hand, its tables, plots and texts are generated between marks."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.cache import explained
from benchmarks.quality.errors import UserError
from benchmarks.quality.intervals import estimate
from benchmarks.quality.products import HARDWARE
from benchmarks.quality.report.comparisons import QUESTIONS, Answer, answers
from benchmarks.quality.report.evidence import RESAMPLES, TaskEvidence, load_task, readings
from benchmarks.quality.report.plots import plot_frontier, plot_nll
from benchmarks.quality.report.tables import (
    bucket_table,
    every_measure,
    learning_rates,
    main_table,
    overview,
    question_table,
    shown_readings,
)
from benchmarks.quality.scoring import BUCKETS
from benchmarks.quality.tasks import TASKS
from pdl_kernels.weights.files import replace_file

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "benchmarks" / "results" / "quality" / "cpu"  # of the records that docs/ is about
PAGE = ROOT / "docs" / "evidence.md"
TABLES = ROOT / "docs" / "evidence_tables.md"
MODES_OF_A_TABLE = (("greedy",), ("sampled",), ("sampled", "greedy"), ())  # none where no text is written
MARK = re.compile(r"(<!-- generated: (?P<name>[^>]*?) -->\n)(?P<content>.*?)(<!-- end -->)", re.DOTALL)


def write_report(folder: Path, resamples: int = RESAMPLES) -> None:
    """Summary, plots and tables: the pages in docs/ have those of FOLDER, other folders a file tables.md."""
    evidences = load(folder, resamples)
    found = [answer for evidence in evidences for answer in answers(evidence)]
    summary = json.dumps(summarise(evidences, found), indent=1) + "\n"
    made = blocks(evidences, found)
    with explained(folder):
        replace_file(folder / "summary.json", summary.encode())
        plot_frontier(evidences, folder / "frontier.png")
        plot_frontier(evidences, folder / "frontier_sampled.png", modes=("sampled",))
        plot_nll(evidences, folder / "nll.png")
        if folder.resolve() == FOLDER.resolve():
            for page in (PAGE, TABLES):
                replace_file(page, fill(page.read_text(), made).encode())
        else:
            replace_file(folder / "tables.md", without_prose(made).encode())


def load(folder: Path, resamples: int = RESAMPLES) -> list[TaskEvidence]:
    """Every task that has records to compare."""
    evidences = [evidence for task in TASKS if (evidence := load_task(folder, task, resamples)) is not None]
    if not evidences:
        raise UserError(f"{folder} has no records of a task with every arm: python -m benchmarks.quality makes them")
    return evidences


def blocks(evidences: Sequence[TaskEvidence], found: Sequence[Answer]) -> dict[str, Callable[[], str]]:
    """The generated parts by name; each is made only if a page asks for it."""
    made: dict[str, Callable[[], str]] = {
        "overview": lambda: overview(found),
        "learning rates": lambda: learning_rates(evidences),
        "data": lambda: "\n".join(map(describe, evidences)) + "\n",
        "cost": lambda: cost(evidences),
    }
    for evidence in evidences:
        of_task = [answer for answer in found if answer.task == evidence.name]
        made[f"{evidence.name} main"] = lambda evidence=evidence: main_table(evidence)
        made[f"{evidence.name} samples"] = lambda evidence=evidence: samples(evidence)
        made[f"{evidence.name} buckets"] = lambda evidence=evidence: bucket_table(evidence)
        for mode in ("greedy", "sampled"):
            made[f"{evidence.name} all {mode}"] = lambda evidence=evidence, mode=mode: every_measure(evidence, mode)
        for question in QUESTIONS:
            for modes in MODES_OF_A_TABLE:
                name = f"{evidence.name} {question} {' '.join(modes) or 'nll'}"
                made[name] = lambda of_task=of_task, question=question, modes=modes: question_table(
                    of_task, question, *modes or ("",)
                )
    return made


def fill(page: str, made: dict[str, Callable[[], str]]) -> str:
    """The page with every generated part as it has to be."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in made:
            return f"{match[1]}\n*Not measured yet.*\n\n{match[4]}"
        return f"{match[1]}\n{made[name]()}\n{match[4]}"

    return MARK.sub(replaced, page)


def without_prose(made: dict[str, Callable[[], str]]) -> str:
    """Every generated part that has something to tell, under its name."""
    parts = {name: make() for name, make in made.items()}
    told = [f"## {name}\n\n{part}" for name, part in parts.items() if not part.startswith("|") or part.count("\n") > 2]
    return "\n".join(["# Tables of benchmarks.quality\n", *told])


def describe(evidence: TaskEvidence) -> str:
    document = evidence.document
    pairs, groups = document["pairs"], document["groups"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"- **{TASKS[evidence.name].title}**: {TASKS[evidence.name].source} ({versions}). {pairs['training']:,} pairs "
        f"to train on, {pairs['validation']} for validation and {pairs['held_out']} held out, from "
        f"{groups['training']:,}, {groups['validation']:,} and {groups['held_out']:,} groups that no two parts share; "
        f"{document['training_targets']:,} targets of {document['types']:,} types. A prompt has "
        f"{document['mean_prompt_tokens']} tokens on average, a reference {document['mean_reference_tokens']}. "
        f"Diversity is measured on {evidence.pairs:,} word pairs."
    )


def cost(evidences: Sequence[TaskEvidence]) -> str:
    """What was spent, and on which machines, with which packages and at which commits, with the number of models."""
    lines = []
    for evidence in evidences:
        runs = list(evidence.runs.values())
        stages: Counter[str] = Counter()
        for run in runs:
            stages.update(run["seconds"])
        spent = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in stages.items())
        seconds_before = evidence.document["seconds"]
        before = "seconds not recorded" if seconds_before is None else f"{seconds_before:,.0f} s"
        environments = [run["environment"] for run in runs]
        packages = [f"{name} {version}" for one in environments for name, version in one["packages"].items()]
        lines.append(
            f"- {evidence.name}: {len(runs)} models, seeds {', '.join(map(str, evidence.seeds))}; {spent}, together "
            f"{sum(stages.values()) / 3600:.1f} h of a process; {before} for data and frozen layers. "
            f"{counted(one['device'] for one in environments)}; {counted(one['threads'] for one in environments)} "
            f"thread(s) a process, {counted(one['compute_dtype'] for one in environments)}, products by "
            f"{counted(one.get('products', HARDWARE) for one in environments)}; {counted(packages)}; "
            f"commits {counted(one['commit'] for one in environments)}."
        )
    return "\n".join(lines) + "\n"


def counted(values: Iterable[Any]) -> str:
    """Each different value, with how often it came unless all came equally often."""
    found = Counter(map(str, values))
    if len(set(found.values())) == 1:
        return ", ".join(found)
    return ", ".join(f"{value} ({count})" for value, count in sorted(found.items()))


def samples(evidence: TaskEvidence) -> str:
    """The first three held-out prompts, which are in random order, with the first seed's texts."""
    parts = []
    for place, sample in enumerate(evidence.document["samples"]):
        lines = [f"{place + 1}. **Prompt**: {quoted(' / '.join(sample['prompt']))}<br>"]
        lines.append(f"   **Reference**: {quoted(sample['reference'])}")
        for reading in shown_readings(evidence):
            run = evidence.runs[reading.arm, evidence.seeds[0]]
            for mode in ("greedy", "sampled"):
                if evidence.has_texts(reading, mode):
                    text = run["texts"][f"{reading.variant} {mode}"]["texts"][place]
                    lines.append(f"   - {reading.title}, {mode}: {quoted(text)}")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def quoted(text: str) -> str:
    """One line, safe inside Markdown."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split())) or "(nothing)"


def summarise(evidences: Sequence[TaskEvidence], found: Sequence[Answer]) -> dict[str, Any]:
    """Every number of the pages, with its interval, for programs."""
    tasks = {}
    for evidence in evidences:
        rows = {}
        for reading in readings(evidence.arms):
            row: dict[str, Any] = {
                "nll": {
                    bucket or "all": rounded(estimate(evidence.nll(reading, bucket))) for bucket in (None, *BUCKETS)
                },
                "accuracy": {
                    bucket or "all": rounded(estimate(evidence.accuracy(reading, bucket)))
                    for bucket in (None, *BUCKETS)
                },
            }
            for mode in ("greedy", "sampled"):
                if evidence.has_texts(reading, mode):
                    scores = evidence.scores(reading, mode)
                    row[mode] = {measure: rounded(estimate(series)) for measure, series in scores.items()}
            rows[f"{reading.arm} {reading.variant}"] = row
        tasks[evidence.name] = {"word_pairs": evidence.pairs, "seeds": evidence.seeds, "readings": rows}
    differences = [{**asdict(answer), "estimate": rounded(answer.estimate)} for answer in found]
    return {"tasks": tasks, "differences": differences}


def rounded(one: Any) -> list[float | None]:
    """Value, low, high with six significant digits; null where there is none."""
    return [None if math.isnan(value) else float(f"{value:.6g}") for value in (one.value, one.low, one.high)]
