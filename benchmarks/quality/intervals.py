"""Intervals of scores: a bootstrap over prompts and training seeds, the same draws for all models ("arms").

Every score is computed for the sample itself and for R resamples of it, an array (1 + R,) whose first element is the
sample. Arms see the same prompts in each resample and the same seeds, so the difference of two such arrays is paired:
what makes a prompt hard or a seed lucky for both cancels. Prompts are drawn by group: those of one conversation
resemble each other, and are less evidence than as many strangers.

An interval is value +- 1.96 standard deviations of the resamples, and no percentiles: resamples repeat prompts, and
scores that count distinct words are therefore lower in nearly all of them than in the sample
(`benchmarks.quality.metrics.corpus`). Against 120 samples from one made-up source of 300 texts, the standard deviation
of the resamples is a fifth too large for distinct-n and the number of types, and 2.5 times too large for the Zipf
slope: those intervals are wider than they need be.

Prompts and seeds are crossed, and drawn independently (Owen, 2007, The pigeonhole bootstrap). For what varies by prompt
and seed together, as chance in generation does, the interval is therefore wider than it need be. For what varies by
seed alone it is narrower: S seeds drawn with replacement vary (S - 1) / S as much as the seeds do, and a standard
deviation of so few is uncertain. Where everything depended on 3 seeds, the interval contained the truth in 72 % of
cases; with prompts and noise that vary ten times as much as seeds do, as a standard deviation, in 92 % and more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.metrics.words import word_spans

STANDARD_ERRORS = 1.96  # on either side: 95 % of a normal distribution
MISSING = 0.1  # the largest share of resamples without a value that an interval may have


@dataclass(frozen=True)
class Resamples:
    """How often each prompt and each seed is in each resample; the first row, all ones, is the sample itself."""

    prompts: np.ndarray  # (1 + R, P) int64
    seeds: np.ndarray  # (1 + R, S) int64


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % interval; low and high are nan where there is none."""

    value: float
    low: float
    high: float


def draw(groups: Sequence[int], seeds: int, resamples: int = 500, seed: int = 0) -> Resamples:
    """Draw as many groups of prompts as there are, and as many seeds, with replacement and independently.

    `groups` has a number for each prompt, from 0. Prompts of one group, such as the turns of a conversation, resemble
    each other, and are in a resample together: resamples differ in their number of prompts.

    >>> drawn = draw(groups=[0, 0, 1, 2], seeds=3, resamples=2)
    >>> drawn.prompts[0].tolist(), (drawn.prompts[:, 0] == drawn.prompts[:, 1]).all().item(), drawn.seeds.shape
    ([1, 1, 1, 1], True, (3, 3))
    """
    for name, came in (("groups", len(groups)), ("seeds", seeds)):
        if came < 1:
            raise ValueError(f"{name} is {came}; accepted are 1 and more")
    random = np.random.default_rng(seed)

    def multiplicities(size: int) -> np.ndarray:  # (1 + R, size)
        drawn = random.multinomial(size, np.full(size, 1 / size), size=resamples)
        return np.concatenate([np.ones((1, size), dtype=np.int64), drawn.astype(np.int64)])

    return Resamples(multiplicities(max(groups) + 1)[:, list(groups)], multiplicities(seeds))


def combine(values: np.ndarray, resamples: Resamples) -> np.ndarray:
    """(1 + R,) mean over training seeds of values (S, 1 + R), each as often as the resample has it.

    A seed without a value (nan) makes those resamples nan that contain it, and no others.
    """
    weights = resamples.seeds.T  # (S, 1 + R)
    if values.shape != weights.shape:
        raise ValueError(f"values has shape {values.shape}; accepted is (seeds, 1 + resamples), {weights.shape}")
    return np.where(weights > 0, values * weights, 0.0).sum(axis=0) / weights.sum(axis=0)


def estimate(series: np.ndarray) -> Estimate:
    """The first element of series (1 + R,), -+ 1.96 standard deviations of the others.

    Resamples without a value are left out; where these are more than a tenth, or fewer than two values remain, low and
    high are nan.

        >>> estimate(np.array([5.0, 4.0, 5.0, 6.0]))  # their standard deviation is 1
        Estimate(value=5.0, low=3.04, high=6.96)
    """
    value, drawn = float(series[0]), series[1:]
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < 2 or len(drawn) - len(finite) > MISSING * len(drawn):
        return Estimate(value, math.nan, math.nan)
    margin = STANDARD_ERRORS * float(np.std(finite, ddof=1))
    return Estimate(value, value - margin, value + margin)


def difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """The estimate of a - b, resample by resample: both are (1 + R,) over the same resamples."""
    return estimate(a - b)


def excludes_zero(estimated: Estimate) -> bool:
    """Whether the whole interval is on one side of 0; False where there is no interval."""
    return estimated.low > 0 or estimated.high < 0


def best_diversity_at(quality: np.ndarray, diversity: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(1 + R,) at equal quality, what the free baseline offers: its highest diversity at quality `at` or better.

    Diversity can be had without any training, by a dial (temperature, tau) that costs quality. A trained model offers
    something only if it is more diverse than the baseline is with its dial turned to the model's own quality.

    `quality` and `diversity` are (K, 1 + R): K settings in the order of the dial, joined by straight lines in the plane
    of quality and diversity. Quality need not fall along the dial: every part of the curve with quality >= at counts.
    On a straight line the highest diversity is at an end of such a part, which is a setting or a crossing of `at`,
    (1 + R,). A setting without a value in a resample leaves that resample's curve, with both its lines.

    Where `at` is above every setting, the best setting stands for the curve, to the baseline's advantage. nan where it
    is below every setting: the dial was not turned that far, and would offer more than any setting there is.

        >>> curve = np.array([[3.0], [2.0], [1.0]]), np.array([[10.0], [20.0], [40.0]])  # colder to hotter
        >>> best_diversity_at(*curve, at=np.array([1.5])).tolist()
        [30.0]
    """
    quality = np.where(np.isfinite(diversity), quality, np.nan)
    highest, lowest = (pick(quality, axis=0) for pick in (np.fmax.reduce, np.fmin.reduce))
    at = np.minimum(at, highest)
    settings = np.where(quality >= at, diversity, -np.inf)  # (K, 1 + R)
    (q0, q1), (d0, d1) = ((curve[:-1], curve[1:]) for curve in (quality, diversity))  # (K - 1, 1 + R) each
    crosses = ((q0 >= at) != (q1 >= at)) & np.isfinite(q0 + q1)
    along = np.divide(at - q0, q1 - q0, out=np.zeros_like(q0), where=crosses)  # 0 at the first end, 1 at the second
    crossings = np.where(crosses, d0 + along * (d1 - d0), -np.inf)
    best = np.concatenate([settings, crossings]).max(axis=0)
    return np.where(np.isfinite(best) & (at >= lowest), best, np.nan)


def value_at_diversity(value: np.ndarray, diversity: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(1 + R,) at equal diversity: a measure of the baseline with its dial turned until it is as diverse as `at`.

    `value` and `diversity` are (K, 1 + R) as in `best_diversity_at`. The first point along the dial counts, on the
    straight line between two settings; its start where that is diverse enough already. nan where no setting is.

        >>> curve = np.array([[3.0], [2.0], [1.0]]), np.array([[10.0], [20.0], [40.0]])
        >>> value_at_diversity(*curve, at=np.array([30.0])).tolist()
        [1.5]
    """
    reached = diversity >= at  # (K, 1 + R)
    first = np.argmax(reached, axis=0)
    before = np.maximum(first - 1, 0)
    column = np.arange(diversity.shape[1])
    d0, d1, v0, v1 = (series[row, column] for series in (diversity, value) for row in (before, first))
    with np.errstate(divide="ignore", invalid="ignore"):  # at the first setting there is no line
        found = v0 + (at - d0) / (d1 - d0) * (v1 - v0)
    return np.where(reached.any(axis=0), np.where(first == 0, v1, found), np.nan)


def cut_to_shorter(a: Sequence[str], b: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both texts of each prompt, cut after as many words as the shorter one has.

    The texts stay as they were up to the end of that word. What follows the last word, such as a full stop, is cut from
    both, so that neither has an end that the other lost.

        >>> cut_to_shorter(["Yes, indeed."], ["Oh -- no, not today!"])
        (['Yes, indeed'], ['Oh -- no'])
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} texts came; accepted are equally many")
    cut_a, cut_b = [], []
    for text_a, text_b in zip(a, b, strict=True):
        spans_a, spans_b = word_spans(text_a), word_spans(text_b)
        kept = min(len(spans_a), len(spans_b))
        cut_a.append(text_a[: spans_a[kept - 1][1]] if kept else "")
        cut_b.append(text_b[: spans_b[kept - 1][1]] if kept else "")
    return cut_a, cut_b
