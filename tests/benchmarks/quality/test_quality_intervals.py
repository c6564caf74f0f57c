"""Intervals that contain the truth as often as they say, and comparisons at equal quality and length."""

import math

import numpy as np
import pytest

from benchmarks.quality import intervals
from benchmarks.quality.intervals import (
    Estimate,
    best_diversity_at,
    combine,
    cut_to_shorter,
    draw,
    estimate,
    value_at,
)
from benchmarks.quality.metrics import corpus
from benchmarks.quality.metrics.words import words


def test_draws():
    drawn = draw(range(20), seeds=3, resamples=400)
    assert drawn.prompts.shape == (401, 20)
    assert drawn.seeds.shape == (401, 3)
    assert drawn.prompts.dtype == np.int64
    assert (drawn.prompts[0] == 1).all()
    assert (drawn.seeds[0] == 1).all()
    assert set(drawn.prompts.ravel().tolist()) == {0, 1}
    assert (drawn.prompts[1:].sum(axis=1) == 16).all(), "a fifth is left out"
    assert drawn.prompts[1:].mean(axis=0) == pytest.approx([0.8] * 20, abs=0.1)  # 5 standard errors
    assert drawn.seeds.mean(axis=1) == pytest.approx(1)
    assert drawn.seeds[1:].mean(axis=0) == pytest.approx([1] * 3, abs=0.13)  # 5 standard errors
    assert (draw(range(20), 1, 5).seeds == 1).all(), "one seed tells nothing of others"
    np.testing.assert_array_equal(draw(range(20), 3, 400).prompts, drawn.prompts)
    assert (draw(range(20), 3, 400, seed=1).prompts != drawn.prompts).any()
    with pytest.raises(ValueError, match="seeds is 0"):
        draw([0], seeds=0)
    with pytest.raises(ValueError, match="groups is 0"):
        draw([], seeds=1)


def test_prompts_of_a_group_are_drawn_together():
    prompts = draw([0, 1, 0, 2, 1, 0], seeds=1, resamples=300).prompts
    assert (prompts[0] == 1).all()
    for group in ([0, 2, 5], [1, 4]):
        assert (prompts[:, group] == prompts[:, group[:1]]).all()
    assert (prompts[1:, [0, 1, 3]].sum(axis=1) == 2).all(), "one of three groups is left out"
    assert len(set(prompts.sum(axis=1).tolist())) > 1


def test_combine_weighs_seeds():
    resamples = intervals.Resamples(np.ones((3, 1), np.int64), np.array([[1.0, 1, 1], [0, 1, 2], [3, 0, 0]]))
    values = np.array([[1.0, 10, 100], [2, 20, 200], [6, 60, math.nan]])  # (S, 1 + R)
    np.testing.assert_allclose(combine(values, resamples), [3, (20 + 2 * 60) / 3, 100])
    values[2, 1] = math.nan
    np.testing.assert_allclose(combine(values, resamples), [3, math.nan, 100])
    with pytest.raises(ValueError, match=r"values has shape \(2, 3\); accepted is .* \(3, 3\)"):
        combine(values[:2], resamples)


def test_estimate_by_hand():
    got = estimate(np.array([10.0, 3, 4, 5]))  # around the sample's value, not around the resamples' middle
    assert (got.value, got.low, got.high) == pytest.approx((10, 10 - 2 * 1.96, 10 + 2 * 1.96))


def test_resamples_without_a_value():
    series = np.array([1.0] + [0.0, 2.0] * 9 + [math.nan, math.inf])
    got = estimate(series)  # 2 of 20 are a tenth
    assert got.high - got.value == pytest.approx(2 * 1.96 * np.std([0.0, 2.0] * 9, ddof=1))
    series[1] = math.nan
    assert estimate(series).value == 1
    assert math.isnan(estimate(series).low)
    assert math.isnan(estimate(series).high)
    assert math.isnan(estimate(np.array([1.0])).low)
    assert not intervals.excludes_zero(estimate(series))


def test_excludes_zero():
    assert intervals.excludes_zero(Estimate(2, 1, 3))
    assert intervals.excludes_zero(Estimate(-2, -3, -1))
    assert not intervals.excludes_zero(Estimate(1, -1, 3))
    assert not intervals.excludes_zero(Estimate(0, 0, 0))


def mean_series(values, resamples):
    """The combined mean of values (S, P)."""
    return combine(np.array([corpus.mean(row, resamples.prompts) for row in values]), resamples)


def coverage(make, truth, repetitions=200, groups=None):
    inside = 0
    for repetition in range(repetitions):
        values = make(np.random.default_rng(repetition))
        got = estimate(
            mean_series(values, draw(groups or range(values.shape[1]), values.shape[0], 200, seed=repetition))
        )
        inside += got.low <= truth <= got.high
    return inside / repetitions


def test_intervals_contain_the_mean_of_skewed_prompts():
    def make(random):  # a prompt's difficulty, the same for each seed
        return np.repeat(random.exponential(2.0, size=(1, 100)), 3, axis=0)

    assert coverage(make, 2.0) == pytest.approx(0.95, abs=0.04)


def test_intervals_contain_the_mean_of_prompts_that_resemble_others_of_their_group():
    def make(random):  # 50 groups of 5
        return np.repeat(random.exponential(2.0, size=50), 5) + random.normal(0.0, 0.3, size=(1, 250))

    groups = [place // 5 for place in range(250)]
    assert coverage(make, 2.0, groups=groups) == pytest.approx(0.95, abs=0.05)
    assert coverage(make, 2.0) < 0.75, "prompts drawn one by one claim too much"


def test_intervals_contain_the_mean_of_many_seeds():
    def make(random):
        return random.normal(5.0, 1.0, size=(40, 1)) + random.normal(0.0, 1.0, size=(1, 40))

    assert coverage(make, 5.0) == pytest.approx(0.95, abs=0.04)


def test_the_variance_of_seeds_is_right_on_average():
    random = np.random.default_rng(0)
    claimed, means = [], []
    for repetition in range(400):
        values = np.repeat(random.normal(5.0, 1.0, size=(3, 1)), 10, axis=1)
        got = estimate(mean_series(values, draw(range(10), 3, 300, seed=repetition)))
        claimed.append(((got.high - got.value) / 1.96) ** 2)
        means.append(got.value)
    assert np.mean(claimed) == pytest.approx(1 / 3, abs=0.06)  # 3.6 standard errors
    assert np.var(means) == pytest.approx(1 / 3, abs=0.09)


def test_intervals_of_differences_in_distinct_pairs():
    """The bootstrap's are twice as wide here, and too narrow elsewhere: it repeats texts, and so their words."""
    source = np.random.default_rng(0)
    topics = source.integers(40, size=(4000, 3))

    def texts(prompts, spread):  # words of a prompt's topics and common ones: pairs are shared by texts
        return [
            [f"{topics[prompt][place % 3]} {number}" for place, number in enumerate(one)]
            for prompt, one in zip(prompts, random.integers(spread, size=(len(prompts), 12)), strict=True)
        ]

    random = np.random.default_rng(1)
    differences, claimed = [], []
    for repetition in range(150):
        prompts = random.integers(len(topics), size=80)
        sets = [corpus.Types(texts(prompts, spread), 2) for spread in (4, 1)]
        resamples = draw(range(80), 1, 100 if repetition < 20 else 1, seed=repetition)
        got = intervals.difference(*(types.rarefied(600, resamples.prompts) for types in sets))
        differences.append(got.value)
        if repetition < 20:
            claimed.append((got.high - got.value) / 1.96)
    assert np.mean(claimed) == pytest.approx(np.std(differences), rel=0.2)  # 3 standard errors


def test_noise_of_prompt_and_seed_together_makes_no_interval_too_narrow():
    assert coverage(lambda random: random.normal(5.0, 1.0, size=(3, 60)), 5.0) >= 0.95


def test_differences_are_paired():
    random = np.random.default_rng(0)
    hard = random.normal(0, 10, size=(1, 200))  # of the prompts, for both arms
    a, b = hard + random.normal(0.5, 1, size=(3, 200)), hard + random.normal(0.0, 1, size=(3, 200))
    resamples = draw(range(200), seeds=3)
    series_a, series_b = mean_series(a, resamples), mean_series(b, resamples)
    paired = intervals.difference(series_a, series_b)
    assert paired.value == pytest.approx(np.mean(a - b))
    assert intervals.excludes_zero(paired)
    other = mean_series(b, draw(range(200), seeds=3, seed=1))
    assert not intervals.excludes_zero(intervals.difference(series_a, other))


def best(quality, diversity, *at):
    """Of one curve for several qualities: the same curve in each resample."""
    columns = (np.repeat(np.array(curve, dtype=float)[:, None], len(at), axis=1) for curve in (quality, diversity))
    return best_diversity_at(*columns, at=np.array(at, dtype=float))


def test_a_falling_curve():
    got = best([4, 3, 1], [10, 20, 40], 4.1, 4, 3.5, 3, 2, 1, 0)
    np.testing.assert_allclose(got, [10, 10, 15, 20, 30, 40, math.nan])  # nothing beyond the last setting is known


def test_quality_that_rises_before_it_falls():
    # Up from 1 to 3 with the dial, then down to 2; on the way up diversity is lower.
    got = best([1, 3, 2], [5, 10, 30], 3, 2.5, 2, 1.5)
    np.testing.assert_allclose(got, [10, 20, 30, 30])


def test_diversity_that_falls_again():
    np.testing.assert_allclose(best([3, 2, 1], [10, 40, 20], 1.5, 2.5), [40, 25])  # the setting at 2, a crossing
    # The curve dives below the quality between two good settings, and is most diverse while it is there.
    np.testing.assert_allclose(best([3, 1, 3], [10, 50, 20], 2), [35])


def test_settings_of_equal_quality_and_a_single_setting():
    np.testing.assert_allclose(best([2, 2], [10, 20], 1, 2, 3), [math.nan, 20, 20])
    np.testing.assert_allclose(best([2], [10], 1, 2, 3), [math.nan, 10, 10])


def test_settings_and_qualities_without_a_value():
    np.testing.assert_allclose(best([4, math.nan, 1], [10, 20, 40], 3), [10])
    np.testing.assert_allclose(best([4, 3, 1], [10, math.nan, 40], 2), [10])
    np.testing.assert_allclose(best([3, 4, 1], [10, math.nan, 40], 3.5), [10])  # what has no diversity is no best
    np.testing.assert_allclose(best([3, 2, 1], [10, 20, math.nan], 1.5), [math.nan])  # nor a poorest
    assert np.isnan(best([4, 3], [10, 20], math.nan)).all()


def test_each_resample_has_its_own_curve():
    quality, diversity = np.array([[4.0, 2.0], [2.0, 1.0]]), np.array([[10.0, 1.0], [20.0, 3.0]])
    np.testing.assert_allclose(best_diversity_at(quality, diversity, np.array([3.0, 1.75])), [15, 1.5])


def value(values, diversity, *at):
    columns = (np.repeat(np.array(curve, dtype=float)[:, None], len(at), axis=1) for curve in (values, diversity))
    return value_at(*columns, at=np.array(at, dtype=float))


def test_a_dial_turned_until_the_diversity_is_equal():
    got = value([4, 3, 1], [10, 20, 40], 5, 10, 15, 20, 30, 40, 41)
    np.testing.assert_allclose(got, [4, 4, 3.5, 3, 2, 1, math.nan])
    np.testing.assert_allclose(value([4, 3, 1], [10, 30, 20], 15, 25, 30, 31), [3.75, 3.25, 3, math.nan])
    np.testing.assert_allclose(value([4, 3, 2], [10, 10, 20], 10, 15), [4, 2.5])
    each = value_at(np.array([[4.0, 1.0], [2.0, 5.0]]), np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([2.0, 3]))
    np.testing.assert_allclose(each, [3, 3])
    assert np.isnan(value([4, 3], [10, 20], math.nan)).all()


def test_cut_to_shorter():
    a = ["One two, three. Four!", "short", "", "...", "it\u2019s  so-so!", "same here."]
    b = ["Eins -- zwei; drei?", "a much longer text", "anything", "other words", "Well: it is", "Not there."]
    cut_a, cut_b = cut_to_shorter(a, b)
    assert cut_a == ["One two, three", "short", "", "", "it\u2019s  so-so", "same here"]
    assert cut_b == ["Eins -- zwei; drei", "a", "", "", "Well: it is", "Not there"]
    for one, other in zip(cut_a, cut_b, strict=True):
        assert len(words(one)) == len(words(other))
    with pytest.raises(ValueError, match="1 and 0 texts"):
        cut_to_shorter(["a"], [])
