"""Markdown tables. Half the width of the 95 % interval follows a number; bold: the interval is on one side of 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.quality.arms import ARMS
from benchmarks.quality.intervals import Estimate, estimate, excludes_zero
from benchmarks.quality.report.comparisons import Answer
from benchmarks.quality.report.evidence import Reading, TaskEvidence, readings
from benchmarks.quality.scoring import BUCKETS

TITLES = {
    "own_rouge_l": "ROUGE-L above chance",
    "rouge_l": "ROUGE-L",
    "cut_rouge_l": "ROUGE-L, cut",
    "chrf": "chrF",
    "cut_chrf": "chrF, cut",
    "rare_precision": "rare words: precision",
    "rare_recall": "rare words: recall",
    "rare_f1": "rare words: F1",
    "cut_rare_f1": "rare words: F1, cut",
    "diversity": "distinct pairs",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "expectation_adjusted": "EAD",
    "unique_words": "unique words",
    "zipf_slope": "Zipf slope",
    "self_bleu": "self-BLEU",
    "repetition": "repetition",
    "words": "words",
    "ended": "ended",
    "in_source": "content words in the source",
}
PER_CENT = (
    "own_rouge_l",
    "rouge_l",
    "cut_rouge_l",
    "rare_precision",
    "rare_recall",
    "rare_f1",
    "cut_rare_f1",
    "diversity",
)
PER_CENT += ("distinct_1", "distinct_2", "distinct_3", "repetition", "ended", "in_source")
BY_CURVE = ("equal quality", "equal diversity", "straight lines")  # questions with a column for each baseline
WHOLE = ("unique_words",)
TWO_PLACES = ("zipf_slope", "expectation_adjusted")


def number(measure: str, one: Estimate, signed: bool = False, bold: bool = True) -> str:
    """The value and half of its interval, in the measure's unit."""
    factor, places = (100, 1) if measure in PER_CENT else (1, 1)
    if measure in WHOLE:
        places = 0
    if measure in TWO_PLACES or measure.startswith("nll"):
        places = 2
    if math.isnan(one.value):
        return "n/a"
    sign = "+" if signed else ""
    text = f"{factor * one.value:{sign},.{places}f}".replace("-", "\N{MINUS SIGN}")
    if math.isnan(one.low):
        return text
    text += f" ±{factor * (one.high - one.value):,.{places}f}"
    return f"**{text}**" if signed and bold and excludes_zero(one) else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main_table(evidence: TaskEvidence) -> str:
    """One row for each way to train or to read: NLL, then what the sampled and the greedy texts are like."""
    sampled = ("own_rouge_l", "rouge_l", "rare_f1", "diversity", "words")
    greedy = ("own_rouge_l", "rouge_l", "rare_f1", "diversity", "repetition", "words")
    if not evidence.faithful:
        extra: tuple[str, ...] = ()
    else:
        extra = ("in_source",)
    head = ["", "NLL", *(f"NLL, {bucket}" for bucket in BUCKETS)]
    head += [f"sampled: {TITLES[measure]}" for measure in sampled + extra]
    head += [f"greedy: {TITLES[measure]}" for measure in greedy + extra]
    rows = [reference_row(evidence, sampled + extra, greedy + extra)]
    for reading in readings(evidence.arms):
        row = [reading.title, number("nll", estimate(evidence.nll(reading)))]
        row += [number("nll", estimate(evidence.nll(reading, bucket))) for bucket in BUCKETS]
        for mode, measures in (("sampled", sampled + extra), ("greedy", greedy + extra)):
            if evidence.has_texts(reading, mode):
                scores = evidence.scores(reading, mode)
                row += [number(measure, estimate(scores[measure])) for measure in measures]
            else:
                row += [""] * len(measures)
        rows.append(row)
    return markdown(head, rows)


def reference_row(evidence: TaskEvidence, sampled: Sequence[str], greedy: Sequence[str]) -> list[str]:
    """What people wrote, as far as a measure means something for it."""
    found = evidence.of_references()

    def cell(measure: str) -> str:
        return number(measure, Estimate(found[measure], math.nan, math.nan)) if measure in found else ""

    return ["*the references*", *[""] * (1 + len(BUCKETS)), *map(cell, sampled), *map(cell, greedy)]


def every_measure(evidence: TaskEvidence, mode: str) -> str:
    shown = [reading for reading in readings(evidence.arms) if evidence.has_texts(reading, mode)]
    rows = []
    for reading in shown:
        scores = evidence.scores(reading, mode)
        rows.append([reading.title, *(number(measure, estimate(scores[measure])) for measure in TITLES)])
    return markdown(["", *TITLES.values()], rows)


def accuracy_table(evidence: TaskEvidence) -> str:
    """The share of the references' tokens that a model's likeliest token is."""
    rows = []
    for reading in readings(evidence.arms):
        cells = [estimate(evidence.accuracy(reading, bucket)) for bucket in (None, *BUCKETS)]
        rows.append([reading.title, *(number("ended", cell) for cell in cells)])
    return markdown(["", "accuracy, %", *BUCKETS], rows)


def question_table(found: Sequence[Answer], question: str, mode: str) -> str:
    """One row for each way to train and to read, one column a measure. Nothing is bold where there is one seed."""
    chosen = [one for one in found if (one.question, one.mode) == (question, mode)]
    columns = list(dict.fromkeys((one.measure, one.against if question in BY_CURVE else "") for one in chosen))
    head = ["", *(column_title(measure, against) for measure, against in columns)]
    rows = []
    for title in dict.fromkeys(one.title for one in chosen):
        cells = {
            (one.measure, one.against if question in BY_CURVE else ""): cell(one)
            for one in chosen
            if one.title == title
        }
        rows.append([title, *(cells.get(column, "") for column in columns)])
    return markdown(head, rows)


def cell(answer: Answer) -> str:
    if math.isnan(answer.estimate.value):
        return answer.note or "n/a"
    text = number(answer.measure, answer.estimate, signed=True, bold=answer.seeds > 1)
    return f"{text} ({answer.note})" if answer.note else text


def column_title(measure: str, against: str) -> str:
    if against:
        return f"{TITLES[measure]}, against {against}"
    if measure.startswith("nll "):
        return f"NLL, {measure.removeprefix('nll ')}"
    return TITLES[measure]


def learning_rates(evidences: Sequence[TaskEvidence]) -> str:
    """What validation chose, whether the search ended there, and what the loss itself would have chosen."""
    rows = []
    for arm in [arm for arm in ARMS if ARMS[arm].trained]:
        row = [ARMS[arm].title]
        for evidence in evidences:
            run = evidence.runs.get((arm, evidence.seeds[0]))
            chosen = run and run["learning_rate"]
            if not chosen:
                row.append("")
            else:
                rate, own, tried = chosen["chosen"], chosen["by_own_loss"], [float(one) for one in chosen["tried"]]
                notes = [f"the {end} tried" for end, of in (("smallest", min), ("largest", max)) if rate == of(tried)]
                notes += [f"own loss: {own:g}"] if own != rate else []
                row.append(f"{rate:g}" + (f" ({'; '.join(notes)})" if notes else ""))
        rows.append(row)
    return markdown(["", *(evidence.name for evidence in evidences)], rows)


def shown_readings(evidence: TaskEvidence) -> list[Reading]:
    """Whose texts are shown side by side."""
    wanted = [
        Reading("cross-entropy"),
        Reading("cross-entropy", "adjusted-0.4"),
        Reading("cross-entropy", "temperature-1.3"),
        Reading("pdl-0.4"),
        Reading("pdl-1"),
    ]
    return [reading for reading in wanted if reading.arm in evidence.arms]
