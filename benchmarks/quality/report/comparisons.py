"""The questions, and their answers with intervals.

natural       PDL against cross entropy, both as they are
adjusted      PDL against cross entropy whose logits are adjusted by the same exponent, which needs no training
equal quality diversity, or F1 of rare words, of PDL, less the most that a baseline's curve has at no lower ROUGE-L
undone        the NLL of PDL with its shift undone, less that of cross entropy
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.arms import ALPHAS, TEMPERATURES
from benchmarks.quality.intervals import Estimate, best_diversity_at, difference
from benchmarks.quality.report.evidence import Reading, TaskEvidence
from benchmarks.quality.scoring import BUCKETS

MODES = ("greedy", "sampled")
CROSS_ENTROPY = Reading("cross-entropy")
ADJUSTED = [CROSS_ENTROPY, *(Reading("cross-entropy", f"adjusted-{tau:g}") for tau in ALPHAS)]
HEATED = sorted(
    [(1.0, CROSS_ENTROPY), *((value, Reading("cross-entropy", f"temperature-{value:g}")) for value in TEMPERATURES)],
    key=lambda pair: pair[0],
)
CURVES = {"adjusted logits": ADJUSTED, "temperature": [reading for _, reading in HEATED]}
QUALITY = "rouge_l"  # what "equal quality" is judged by
GAINS = ("diversity", "rare_f1")  # what is compared there
PAIRED = ("diversity", "rouge_l", "cut_chrf", "rare_precision", "rare_recall", "rare_f1", "words")


@dataclass(frozen=True)
class Answer:
    """One difference: positive where the trained arm has more of the measure."""

    question: str
    task: str
    mode: str  # "" where no text is written
    arm: str
    against: str
    measure: str
    estimate: Estimate


def answers(evidence: TaskEvidence) -> Iterator[Answer]:
    """Everything that is asked of one task, as far as its records go."""
    if CROSS_ENTROPY.arm not in evidence.arms:
        return
    for arm in [arm for arm in evidence.arms if arm.startswith("pdl-")]:
        reading = Reading(arm)
        for mode in MODES:
            yield from paired(evidence, "natural", mode, reading, CROSS_ENTROPY)
            baseline = Reading("cross-entropy", arm.replace("pdl-", "adjusted-").replace("paper", "1"))
            yield from paired(evidence, "adjusted", mode, reading, baseline)
            for curve in CURVES:
                for gain in GAINS:
                    yield from at_equal_quality(evidence, mode, reading, curve, gain)
        undone = Reading(arm, "undone")
        for bucket in (None, *BUCKETS):
            change = difference(evidence.nll(undone, bucket), evidence.nll(CROSS_ENTROPY, bucket))
            yield Answer("undone", evidence.name, "", arm, "cross entropy", f"nll {bucket or 'all'}", change)
        baseline = Reading("cross-entropy", arm.replace("pdl-", "adjusted-").replace("paper", "1"))
        for bucket in (None, *BUCKETS):
            change = difference(evidence.nll(reading, bucket), evidence.nll(baseline, bucket))
            yield Answer("adjusted", evidence.name, "", arm, baseline.title, f"nll {bucket or 'all'}", change)


def paired(evidence: TaskEvidence, question: str, mode: str, a: Reading, b: Reading) -> Iterator[Answer]:
    for measure in PAIRED:
        change = difference(evidence.series(a, mode, measure), evidence.series(b, mode, measure))
        yield Answer(question, evidence.name, mode, a.arm, b.title, measure, change)


def at_equal_quality(evidence: TaskEvidence, mode: str, reading: Reading, curve: str, gain: str) -> Iterator[Answer]:
    points = [point for point in CURVES[curve] if evidence.has_texts(point, mode)]
    if len(points) < 2:
        return  # greedy texts do not depend on the temperature
    offered = best_diversity_at(
        np.stack([evidence.series(point, mode, QUALITY) for point in points]),
        np.stack([evidence.series(point, mode, gain) for point in points]),
        evidence.series(reading, mode, QUALITY),
    )
    change = difference(evidence.series(reading, mode, gain), offered)
    yield Answer("equal quality", evidence.name, mode, reading.arm, curve, gain, change)
