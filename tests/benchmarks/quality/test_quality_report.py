"""The report's numbers are those of its records, its pages hold what is generated, and nothing else gets in."""

import errno
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
from benchmarks.quality.intervals import Estimate, estimate  # noqa: E402
from benchmarks.quality.metrics.corpus import Types  # noqa: E402
from benchmarks.quality.metrics.words import ngrams, words  # noqa: E402
from benchmarks.quality.report import page, plots, tables  # noqa: E402
from benchmarks.quality.report.comparisons import (  # noqa: E402
    CROSS_ENTROPY,
    Answer,
    answers,
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

    def test_the_untouched_model_has_a_seed_of_its_own(self, tmp_path):
        write_records(tmp_path, tasks=("style",), arms=("untouched", "cross-entropy", "pdl-1"))
        whole = load_task(tmp_path, "style", resamples=5).nll(Reading("untouched"))[0]
        records.record_path(tmp_path, "style", "pdl-1", 0).unlink()
        without = load_task(tmp_path, "style", resamples=5)
        assert without.seeds == [1, 2]
        assert without.nll(Reading("untouched"))[0] == pytest.approx(whole)

    def test_records_of_other_settings_are_refused(self, tmp_path):
        write_records(tmp_path, tasks=("style",), arms=("cross-entropy", "pdl-1"))
        path = records.record_path(tmp_path, "style", "pdl-1", 2)
        run = records.read(path)
        run["settings"]["batch_size"] = SETTINGS.batch_size + 1
        records.write(path, run)
        with pytest.raises(UserError, match=r"pdl-1-seed2\.json\.xz was made with other settings"):
            load_task(tmp_path, "style", resamples=5)


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

    def test_the_overview_has_a_row_for_each_task_and_mode(self, folder, evidence):
        found = [*answers(evidence), *answers(load_task(folder, "summarisation", resamples=5))]
        head, _, *rows = (row.strip("| ").split(" | ") for row in tables.overview(found).splitlines())
        assert [row[0] for row in rows] == [
            f"{task}, {mode}" for task in ("Dialogue", "Summarisation") for mode in ("greedy", "sampled")
        ]
        (asked,) = [
            one
            for one in found
            if (one.task, one.question, one.mode, one.arm, one.variant, one.against)
            == ("dialogue", "equal quality", "sampled", "pdl-0.4", "natural", "temperature")
        ]
        assert rows[1][1 + head.index("PDL alpha 0.4, against temperature")] == tables.cell(asked)

    def test_a_table_of_both_modes(self, evidence):
        found = list(answers(evidence))
        both = tables.question_table(found, "equal quality", "sampled", "greedy").splitlines()
        alone = tables.question_table(found, "equal quality", "greedy").splitlines()
        assert both[0].split(" | ")[1:3] == [
            "sampled: distinct pairs, against adjusted logits",
            "sampled: distinct pairs, against temperature",
        ]
        for row, expected in zip(both[2:], alone[2:], strict=True):
            assert row.split(" | ")[0] == expected.split(" | ")[0]
            assert row.split(" | ")[3:] == expected.split(" | ")[1:]

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
        assert len(rows) == 3 + len(ARMS) + 4 + 4  # head, references; arms; adjusted; temperatures but 1

    def test_columns_of_the_main_table_hold_their_measures(self, evidence):
        head, _, *rows = (row.split(" | ") for row in tables.main_table(evidence).splitlines())
        (row,) = [row for row in rows if row[0] == "| PDL alpha 0.4"]
        for title, measure, series in (
            ("NLL, rare", "nll", evidence.nll(PDL, "rare")),
            ("sampled: distinct pairs", "diversity", evidence.series(PDL, "sampled", "diversity")),
            ("greedy: rare words: F1", "rare_f1", evidence.series(PDL, "greedy", "rare_f1")),
        ):
            assert row[head.index(title)] == tables.number(measure, estimate(series))
        (references,) = [row for row in rows if row[0] == "| *the references*"]
        words = evidence.of_references()["words"]
        assert references[head.index("sampled: words")] == f"{words:.1f}"

    def test_nll_and_accuracy_by_bucket(self, evidence):
        head, _, *rows = (row.strip(" |").split(" | ") for row in tables.bucket_table(evidence).splitlines())
        buckets = ["all", "frequent", "medium", "rare"]
        assert head == [*(f"NLL, {bucket}" for bucket in buckets), *(f"accuracy, {bucket}" for bucket in buckets)]
        (row,) = [row for row in rows if row[0] == "PDL alpha 0.4"]
        nll, accuracy = estimate(evidence.nll(PDL, "medium")), estimate(evidence.accuracy(PDL, "rare"))
        assert row[3] == f"{nll.value:.2f} ±{nll.high - nll.value:.2f}"
        assert row[8] == f"{100 * accuracy.value:.1f} ±{100 * (accuracy.high - accuracy.value):.1f}"

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
        drawn, spread = [], []
        monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
        monkeypatch.setattr(plots, "_spread_labels", spread.append)
        plots.plot_frontier([evidence], tmp_path / "unused.png", modes=("sampled",))
        (axis,) = drawn[0].axes
        assert spread == [axis]
        marks = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        for label, reading in (("cross entropy", CROSS_ENTROPY), ("untouched", Reading("untouched"))):
            at = [100 * evidence.series(reading, "sampled", measure)[0] for measure in ("own_rouge_l", "diversity")]
            assert marks[label].lines[0].get_xydata()[0] == pytest.approx(at)
        references = 100 * evidence.of_references()["diversity"]
        assert marks["the references"].get_ydata()[0] == pytest.approx(references)
        labels = {(text.get_text(), text.get_color()) for text in axis.texts}
        for name, dial in (("temperature", "1.6"), ("adjusted logits", "0.4"), ("PDL", "0.4")):
            assert (dial, plots.COLOURS[name]) in labels

    def test_nll_by_frequency_is_less_cross_entropy_s(self, evidence, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
        plots.plot_nll([evidence], tmp_path / "unused.png")
        (axis,) = drawn[0].axes
        marks = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        for reading in (PDL, Reading("pdl-1", "undone"), Reading("cross-entropy", "temperature-1.15")):
            expected = [
                (evidence.nll(reading, bucket) - evidence.nll(CROSS_ENTROPY, bucket))[0]
                for bucket in ("frequent", "medium", "rare")
            ]
            assert marks[reading.title].lines[0].get_ydata() == pytest.approx(expected)


class TestPage:
    def test_every_machine_and_commit_is_told(self, evidence):
        def run(device, commit, seconds):
            environment = {"threads": 1, "compute_dtype": "float32", "packages": {"torch": "2.13.0"}}
            return {"environment": environment | {"device": device, "commit": commit}, "seconds": {"training": seconds}}

        runs = [run("Xeon", "b", 10.0), run("EPYC", "a", 5.0), run("Xeon", "b", 3585.0)]
        runs[1]["environment"]["products"] = "float32, rounded"
        made_up = replace(evidence, runs={("focal", seed): one for seed, one in enumerate(runs)})
        (line,) = page.cost([made_up]).splitlines()
        assert "3 models, seeds 0, 1, 2; training 3,600 s, together 1.0 h of a process;" in line
        assert "EPYC (1), Xeon (2); 1 thread(s) a process, float32, products by float32, rounded (1), " in line
        assert "the hardware (2); torch 2.13.0; commits a (1), b (2)." in line

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
        monkeypatch.setattr(page, "FOLDER", folder)
        source = "<!-- generated: dialogue equal quality sampled greedy -->\n<!-- end -->\n"
        written = []
        for name in ("first", "second"):
            for place in ("PAGE", "TABLES"):
                path = tmp_path / f"{name}-{place}.md"
                path.write_text(source)
                monkeypatch.setattr(page, place, path)
            page.write_report(folder, resamples=20)
            files = [tmp_path / f"{name}-PAGE.md", folder / "summary.json", folder / "frontier.png", folder / "nll.png"]
            written.append([path.read_bytes() for path in files])
        assert written[0] == written[1]
        summary = json.loads(written[0][1])
        assert set(summary["tasks"]) == {"dialogue", "summarisation"}

    def test_other_folders_have_tables_of_their_own(self, folder):
        before = [path.read_bytes() for path in (page.PAGE, page.TABLES)]
        page.write_report(folder, resamples=20)
        assert [path.read_bytes() for path in (page.PAGE, page.TABLES)] == before, "they are about other records"
        written = (folder / "tables.md").read_text()
        evidences = page.load(folder, resamples=20)
        found = [answer for one in evidences for answer in answers(one)]
        for name in ("overview", "dialogue main", "summarisation equal quality sampled greedy", "dialogue undone nll"):
            assert f"## {name}\n\n{page.blocks(evidences, found)[name]()}" in written
        assert "## dialogue undone sampled" not in written, "there is no such table"

    def test_a_full_disk(self, folder, monkeypatch):
        def full(path, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        for module in (page, plots):
            with monkeypatch.context() as patched:
                patched.setattr(module, "replace_file", full)
                with pytest.raises(UserError, match="No space left on device"):
                    page.write_report(folder, resamples=20)
        assert not list(folder.glob(".*")), "nothing half-written"

    def test_no_records(self, tmp_path):
        with pytest.raises(UserError, match="has no records"):
            page.load(tmp_path)


@pytest.fixture(scope="module")
def found():
    evidences = page.load(page.FOLDER)
    return evidences, [answer for evidence in evidences for answer in answers(evidence)]


class TestRecorded:
    """What is committed: the pages and the summary are those that the records give."""

    def test_every_number_of_the_summary(self, found):
        recorded = json.loads((page.FOLDER / "summary.json").read_text())
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
