"""The questions, and their answers with intervals.

natural         PDL (and the other losses) against cross entropy, both as they are
adjusted        PDL against cross entropy whose logits are adjusted by the same exponent, which needs no training
equal quality   the diversity of PDL, less the most that a baseline's curve has at PDL's quality or better
equal ROUGE-L   the same, where ROUGE-L itself is the quality, not what it is above chance
equal diversity quality and F1 of rare words of PDL, less those of a baseline whose dial is turned to PDL's diversity
undone          the NLL of PDL with its shift undone, less that of cross entropy
equal NLL       the NLL of rare tokens of PDL, less that of a baseline whose dial is turned to PDL's NLL of all tokens
straight lines  the diversity of each setting of a baseline, less what the line between the other settings has at its
                quality: what a baseline has and its straight lines do not show
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.arms import ALPHAS, ARMS, TEMPERATURES
from benchmarks.quality.intervals import Estimate, best_diversity_at, difference, value_at
from benchmarks.quality.report.evidence import Reading, TaskEvidence
from benchmarks.quality.scoring import BUCKETS

QUESTIONS = ("natural", "adjusted", "equal quality", "equal ROUGE-L", "equal diversity", "undone", "equal NLL")
QUESTIONS += ("straight lines",)
MODES = ("greedy", "sampled")
CROSS_ENTROPY = Reading("cross-entropy")
ADJUSTED = [CROSS_ENTROPY, *(Reading("cross-entropy", f"adjusted-{tau:g}") for tau in ALPHAS)]
QUALITY = "own_rouge_l"  # what "equal quality" is judged by
QUALITIES = {"equal quality": QUALITY, "straight lines": QUALITY, "equal ROUGE-L": "rouge_l"}
DIVERSITY = "diversity"
AT_EQUAL_DIVERSITY = (QUALITY, "rare_f1")
PAIRED = (DIVERSITY, QUALITY, "rouge_l", "cut_chrf", "rare_precision", "rare_recall", "rare_f1", "words")


def adjusted(mode: str) -> list[tuple[Reading, str]]:
    """Cross entropy with its logits adjusted further and further, texts of one mode."""
    return [(reading, mode) for reading in ADJUSTED]


def heated(mode: str) -> list[tuple[Reading, str]]:
    """Cross entropy sampled hotter and hotter, from temperature 0, which is greedy; the same for both modes."""
    at = {value: Reading("cross-entropy", f"temperature-{value:g}") for value in TEMPERATURES} | {1.0: CROSS_ENTROPY}
    return [(CROSS_ENTROPY, "greedy"), *((at[value], "sampled") for value in sorted(at))]


def hotter() -> list[Reading]:
    """Cross entropy at temperature 1 and above: its NLL rises with the temperature."""
    return [CROSS_ENTROPY, *(Reading("cross-entropy", f"temperature-{value:g}") for value in TEMPERATURES if value > 1)]


CURVES: dict[str, Callable[[str], list[tuple[Reading, str]]]] = {"adjusted logits": adjusted, "temperature": heated}


@dataclass(frozen=True)
class Answer:
    """One difference: positive where the trained arm has more of the measure."""

    question: str
    task: str
    mode: str  # "" where no text is written
    arm: str
    variant: str
    against: str
    measure: str
    estimate: Estimate
    seeds: int
    note: str = ""  # what the number alone would hide

    @property
    def title(self) -> str:
        return Reading(self.arm, self.variant).title


def answers(evidence: TaskEvidence) -> Iterator[Answer]:
    """Everything that is asked of one task, as far as its records go."""
    if CROSS_ENTROPY.arm not in evidence.arms:
        return
    for mode, curve in (("greedy", "adjusted logits"), ("sampled", "adjusted logits"), ("sampled", "temperature")):
        for one, of_mode in CURVES[curve](mode)[1:-1]:
            yield from at_equal_quality(evidence, of_mode, one, curve, "straight lines")
    for arm in [arm for arm in evidence.arms if ARMS[arm].trained and arm != CROSS_ENTROPY.arm]:
        reading, half, undone = Reading(arm), Reading(arm, "half-undone"), Reading(arm, "undone")
        is_pdl = arm.startswith("pdl-")
        same_exponent = Reading("cross-entropy", arm.replace("pdl-", "adjusted-").replace("paper", "1"))
        paired = [("natural", CROSS_ENTROPY), *([("adjusted", same_exponent)] if is_pdl else [])]
        for mode in MODES:
            for question, other in paired:
                for measure in PAIRED:
                    change = difference(evidence.series(reading, mode, measure), evidence.series(other, mode, measure))
                    yield answer(evidence, question, mode, reading, other.title, measure, change)
            for one in [reading, *([half] if is_pdl and evidence.has_texts(half, mode) else [])]:
                for curve in CURVES:
                    for question in ("equal quality", "equal ROUGE-L"):
                        yield from at_equal_quality(evidence, mode, one, curve, question)
                    yield from at_equal_diversity(evidence, mode, one, curve)
        if not is_pdl:
            continue
        for question, one, other in (("undone", undone, CROSS_ENTROPY), ("adjusted", reading, same_exponent)):
            for bucket in (None, *BUCKETS):
                change = difference(evidence.nll(one, bucket), evidence.nll(other, bucket))
                yield answer(evidence, question, "", one, other.title, f"nll {bucket or 'all'}", change)
        for one in (reading, undone):
            yield from at_equal_nll(evidence, one)


def answer(
    evidence: TaskEvidence,
    question: str,
    mode: str,
    reading: Reading,
    against: str,
    measure: str,
    change: Estimate,
    note: str = "",
) -> Answer:
    seeds = len(evidence.seeds)
    return Answer(question, evidence.name, mode, reading.arm, reading.variant, against, measure, change, seeds, note)


def at_equal_quality(
    evidence: TaskEvidence, mode: str, reading: Reading, curve: str, question: str = "equal quality"
) -> Iterator[Answer]:
    """Of a setting of the baseline itself: against the curve without it."""
    judged_by = QUALITIES[question]
    quality, diversity = (along(evidence, mode, curve, measure, without=reading) for measure in (judged_by, DIVERSITY))
    own = evidence.series(reading, mode, judged_by)
    offered = best_diversity_at(quality, diversity, own)
    change = difference(evidence.series(reading, mode, DIVERSITY), offered)
    note = beyond(own, quality, "better than any setting", "poorer than any setting")
    yield answer(evidence, question, mode, reading, curve, DIVERSITY, change, note)


def at_equal_diversity(evidence: TaskEvidence, mode: str, reading: Reading, curve: str) -> Iterator[Answer]:
    diversity, own = along(evidence, mode, curve, DIVERSITY), evidence.series(reading, mode, DIVERSITY)
    note = beyond(own, diversity, "more diverse than any setting", "less diverse than any setting")
    for measure in AT_EQUAL_DIVERSITY:
        offered = value_at(along(evidence, mode, curve, measure), diversity, own)
        change = difference(evidence.series(reading, mode, measure), offered)
        yield answer(evidence, "equal diversity", mode, reading, curve, measure, change, note)


def at_equal_nll(evidence: TaskEvidence, reading: Reading) -> Iterator[Answer]:
    """Below 0 PDL is better, unlike elsewhere."""
    own = evidence.nll(reading)
    for curve, settings in (("adjusted logits", ADJUSTED), ("temperature", hotter())):
        whole, rare = (np.stack([evidence.nll(one, bucket) for one in settings]) for bucket in (None, "rare"))
        note = beyond(own, whole, "worse overall than any setting", "better overall than any setting")
        change = difference(evidence.nll(reading, "rare"), value_at(rare, whole, own))
        yield answer(evidence, "equal NLL", "", reading, curve, "nll rare", change, note)


def beyond(own: np.ndarray, settings: np.ndarray, above: str, below: str) -> str:
    """Whether the dial was turned far enough to reach `own` (1 + R,) of PDL with its settings (K, 1 + R)."""
    if own[0] > settings[:, 0].max():
        return above
    return below if own[0] < settings[:, 0].min() else ""


def along(
    evidence: TaskEvidence, mode: str, curve: str, measure: str, without: Reading | None = None
) -> np.ndarray:  # (settings, 1 + R)
    """A measure of the baseline along its dial."""
    points = [point for point in CURVES[curve](mode) if point != (without, mode)]
    return np.stack([evidence.series(reading, one, measure) for reading, one in points])
