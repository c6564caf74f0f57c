"""Markdown tables. Half the width of the 95 % interval follows a number; bold: the interval is on one side of 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.quality.arms import ARMS, NATURAL
from benchmarks.quality.intervals import Estimate, estimate, excludes_zero
from benchmarks.quality.report.comparisons import CURVES, Answer
from benchmarks.quality.report.evidence import Reading, TaskEvidence, readings
from benchmarks.quality.scoring import BUCKETS
from benchmarks.quality.tasks import TASKS

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
PER_CENT += ("accuracy", "distinct_1", "distinct_2", "distinct_3", "repetition", "ended", "in_source")
BY_CURVE = ("equal quality", "equal ROUGE-L", "equal diversity", "straight lines", "equal NLL")  # against baselines
CAREFUL = ("pdl-0.25", "pdl-0.4")  # the arms of the overview
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
    """The arms as they are and what comes for nothing: NLL, then what the sampled and the greedy texts are like."""
    measures: tuple[str, ...] = ("own_rouge_l", "rare_f1", "diversity", "words", "ended")
    if evidence.faithful:
        measures += ("in_source",)
    head = ["", "NLL", "NLL, rare"]
    head += [f"{mode}: {TITLES[measure]}" for mode in ("sampled", "greedy") for measure in measures]
    rows = [reference_row(evidence, measures)]
    for reading in main_readings(evidence):
        row = [reading.title, *(number("nll", estimate(evidence.nll(reading, bucket))) for bucket in (None, "rare"))]
        for mode in ("sampled", "greedy"):
            if evidence.has_texts(reading, mode):
                scores = evidence.scores(reading, mode)
                row += [number(measure, estimate(scores[measure])) for measure in measures]
            else:
                row += [""] * len(measures)
        rows.append(row)
    return markdown(head, rows)


def main_readings(evidence: TaskEvidence) -> list[Reading]:
    """Every arm as it is, and the settings of the free baselines' dials."""
    dials = {point[0] for curve in CURVES.values() for point in curve("sampled")}
    return [one for one in readings(evidence.arms) if one.variant == NATURAL or one in dials]


def reference_row(evidence: TaskEvidence, measures: Sequence[str]) -> list[str]:
    """What people wrote, as far as a measure means something for it; no mode wrote it, so it is there for both."""
    found = evidence.of_references()

    def cell(measure: str) -> str:
        return number(measure, Estimate(found[measure], math.nan, math.nan)) if measure in found else ""

    return ["*the references*", "", "", *map(cell, measures), *map(cell, measures)]


def every_measure(evidence: TaskEvidence, mode: str) -> str:
    shown = [reading for reading in readings(evidence.arms) if evidence.has_texts(reading, mode)]
    rows = []
    for reading in shown:
        scores = evidence.scores(reading, mode)
        rows.append([reading.title, *(number(measure, estimate(scores[measure])) for measure in TITLES)])
    return markdown(["", *TITLES.values()], rows)


def bucket_table(evidence: TaskEvidence) -> str:
    """NLL of the references' tokens, and the share of them that is a model's likeliest token, by frequency."""
    rows = []
    for reading in readings(evidence.arms):
        row = [reading.title]
        row += [number("nll", estimate(evidence.nll(reading, bucket))) for bucket in (None, *BUCKETS)]
        row += [number("accuracy", estimate(evidence.accuracy(reading, bucket))) for bucket in (None, *BUCKETS)]
        rows.append(row)
    head = [f"{measure}, {bucket}" for measure in ("NLL", "accuracy") for bucket in ("all", *BUCKETS)]
    return markdown(["", *head], rows)


def overview(found: Sequence[Answer]) -> str:
    """The diversity at equal quality of the careful alphas: a row for each task and mode."""
    columns = [(arm, curve) for curve in CURVES for arm in CAREFUL]
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for one in found:
        if (one.question, one.variant) == ("equal quality", NATURAL) and (one.arm, one.against) in columns:
            row = rows.setdefault(f"{TASKS[one.task].title}, {one.mode}", {})
            row[one.arm, one.against] = cell(one)
    head = ["", *(f"{ARMS[arm].title}, against {curve}" for arm, curve in columns)]
    return markdown(head, ([title, *(row.get(column, "") for column in columns)] for title, row in rows.items()))


def question_table(found: Sequence[Answer], question: str, *modes: str) -> str:
    """One row for each way to train and to read, one column a measure. Nothing is bold where there is one seed."""
    chosen = [one for mode in modes for one in found if (one.question, one.mode) == (question, mode)]

    def column(one: Answer) -> str:
        title = column_title(one.measure, one.against if question in BY_CURVE else "")
        return f"{one.mode}: {title}" if len(modes) > 1 else title

    columns = list(dict.fromkeys(map(column, chosen)))
    rows: dict[str, dict[str, str]] = {}
    for one in chosen:
        rows.setdefault(one.title, {})[column(one)] = cell(one)
    return markdown(["", *columns], ([title, *(row.get(name, "") for name in columns)] for title, row in rows.items()))


def cell(answer: Answer) -> str:
    if math.isnan(answer.estimate.value):
        return answer.note or "n/a"
    text = number(answer.measure, answer.estimate, signed=True, bold=answer.seeds > 1)
    return f"{text} ({answer.note})" if answer.note else text


def column_title(measure: str, against: str) -> str:
    title = f"NLL, {measure.removeprefix('nll ')}" if measure.startswith("nll ") else TITLES[measure]
    return f"{title}, against {against}" if against else title


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
