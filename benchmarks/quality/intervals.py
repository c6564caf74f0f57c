"""Intervals of scores: resamples of prompts and training seeds, the same for all models ("arms").

Every score is computed for the sample itself and for R resamples of it, an array (1 + R,) whose first element is the
sample. Arms see the same prompts in each resample and the same seeds, so the difference of two such arrays is paired:
what makes a prompt hard or a seed lucky for both cancels. Prompts are left out by group: those of one conversation
resemble each other, and are less evidence than as many strangers.

A resample leaves out a random fifth of the groups (the delete-d jackknife: Shao and Wu, 1989, A General Theory for
Jackknife Variance Estimation). Scores of four fifths vary half as much as scores of samples do, so an interval is value
+- 1.96 * 2 standard deviations of the resamples. The bootstrap, which draws with replacement, will not do here: it
repeats prompts, and scores that count distinct words, and their differences, shrink. Of differences in distinct pairs
between halves of the held-out prompts, the bootstrap claimed .52 to .76 of the true standard deviation for greedy texts
and .73 to 1.3 for sampled ones, this .89 to 1.13 (`benchmarks.quality.check_intervals`, as the shares below).

Prompts and seeds are crossed. For what varies by prompt and seed together, as chance in generation does, the interval
is therefore wider than it need be, by up to a factor of 1.4. What varies by seed alone has the right variance on
average, but a standard deviation of three seeds is uncertain: where everything depended on 3 seeds, the interval
contained the truth in 80 % of cases; with prompts and noise that vary ten times as much as seeds do, as a standard
deviation, in 93 to 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.metrics.words import word_spans

STANDARD_ERRORS = 1.96  # on either side: 95 % of a normal distribution
LEFT_OUT = 5  # a resample leaves out one of as many groups
SHARE_OF_DEVIATION = (LEFT_OUT - 1) ** -0.5  # how much resamples deviate from the sample, samples taken as 1
MISSING = 0.1  # the largest share of resamples without a value that an interval may have


@dataclass(frozen=True)
class Resamples:
    """Which prompts are in each resample, 0 or 1, and what each seed weighs; the first row, all ones, is the sample."""

    prompts: np.ndarray  # (1 + R, P) int64
    seeds: np.ndarray  # (1 + R, S) float64, of mean 1


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % interval; low and high are nan where there is none."""

    value: float
    low: float
    high: float


def draw(groups: Sequence[int], seeds: int, resamples: int = 500, seed: int = 0) -> Resamples:
    """Leave out a random fifth of the groups of prompts in each resample, and weigh the seeds at random.

    `groups` has a number for each prompt, from 0. Prompts of one group, such as the turns of a conversation, are in a
    resample together or not at all: resamples differ in their number of prompts. One seed, drawn at random, weighs less
    than the others, by so much that the mean over seeds deviates half as much as it does between samples.

    >>> drawn = draw(groups=[0, 0, 1, 2, 3, 4], seeds=3, resamples=2)
    >>> drawn.prompts[0].tolist(), (drawn.prompts[:, 0] == drawn.prompts[:, 1]).all().item(), drawn.seeds.shape
    ([1, 1, 1, 1, 1, 1], True, (3, 3))
    """
    for name, came in (("groups", len(groups)), ("seeds", seeds)):
        if came < 1:
            raise ValueError(f"{name} is {came}; accepted are 1 and more")
    random = np.random.default_rng(seed)
    number = max(groups) + 1
    left_out = np.argsort(random.random((resamples, number)), axis=1)[:, : max(1, round(number / LEFT_OUT))]
    kept = np.ones((1 + resamples, number), dtype=np.int64)
    np.put_along_axis(kept[1:], left_out, 0, axis=1)
    weights = np.ones((1 + resamples, seeds))
    if seeds > 1:  # a seed that is left out altogether moves the mean by 1 / sqrt(seeds - 1) of what samples do
        change = SHARE_OF_DEVIATION * math.sqrt(seeds - 1)
        weights[1:] += change / (seeds - 1)
        weights[np.arange(1, 1 + resamples), random.integers(seeds, size=resamples)] = 1 - change
    return Resamples(kept[:, list(groups)], weights)


def combine(values: np.ndarray, resamples: Resamples) -> np.ndarray:
    """(1 + R,) mean over training seeds of values (S, 1 + R), by their weights in each resample.

    A seed without a value (nan) makes those resamples nan in which it weighs something, and no others.
    """
    weights = resamples.seeds.T  # (S, 1 + R)
    if values.shape != weights.shape:
        raise ValueError(f"values has shape {values.shape}; accepted is (seeds, 1 + resamples), {weights.shape}")
    return np.where(weights != 0, values * weights, 0.0).sum(axis=0) / weights.sum(axis=0)


def estimate(series: np.ndarray) -> Estimate:
    """The first element of series (1 + R,), -+ 1.96 standard deviations of samples, twice those of the others.

    Resamples without a value are left out; where these are more than a tenth, or fewer than two values remain, low and
    high are nan.

        >>> estimate(np.array([5.0, 4.0, 5.0, 6.0]))  # the resamples' standard deviation is 1
        Estimate(value=5.0, low=1.08, high=8.92)
    """
    value, drawn = float(series[0]), series[1:]
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < 2 or len(drawn) - len(finite) > MISSING * len(drawn):
        return Estimate(value, math.nan, math.nan)
    margin = STANDARD_ERRORS * float(np.std(finite, ddof=1)) / SHARE_OF_DEVIATION
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


def value_at(value: np.ndarray, dialled: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(1 + R,) `value` of a baseline with its dial turned until another measure, `dialled`, has reached `at`.

    `value` and `dialled` are (K, 1 + R): K settings in the order of the dial. With `dialled` for diversity and
    `value` for quality, it is the quality at equal diversity. The first point along the dial counts, on the straight
    line between two settings; its start where that has reached `at` already. nan where no setting has.

        >>> quality, diversity = np.array([[3.0], [2.0], [1.0]]), np.array([[10.0], [20.0], [40.0]])
        >>> value_at(quality, diversity, at=np.array([30.0])).tolist()
        [1.5]
    """
    reached = dialled >= at  # (K, 1 + R)
    first = np.argmax(reached, axis=0)
    before = np.maximum(first - 1, 0)
    column = np.arange(dialled.shape[1])
    d0, d1, v0, v1 = (series[row, column] for series in (dialled, value) for row in (before, first))
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
