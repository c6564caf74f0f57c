"""docs/evidence.md: its prose is written by hand, its tables, plots and texts are generated between marks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.errors import UserError
from benchmarks.quality.intervals import estimate
from benchmarks.quality.report.comparisons import Answer, answers
from benchmarks.quality.report.evidence import TaskEvidence, load_task, readings
from benchmarks.quality.report.plots import plot_frontier, plot_nll
from benchmarks.quality.report.tables import (
    accuracy_table,
    every_measure,
    learning_rates,
    main_table,
    question_table,
    shown_readings,
)
from benchmarks.quality.scoring import BUCKETS
from benchmarks.quality.tasks import OFFLINE, TASKS
from pdl_kernels.weights.files import replace_file

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "evidence.md"
TABLES = ROOT / "docs" / "evidence_tables.md"
MARK = re.compile(r"(<!-- generated: (?P<name>[^>]*?) -->\n)(?P<content>.*?)(<!-- end -->)", re.DOTALL)


def write_report(folder: Path) -> None:
    """Summary, plots, and the generated parts of the pages."""
    evidences = load(folder)
    found = [answer for evidence in evidences for answer in answers(evidence)]
    summary = json.dumps(summarise(evidences, found), indent=1) + "\n"
    replace_file(folder / "summary.json", summary.encode())
    plot_frontier(evidences, folder / "frontier.png")
    plot_frontier(evidences, folder / "frontier_sampled.png", modes=("sampled",))
    plot_nll(evidences, folder / "nll.png")
    for page in (PAGE, TABLES):
        replace_file(page, fill(page.read_text(), blocks(evidences, found)).encode())


def load(folder: Path, tasks: Sequence[str] = OFFLINE) -> list[TaskEvidence]:
    evidences = [evidence for task in tasks if (evidence := load_task(folder, task)) is not None]
    if not evidences:
        raise UserError(f"{folder} has no records of a task with every arm: python -m benchmarks.quality makes them")
    return evidences


def blocks(evidences: Sequence[TaskEvidence], found: Sequence[Answer]) -> dict[str, Callable[[], str]]:
    """The generated parts by name; each is made only if a page asks for it."""
    made: dict[str, Callable[[], str]] = {
        "learning rates": lambda: learning_rates(evidences),
        "data": lambda: "\n".join(map(describe, evidences)) + "\n",
        "cost": lambda: cost(evidences),
    }
    for evidence in evidences:
        of_task = [answer for answer in found if answer.task == evidence.name]
        made[f"{evidence.name} main"] = lambda evidence=evidence: main_table(evidence)
        made[f"{evidence.name} samples"] = lambda evidence=evidence: samples(evidence)
        made[f"{evidence.name} accuracy"] = lambda evidence=evidence: accuracy_table(evidence)
        for mode in ("greedy", "sampled"):
            made[f"{evidence.name} all {mode}"] = lambda evidence=evidence, mode=mode: every_measure(evidence, mode)
        for question in ("natural", "adjusted", "equal quality", "equal diversity", "straight lines", "undone"):
            for mode in ("greedy", "sampled", ""):
                name = f"{evidence.name} {question} {mode}".strip() + ("" if mode else " nll")
                made[name] = lambda of_task=of_task, question=question, mode=mode: question_table(
                    of_task, question, mode
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
    lines = []
    for evidence in evidences:
        stages: dict[str, float] = {}
        for run in evidence.runs.values():
            for stage, seconds in run["seconds"].items():
                stages[stage] = stages.get(stage, 0) + seconds
        first = evidence.document["environment"]
        packages = ", ".join(f"{name} {version}" for name, version in first["packages"].items())
        commits, devices = (
            ", ".join(sorted({run["environment"][what] for run in evidence.runs.values()}))
            for what in ("commit", "device")
        )
        seconds_before = evidence.document["seconds"]
        before = "seconds not recorded" if seconds_before is None else f"{seconds_before:,.0f} s"
        spent = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in stages.items())
        lines.append(
            f"- {evidence.name}: {len(evidence.runs)} models, seeds {', '.join(map(str, evidence.seeds))}; {spent}; "
            f"{before} for data and frozen layers. {devices}; {first['threads']} "
            f"thread(s) a process, {first['compute_dtype']}; {packages}; commits {commits}."
        )
    return "\n".join(lines) + "\n"


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
