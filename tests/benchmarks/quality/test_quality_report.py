"""The report's numbers are those of its records, its pages hold what is generated, and nothing else gets in."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

for package in ("matplotlib", "rouge_score", "sacrebleu", "transformers"):
    pytest.importorskip(package)

from helpers.quality_records import SETTINGS, write_records  # noqa: E402

from benchmarks.quality import records  # noqa: E402
from benchmarks.quality.arms import ARMS  # noqa: E402
from benchmarks.quality.errors import UserError  # noqa: E402
from benchmarks.quality.intervals import Estimate, best_diversity_at  # noqa: E402
from benchmarks.quality.metrics.corpus import Types  # noqa: E402
from benchmarks.quality.metrics.words import ngrams, words  # noqa: E402
from benchmarks.quality.report import page, plots, tables  # noqa: E402
from benchmarks.quality.report.comparisons import (  # noqa: E402
    CROSS_ENTROPY,
    CURVES,
    Answer,
    answers,
    at_equal_diversity,
    at_equal_quality,
    heated,
)
from benchmarks.quality.report.evidence import Reading, load_task, rarefied  # noqa: E402

PDL = Reading("pdl-0.4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("records")
    write_records(made, tasks=("dialogue", "summarisation"))
    return made


@pytest.fixture(scope="module")
def evidence(folder):
    return load_task(folder, "dialogue", resamples=40)


def runs_of(folder, arm, task="dialogue"):
    return [records.read(records.record_path(folder, task, arm, seed)) for seed in range(3)]


class TestSeries:
    def test_nll_is_the_mean_of_the_seeds(self, folder, evidence):
        for bucket, column in ((None, slice(None)), ("rare", slice(2, 3))):
            means = []
            for run in runs_of(folder, "pdl-0.4"):
                nll, tokens = np.array(run["nll"]["natural"])[:, column], np.array(run["tokens"])[:, column]
                means.append(nll.sum() / tokens.sum() / 1000)
            assert evidence.nll(PDL, bucket)[0] == pytest.approx(np.mean(means))

    def test_measures_of_texts(self, folder, evidence):
        rouge, distinct, f1 = [], [], []
        for run in runs_of(folder, "pdl-0.4"):
            kept = run["texts"]["natural sampled"]
            rouge.append(np.mean(kept["scores"]["rouge_l"]) / 1000)
            pairs = [pair for text in kept["texts"] for pair in ngrams(words(text), 2)]
            distinct.append(len(set(pairs)) / len(pairs))
            wanted = np.sum(evidence.document["references"]["scores"]["rare_wanted"])
            f1.append(2 * np.sum(kept["scores"]["rare_hits"]) / (np.sum(kept["scores"]["rare_predicted"]) + wanted))
        assert evidence.series(PDL, "sampled", "rouge_l")[0] == pytest.approx(np.mean(rouge))
        assert evidence.series(PDL, "sampled", "distinct_2")[0] == pytest.approx(np.mean(distinct))
        assert evidence.series(PDL, "sampled", "rare_f1")[0] == pytest.approx(np.mean(f1))

    def test_quality_is_what_a_text_scores_more_with_its_own_reference(self, folder, evidence):
        expected = []
        for run in runs_of(folder, "pdl-0.4"):
            scores = run["texts"]["natural greedy"]["scores"]
            expected.append((np.mean(scores["rouge_l"]) - np.mean(scores["rouge_l_others"])) / 1000)
        assert evidence.series(PDL, "greedy", "own_rouge_l")[0] == pytest.approx(np.mean(expected))

    def test_prompts_of_a_group_are_resampled_together(self, evidence):
        groups, prompts = evidence.document["held_out_groups"], evidence.resamples.prompts
        assert groups[:4] == [0, 0, 1, 1]
        assert (prompts[:, 0] == prompts[:, 1]).all()
        assert (prompts[:, 1] != prompts[:, 2]).any()

    def test_one_seed_of_the_untouched_model_stands_for_all(self, folder, evidence):
        kept = records.read(records.record_path(folder, "dialogue", "untouched", 0))["texts"]["natural greedy"]
        expected = np.mean(kept["scores"]["rouge_l"]) / 1000
        assert evidence.series(Reading("untouched"), "greedy", "rouge_l")[0] == pytest.approx(expected)

    def test_diversity_is_measured_on_equally_many_pairs(self, evidence):
        assert evidence.pairs % 100 == 0
        fewest = min(
            evidence.text_set(reading, mode, seed).word_pairs()
            for reading in (PDL, CROSS_ENTROPY)
            for mode in ("greedy", "sampled")
            for seed in evidence.seeds
        )
        assert fewest / 2 < evidence.pairs <= fewest

    def test_rarefied_references(self):
        # Of two texts with two words each, a a and a b, one is drawn: it has one or two types.
        assert rarefied(np.array([2, 1]), np.array([2, 2]), 2) == pytest.approx(1.5 / 2)
        texts = [["a", "b", "a"], ["b", "c"], ["d", "a", "c", "e"]]
        types = Types(texts, 1)
        for size in (3, 5, 9):
            expected = types.rarefied(size, np.ones((1, 3), dtype=np.int64))[0]
            assert rarefied(np.array([2, 2, 2, 1, 1]), np.array([3, 2, 4]), size) == pytest.approx(expected)

    def test_diversity_of_the_references(self, evidence):
        texts = [["a", "b", "c"], ["a", "b"], [], ["d"]]
        references = evidence.document["references"] | {"words": [3, 2, 0, 1], "word_pairs": [2, 1]}
        made_up = replace(evidence, document=evidence.document | {"references": references}, pairs=2)
        expected = Types(texts, 2).rarefied(2, np.ones((1, 4), dtype=np.int64))[0]
        assert made_up.of_references()["diversity"] == pytest.approx(expected)

    def test_seeds_that_an_arm_lacks_are_left_out(self, tmp_path):
        write_records(tmp_path, tasks=("style",), arms=("untouched", "cross-entropy", "pdl-1"))
        records.record_path(tmp_path, "style", "pdl-1", 1).unlink()
        assert load_task(tmp_path, "style", resamples=5).seeds == [0, 2]

    def test_an_arm_counts_when_it_has_all_seeds_of_the_main_arms(self, tmp_path):
        write_records(tmp_path, tasks=("dialogue",), arms=("cross-entropy", "pdl-1", "focal"))
        records.record_path(tmp_path, "dialogue", "focal", 2).unlink()
        without = load_task(tmp_path, "dialogue", resamples=2)
        assert (without.arms, without.seeds) == (["cross-entropy", "pdl-1"], [0, 1, 2])
        records.record_path(tmp_path, "dialogue", "pdl-1", 2).unlink()
        both = load_task(tmp_path, "dialogue", resamples=2)
        assert (both.arms, both.seeds) == (["cross-entropy", "pdl-1", "focal"], [0, 1])

    def test_records_of_other_settings_are_refused(self, tmp_path):
        write_records(tmp_path, tasks=("style",), arms=("cross-entropy", "pdl-1"))
        path = records.record_path(tmp_path, "style", "pdl-1", 2)
        run = records.read(path)
        run["settings"]["batch_size"] = SETTINGS.batch_size + 1
        records.write(path, run)
        with pytest.raises(UserError, match=r"pdl-1-seed2\.json\.xz was made with other settings"):
            load_task(tmp_path, "style", resamples=5)


class TestQuestions:
    def test_differences_are_paired(self, evidence):
        found = {(one.question, one.mode, one.arm, one.measure, one.against): one.estimate for one in answers(evidence)}
        change = evidence.series(PDL, "sampled", "rouge_l") - evidence.series(CROSS_ENTROPY, "sampled", "rouge_l")
        asked = found["natural", "sampled", "pdl-0.4", "rouge_l", "cross entropy"]
        assert asked.value == pytest.approx(change[0])
        assert asked.high - asked.value == pytest.approx(1.96 * np.std(change[1:], ddof=1))

    def test_the_adjusted_baseline_has_the_same_exponent(self, evidence):
        against = {(one.arm, one.against) for one in answers(evidence) if one.question == "adjusted"}
        assert ("pdl-0.25", "cross entropy, logits adjusted by 0.25") in against
        assert ("pdl-paper", "cross entropy, logits adjusted by 1") in against
        assert len(against) == 5

    def test_undone_is_compared_with_cross_entropy(self, evidence):
        change = evidence.nll(Reading("pdl-1", "undone"), "rare") - evidence.nll(CROSS_ENTROPY, "rare")
        found = [one for one in answers(evidence) if (one.question, one.arm) == ("undone", "pdl-1")]
        assert [one.measure for one in found] == ["nll all", "nll frequent", "nll medium", "nll rare"]
        assert found[-1].estimate.value == pytest.approx(change[0])

    def test_curves_and_who_is_held_against_them(self, evidence):
        for question in ("equal quality", "equal diversity"):
            found = [one for one in answers(evidence) if one.question == question]
            assert {(one.mode, one.against) for one in found} == {
                (mode, curve) for mode in ("greedy", "sampled") for curve in ("adjusted logits", "temperature")
            }
            halves = {("pdl-0.4", "half-undone"), ("pdl-1", "half-undone")}
            arms = {(arm, "natural") for arm in ARMS if arm.startswith("pdl-")}
            assert {(one.arm, one.variant) for one in found} == arms | halves

    def test_inner_settings_are_held_against_the_line_between_the_others(self, evidence):
        found = {(one.mode, one.against, one.variant) for one in answers(evidence) if one.question == "straight lines"}
        adjusted = [f"adjusted-{tau}" for tau in (0.25, 0.4, 0.75)]
        assert found == {
            *((mode, "adjusted logits", variant) for mode in ("greedy", "sampled") for variant in adjusted),
            *(
                ("sampled", "temperature", variant)
                for variant in ("natural", *(f"temperature-{t}" for t in (0.7, 1.15, 1.3)))
            ),
        }

    def test_the_temperature_begins_with_greedy_texts(self):
        sampled = ["temperature-0.7", "natural", "temperature-1.15", "temperature-1.3", "temperature-1.6"]
        expected = [("natural", "greedy"), *((variant, "sampled") for variant in sampled)]
        for mode in ("greedy", "sampled"):
            assert [(reading.variant, one) for reading, one in heated(mode)] == expected

    def test_a_setting_of_the_baseline_is_held_against_the_others_and_at_its_diversity_is_itself(self, evidence):
        for mode, variant, curve in (
            ("sampled", "temperature-1.15", "temperature"),
            ("greedy", "adjusted-0.25", "adjusted logits"),
        ):
            own = Reading("cross-entropy", variant)
            (gain,) = at_equal_quality(evidence, mode, own, curve)
            others = [point for point in CURVES[curve](mode) if point != (own, mode)]
            series = (
                [evidence.series(*point, measure) for point in others] for measure in ("own_rouge_l", "diversity")
            )
            line = best_diversity_at(*map(np.stack, series), evidence.series(own, mode, "own_rouge_l"))
            change = evidence.series(own, mode, "diversity") - line
            assert gain.estimate.value == pytest.approx(change[0], nan_ok=True)
            quality, f1 = at_equal_diversity(evidence, mode, own, curve)
            assert (quality.measure, f1.measure) == ("own_rouge_l", "rare_f1")
            assert (quality.estimate.value, f1.estimate.value) == pytest.approx((0, 0))

    def test_what_is_beyond_a_curve_is_noted(self, monkeypatch, evidence):
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


class TestTables:
    def test_numbers(self):
        assert tables.number("rouge_l", Estimate(0.1234, 0.1134, 0.1334)) == "12.3 ±1.0"
        assert tables.number("nll", Estimate(-0.5, -0.6, -0.4), signed=True) == "**\N{MINUS SIGN}0.50 ±0.10**"
        assert tables.number("nll rare", Estimate(0.5, -0.1, 1.1), signed=True) == "+0.50 ±0.60"
        assert tables.number("words", Estimate(float("nan"), 0, 0)) == "n/a"

    def test_each_baseline_has_a_column_where_curves_are_compared(self, evidence):
        found = list(answers(evidence))
        head = tables.question_table(found, "equal quality", "sampled").splitlines()[0]
        assert head == "|  | distinct pairs, against adjusted logits | distinct pairs, against temperature |"
        head = tables.question_table(found, "natural", "sampled").splitlines()[0]
        assert head.startswith("|  | distinct pairs | ROUGE-L above chance | ROUGE-L |")

    def test_cells_say_what_the_number_alone_would_hide(self):
        def cell(value, seeds=3, note=""):
            one = Estimate(value, value - 0.01, value + 0.01)
            return tables.cell(Answer("", "", "", "pdl-1", "natural", "", "diversity", one, seeds, note))

        assert cell(0.05) == "**+5.0 ±1.0**"
        assert cell(0.05, seeds=1) == "+5.0 ±1.0"
        assert cell(0.05, note="better than any setting") == "**+5.0 ±1.0** (better than any setting)"
        assert cell(float("nan"), note="poorer than any setting") == "poorer than any setting"
        assert cell(float("nan")) == "n/a"

    def test_a_table_has_every_reading_and_fits_its_head(self, evidence):
        rows = tables.main_table(evidence).splitlines()
        assert len({row.count("|") for row in rows}) == 1
        titles = [row.split("|")[1].strip() for row in rows]
        assert "cross entropy, logits adjusted by 0.75" in titles
        assert "PDL alpha 1, shift half undone" in titles
        assert len(rows) == 3 + 9 + len(ARMS) + 2 * 5  # head, references; baselines; arms; shifts of five arms

    def test_content_words_in_the_source_only_where_that_means_something(self, folder, evidence):
        assert "content words in the source" not in tables.main_table(evidence)
        assert "content words in the source" in tables.main_table(load_task(folder, "summarisation", resamples=5))

    @pytest.mark.parametrize(
        ("chosen", "own_loss", "tried", "cell"),
        [
            (6e-4, 6e-4, ("0.0002", "0.0006", "0.002"), "0.0006"),
            (6e-4, 2e-3, ("0.0002", "0.0006", "0.002"), "0.0006 (own loss: 0.002)"),
            (2e-4, 2e-4, ("0.0002", "0.0006"), "0.0002 (the smallest tried)"),
            (6e-4, 2e-4, ("0.0002", "0.0006"), "0.0006 (the largest tried; own loss: 0.0002)"),
        ],
    )
    def test_how_the_search_for_a_learning_rate_ended(self, chosen, own_loss, tried, cell):
        search = {"tried": dict.fromkeys(tried), "chosen": chosen, "by_own_loss": own_loss}
        made_up = SimpleNamespace(name="dialogue", seeds=[0], runs={("focal", 0): {"learning_rate": search}})
        *_, row = tables.learning_rates([made_up]).strip().splitlines()
        assert row == f"| focal loss, gamma 2 | {cell} |"


class TestPlots:
    def test_the_frontier_is_where_the_tables_say(self, evidence, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
        plots.plot_frontier([evidence], tmp_path / "unused.png", modes=("sampled",))
        (axis,) = drawn[0].axes
        marks = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        for label, reading in (("cross entropy", CROSS_ENTROPY), ("untouched", Reading("untouched"))):
            at = [100 * evidence.series(reading, "sampled", measure)[0] for measure in ("own_rouge_l", "diversity")]
            assert marks[label].lines[0].get_xydata()[0] == pytest.approx(at)
        references = 100 * evidence.of_references()["diversity"]
        assert marks["the references"].get_ydata()[0] == pytest.approx(references)
        labels = {(text.get_text(), text.get_color()) for text in axis.texts}
        for name, dial in (("temperature", "1.6"), ("adjusted logits", "0.4"), ("PDL", "0.4")):
            assert (dial, plots.COLOURS[name]) in labels


class TestPage:
    def test_every_machine_and_commit_is_told(self, evidence):
        def run(device, commit, seconds):
            return {"environment": {"device": device, "commit": commit}, "seconds": {"training": seconds}}

        runs = {("focal", 0): run("Xeon", "b", 10.0), ("focal", 1): run("EPYC", "a", 5.0)}
        made_up = replace(evidence, runs=runs)
        (line,) = page.cost([made_up]).splitlines()
        assert "training 15 s;" in line
        assert "EPYC, Xeon; 1 thread(s) a process" in line
        assert line.endswith("commits a, b.")

    def test_it_is_filled_between_its_marks(self, folder):
        evidences = [load_task(folder, "dialogue", resamples=5)]
        made = page.blocks(evidences, list(answers(evidences[0])))
        text = "before\n<!-- generated: dialogue main -->\nold\n<!-- end -->\nafter\n"
        text += "<!-- generated: style main -->\n<!-- end -->\n"
        filled = page.fill(text, made)
        assert filled.startswith("before\n")
        assert "\nafter\n" in filled
        assert "old" not in filled
        assert "| PDL alpha 0.4 |" in filled
        assert "*Not measured yet.*" in filled
        assert page.fill(filled, made) == filled

    def test_texts_cannot_break_the_page(self):
        assert page.quoted("a *b*\n| <c> `d`") == r"a \*b\* \| \<c\> \`d\`"
        assert page.quoted(" \n") == "(nothing)"

    def test_the_same_records_give_the_same_files(self, folder, tmp_path, monkeypatch):
        source = "<!-- generated: dialogue equal quality sampled -->\n<!-- end -->\n"
        written = []
        for name in ("first", "second"):
            for place in ("PAGE", "TABLES"):
                path = tmp_path / f"{name}-{place}.md"
                path.write_text(source)
                monkeypatch.setattr(page, place, path)
            page.write_report(folder)
            files = [tmp_path / f"{name}-PAGE.md", folder / "summary.json", folder / "frontier.png", folder / "nll.png"]
            written.append([path.read_bytes() for path in files])
        assert written[0] == written[1]
        summary = json.loads(written[0][1])
        assert set(summary["tasks"]) == {"dialogue", "summarisation"}

    def test_no_records(self, tmp_path):
        with pytest.raises(UserError, match="has no records"):
            page.load(tmp_path)


FOLDER = page.ROOT / "benchmarks" / "results" / "quality" / "cpu"


@pytest.fixture(scope="module")
def found():
    evidences = page.load(FOLDER)
    return evidences, [answer for evidence in evidences for answer in answers(evidence)]


class TestRecorded:
    """What is committed: the pages and the summary are those that the records give."""

    def test_every_number_of_the_summary(self, found):
        recorded = json.loads((FOLDER / "summary.json").read_text())
        assert same_numbers(page.summarise(*found), recorded)

    @pytest.mark.parametrize("path", [page.PAGE, page.TABLES], ids=lambda path: path.name)
    def test_every_table(self, found, path):
        text = path.read_text()
        assert page.fill(text, page.blocks(*found)) == text


def same_numbers(made, recorded):
    """Equal up to the last of six digits, which libraries round differently."""
    if isinstance(made, dict):
        return made.keys() == recorded.keys() and all(same_numbers(made[key], recorded[key]) for key in made)
    if isinstance(made, list):
        return len(made) == len(recorded) and all(map(same_numbers, made, recorded))
    if isinstance(made, float):
        return recorded == pytest.approx(made, rel=1e-4, abs=1e-9)
    return made == recorded
