"""What is asked of the records, and the answers: paired, or at equal quality, diversity or NLL."""

import numpy as np
import pytest

for package in ("rouge_score", "sacrebleu", "transformers"):
    pytest.importorskip(package)

from helpers.quality_records import write_records  # noqa: E402

from benchmarks.quality.arms import ARMS  # noqa: E402
from benchmarks.quality.intervals import best_diversity_at  # noqa: E402
from benchmarks.quality.report.comparisons import (  # noqa: E402
    CROSS_ENTROPY,
    CURVES,
    answers,
    at_equal_diversity,
    at_equal_nll,
    at_equal_quality,
    heated,
)
from benchmarks.quality.report.evidence import Reading, load_task  # noqa: E402

PDL = Reading("pdl-0.4")


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    made = tmp_path_factory.mktemp("records")
    write_records(made, tasks=("dialogue",))
    return load_task(made, "dialogue", resamples=40)


def test_differences_are_paired(evidence):
    found = {(one.question, one.mode, one.arm, one.measure, one.against): one.estimate for one in answers(evidence)}
    change = evidence.series(PDL, "sampled", "rouge_l") - evidence.series(CROSS_ENTROPY, "sampled", "rouge_l")
    asked = found["natural", "sampled", "pdl-0.4", "rouge_l", "cross entropy"]
    assert asked.value == pytest.approx(change[0])
    assert asked.high - asked.value == pytest.approx(2 * 1.96 * np.std(change[1:], ddof=1))


def test_the_adjusted_baseline_has_the_same_exponent(evidence):
    against = {(one.arm, one.against) for one in answers(evidence) if one.question == "adjusted"}
    assert ("pdl-0.25", "cross entropy, logits adjusted by 0.25") in against
    assert ("pdl-paper", "cross entropy, logits adjusted by 1") in against
    assert len(against) == 5


def test_undone_is_compared_with_cross_entropy(evidence):
    change = evidence.nll(Reading("pdl-1", "undone"), "rare") - evidence.nll(CROSS_ENTROPY, "rare")
    found = [one for one in answers(evidence) if (one.question, one.arm) == ("undone", "pdl-1")]
    assert [one.measure for one in found] == ["nll all", "nll frequent", "nll medium", "nll rare"]
    assert found[-1].estimate.value == pytest.approx(change[0])


def test_curves_and_who_is_held_against_them(evidence):
    for question in ("equal quality", "equal ROUGE-L", "equal diversity"):
        found = [one for one in answers(evidence) if one.question == question]
        assert {(one.mode, one.against) for one in found} == {
            (mode, curve) for mode in ("greedy", "sampled") for curve in ("adjusted logits", "temperature")
        }
        halves = {("pdl-0.4", "half-undone"), ("pdl-1", "half-undone")}
        arms = {(arm, "natural") for arm in ARMS if arm not in ("untouched", "cross-entropy")}
        assert {(one.arm, one.variant) for one in found} == arms | halves


def test_inner_settings_are_held_against_the_line_between_the_others(evidence):
    found = {(one.mode, one.against, one.variant) for one in answers(evidence) if one.question == "straight lines"}
    adjusted = [f"adjusted-{tau}" for tau in (0.25, 0.4, 0.75)]
    assert found == {
        *((mode, "adjusted logits", variant) for mode in ("greedy", "sampled") for variant in adjusted),
        *(
            ("sampled", "temperature", variant)
            for variant in ("natural", *(f"temperature-{t}" for t in (0.7, 1.15, 1.3)))
        ),
    }


def test_the_temperature_begins_with_greedy_texts():
    sampled = ["temperature-0.7", "natural", "temperature-1.15", "temperature-1.3", "temperature-1.6"]
    expected = [("natural", "greedy"), *((variant, "sampled") for variant in sampled)]
    for mode in ("greedy", "sampled"):
        assert [(reading.variant, one) for reading, one in heated(mode)] == expected


def test_a_setting_of_the_baseline_is_held_against_the_others_and_at_its_diversity_is_itself(evidence):
    for mode, variant, curve in (
        ("sampled", "temperature-1.15", "temperature"),
        ("greedy", "adjusted-0.25", "adjusted logits"),
    ):
        own = Reading("cross-entropy", variant)
        (gain,) = at_equal_quality(evidence, mode, own, curve)
        others = [point for point in CURVES[curve](mode) if point != (own, mode)]
        series = ([evidence.series(*point, measure) for point in others] for measure in ("own_rouge_l", "diversity"))
        line = best_diversity_at(*map(np.stack, series), evidence.series(own, mode, "own_rouge_l"))
        change = evidence.series(own, mode, "diversity") - line
        assert gain.estimate.value == pytest.approx(change[0], nan_ok=True)
        quality, f1 = at_equal_diversity(evidence, mode, own, curve)
        assert (quality.measure, f1.measure) == ("own_rouge_l", "rare_f1")
        assert (quality.estimate.value, f1.estimate.value) == pytest.approx((0, 0))


def test_what_is_beyond_a_curve_is_noted(monkeypatch, evidence):
    series = {"own_rouge_l": 0.0, "diversity": 0.0, "rare_f1": 0.0}

    def made_up(self, reading, mode, measure):
        if reading.arm == "pdl-1":
            return np.full(4, series[measure])
        return np.full(4, 1.0 if reading.variant == "natural" else 2.0)

    monkeypatch.setattr(type(evidence), "series", made_up)
    pdl = Reading("pdl-1")
    for quality, note, value in ((3.0, "better than any setting", 3.0), (0.5, "poorer than any setting", None)):
        series["own_rouge_l"], series["diversity"] = quality, 5.0
        (gain,) = at_equal_quality(evidence, "sampled", pdl, "adjusted logits")
        assert gain.note == note
        assert gain.estimate.value == value if value else np.isnan(gain.estimate.value)
        both = at_equal_diversity(evidence, "sampled", pdl, "adjusted logits")
        assert {one.note for one in both} == {"more diverse than any setting"}
    series["own_rouge_l"], series["diversity"] = 1.5, 1.5
    (gain,) = at_equal_quality(evidence, "sampled", pdl, "adjusted logits")
    assert (gain.note, gain.estimate.value) == ("", pytest.approx(-0.5))
    series["diversity"] = 0.5
    for answer in at_equal_diversity(evidence, "sampled", pdl, "adjusted logits"):
        assert answer.note == "less diverse than any setting"


def test_losses_that_are_not_pdl_are_held_against_cross_entropy_too(evidence):
    asked = {one.question for one in answers(evidence) if one.arm == "focal"}
    assert asked == {"natural", "equal quality", "equal ROUGE-L", "equal diversity"}


def test_equal_rouge_l_is_judged_by_rouge_l_itself(evidence):
    (gain,) = at_equal_quality(evidence, "sampled", PDL, "adjusted logits", "equal ROUGE-L")
    settings = [evidence.series(*point, "rouge_l") for point in CURVES["adjusted logits"]("sampled")]
    diversity = [evidence.series(*point, "diversity") for point in CURVES["adjusted logits"]("sampled")]
    line = best_diversity_at(np.stack(settings), np.stack(diversity), evidence.series(PDL, "sampled", "rouge_l"))
    expected = evidence.series(PDL, "sampled", "diversity") - line
    assert gain.estimate.value == pytest.approx(expected[0], nan_ok=True)
    (other,) = at_equal_quality(evidence, "sampled", PDL, "adjusted logits")
    assert other.estimate.value != gain.estimate.value


def test_rare_tokens_at_equal_nll_by_hand(monkeypatch, evidence):
    """Dials of 3, 4, 5, ... overall and 9, 7, 5, ... for rare tokens; PDL has 3.5 overall, where a dial has 8."""
    order = [["natural", "adjusted-0.25", "adjusted-0.4", "adjusted-0.75", "adjusted-1"]]
    order.append(["natural", "temperature-1.15", "temperature-1.3", "temperature-1.6"])
    dial = {variant: place for names in order for place, variant in enumerate(names)}
    pdl = {None: 3.5, "rare": 7.0}

    def made_up(self, reading, bucket=None):
        if reading.arm == "pdl-0.4":
            return np.full(4, pdl[bucket])
        return np.full(4, {None: 3.0 + dial[reading.variant], "rare": 9.0 - 2 * dial[reading.variant]}[bucket])

    monkeypatch.setattr(type(evidence), "nll", made_up)
    for undone in (PDL, Reading("pdl-0.4", "undone")):
        found = list(at_equal_nll(evidence, undone))
        assert [(one.against, one.estimate.value, one.note) for one in found] == [
            ("adjusted logits", pytest.approx(-1), ""),
            ("temperature", pytest.approx(-1), ""),
        ]
    pdl[None] = 2.5  # better than cross entropy overall: held against cross entropy as it is
    assert [(one.estimate.value, one.note) for one in at_equal_nll(evidence, PDL)] == 2 * [
        (-2, "better overall than any setting")
    ]
    pdl[None] = 6.5  # as bad as adjusted by between .75 and 1, worse than any temperature
    adjusted, temperature = at_equal_nll(evidence, PDL)
    assert (adjusted.estimate.value, adjusted.note) == (pytest.approx(7 - 2), "")
    assert (np.isnan(temperature.estimate.value), temperature.note) == (True, "worse overall than any setting")
