"""A whole experiment in small: in which order, with which learning rates, and what is recorded of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.quality import CROSS_ENTROPY, NEW_TOKENS, PDL, TINY, UNTOUCHED, one_line, record_of, same

from benchmarks.quality import matrix, records
from benchmarks.quality.arms import ALPHAS, ARMS, MAIN_ARMS, NATURAL
from benchmarks.quality.decoding import Transform, decode
from benchmarks.quality.errors import UserError
from benchmarks.quality.matrix import Run, best_rate, plan, run_all
from benchmarks.quality.metrics.per_text import common_words_of
from benchmarks.quality.metrics.words import ngrams, words
from benchmarks.quality.scoring import find_targets
from benchmarks.quality.tasks.pairs import Pair
from benchmarks.quality.training import Validation

# The order of the runs


def test_the_main_arms_come_first_with_one_seed_in_every_task():
    runs = plan(["dialogue", "style"], ["untouched", "pdl-paper", "cross-entropy", "pdl-1"], [0, 1])
    assert [(run.task, run.arm, run.seed) for run in runs] == [
        *((task, arm, 0) for task in ("dialogue", "style") for arm in ("untouched", "cross-entropy", "pdl-1")),
        *((task, arm, 1) for task in ("dialogue", "style") for arm in ("cross-entropy", "pdl-1")),
        *((task, "pdl-paper", seed) for seed in (0, 1) for task in ("dialogue", "style")),
    ]


def test_the_untouched_model_is_run_once_whichever_seeds_are_asked_for():
    assert plan(["style"], ["untouched", "focal"], [2, 1]) == [
        Run("style", "untouched", 0), Run("style", "focal", 2), Run("style", "focal", 1)
    ]  # fmt: skip


def test_everything_is_planned_once_and_the_untouched_model_with_one_seed():
    runs = plan(["dialogue", "style"], list(ARMS), [0, 1, 2])
    assert len(set(runs)) == len(runs) == 2 * (1 + 3 * (len(ARMS) - 1))
    untouched = [run for run in runs if run.arm == "untouched"]
    assert untouched == [Run("dialogue", "untouched", 0), Run("style", "untouched", 0)]
    assert {run.arm for run in runs[: 2 * len(MAIN_ARMS)]} == set(MAIN_ARMS)


# What is recorded


def test_a_record_tells_all_of_a_run(finished):
    experiment = finished[CROSS_ENTROPY]
    record = record_of(experiment, CROSS_ENTROPY)
    assert (record["task"], record["arm"], record["seed"]) == ("dialogue", "cross-entropy", 0)
    assert record["settings"] == json.loads(json.dumps(TINY.facts()))
    assert len(record["losses"]) == TINY.steps == 6
    assert record["losses"][-1] < record["losses"][0]
    assert set(record["learning_rate"]["tried"]) == {"0.001", "0.01"}
    assert record["environment"]["compute_dtype"] == "float32"
    assert set(record["seconds"]) == {"learning rate", "training", "scoring", "writing", "text scores"}
    held_out = experiment.prepared("dialogue").states["held_out"].encoded
    assert np.sum(record["tokens"], axis=1).tolist() == [len(one.targets) for one in held_out]

    adjusted = [NATURAL, *(f"adjusted-{tau:g}" for tau in ALPHAS)]
    heated, seen = [f"temperature-{value}" for value in ("0.7", "1.15", "1.3", "1.6")], "adjusted-0.4-seen"
    assert list(record["nll"]) == list(record["correct"]) == [*adjusted, *heated, seen]
    both = {name: [f"{name} greedy", f"{name} sampled"] for name in (*adjusted, seen)}
    sampled = [f"{name} sampled" for name in heated]
    assert list(record["texts"]) == [*(text for name in adjusted for text in both[name]), *sampled, *both[seen]]
    for kept in record["texts"].values():
        assert len(kept["texts"]) == len(kept["ended"]) == len(kept["tokens"]) == 6
        for ended, length in zip(kept["ended"], kept["tokens"], strict=True):
            assert length < NEW_TOKENS if ended else length == NEW_TOKENS
        assert {len(values) for values in kept["scores"].values()} == {6}


def test_parts_are_kept_until_the_record_is_written(finished):
    kept = {path.suffix for path in finished[PDL].cache.folder.glob("dialogue/*seed*")}
    assert kept == {".lock"}


def test_a_task_is_described_without_its_texts(finished):
    experiment = finished[CROSS_ENTROPY]
    document = records.read(records.task_path(experiment.folder, "dialogue"))
    prepared = experiment.prepared("dialogue")
    assert document["pairs"] == {"training": 24, "validation": 6, "held_out": 6}
    assert document["fitting_pairs"] == 60
    assert document["versions"] == {"made-up": "1.0"}
    targets = [token for one in prepared.states["training"].encoded for token in one.targets]
    assert (document["training_targets"], document["types"]) == (len(targets), len(set(targets)))
    assert document["held_out_digest"] == record_of(finished[PDL], PDL)["held_out_digest"] == prepared.digest()
    references = [pair.reference for pair in prepared.pairs["training"]]
    assert document["common_words"] == sorted(common_words_of(references))
    held_out = prepared.pairs["held_out"]
    assert [sample["reference"] for sample in document["samples"]] == [pair.reference for pair in held_out[:3]]
    assert document["references"]["scores"]["rouge_l"] == [1000] * 6
    assert document["references"]["words"] == [len(words(pair.reference)) for pair in held_out]
    numbers = document["held_out_groups"]
    assert len(set(zip(numbers, [pair.group for pair in held_out], strict=True))) == len(set(numbers))
    assert max(numbers) + 1 == document["groups"]["held_out"] == len(set(numbers))
    assert matrix.numbered(["b", "a", "b", "c"]) == [0, 1, 0, 2]
    pairs_of_words = [set(ngrams(words(pair.reference), 2)) for pair in held_out]
    assert sum(document["references"]["word_pairs"]) == sum(map(len, pairs_of_words))
    assert len(document["references"]["word_pairs"]) == len(set.union(*pairs_of_words))
    assert matrix.texts_with(["a b a b a b", "b a", "a c"]) == [2, 1, 1]
    groups = [{pair.group for pair in pairs} for pairs in prepared.pairs.values()]
    assert document["groups"] == dict(zip(document["pairs"], map(len, groups), strict=True))
    assert sum(map(len, groups)) == len(set.union(*groups)), "no two parts share a group"


def test_recorded_scores_are_those_of_the_recorded_texts(finished):
    prepared = finished[PDL].prepared("dialogue")
    record = record_of(finished[PDL], PDL)
    for kept in record["texts"].values():
        scores = matrix.scores_against_references(kept["texts"], prepared.pairs["held_out"], prepared.common_words)
        assert kept["scores"] == scores
    assert any(sum(kept["scores"]["chrf"]) for kept in record["texts"].values())


@pytest.mark.usefixtures("_scores")
def test_a_text_is_also_scored_without_what_it_has_more_than_its_reference():
    pairs = [Pair(("Where?",), "The kite flew north.", "g"), Pair(("Is it fine?",), "Yes.", "g")]
    texts = ["The kite flew north. Then an ox came home.", ""]
    found = matrix.scores_against_references(texts, pairs, frozenset({"the", "then", "an"}))
    assert found["rouge_l_others"] == [0, 0], "there is no other group"
    apart = [replace(pairs[0], group="h"), pairs[1]]
    assert matrix.scores_against_references(["Yes, yes.", "The kite!"], apart, frozenset())["rouge_l_others"] == [
        667,
        667,
    ]
    assert found["cut_rouge_l"] == [1000, 0]
    assert found["rouge_l"] == [615, 0]  # 4 of 9 words and 4 of 4: 8 / 13
    assert (found["rare_predicted"], found["cut_rare_predicted"]) == ([6, 0], [3, 0])
    assert (found["rare_hits"], found["cut_rare_hits"]) == ([3, 0], [3, 0])
    assert found["cut_chrf"][0] > found["chrf"][0]
    assert (found["content"], found["rare_wanted"]) == ([5, 0], [3, 1])


@pytest.mark.parametrize(
    ("run", "strengths"),
    [
        (CROSS_ENTROPY, {NATURAL: (0, 1), **{f"adjusted-{tau:g}": (1, tau) for tau in ALPHAS}}),
        (PDL, {NATURAL: (0, 1), "half-undone": (-0.5, 1), "undone": (-1, 1)}),
    ],
)
def test_log_weights_are_added_to_cross_entropy_and_taken_from_pdl(finished, run, strengths):
    """In the NLL of each bucket and in both kinds of texts; `strengths` are {variant: (factor of log w, alpha)}."""
    record, prepared, model = record_of(finished[run], run), finished[run].prepared("dialogue"), finished[run].model
    targets = find_targets(model, prepared.states["held_out"])
    uniforms = {"greedy": None, "sampled": torch.rand(6, NEW_TOKENS, generator=torch.Generator().manual_seed(run.seed))}
    seen = set()
    for name, (factor, alpha) in strengths.items():
        weights = ARMS[f"pdl-{alpha:g}"].table(prepared.counts)
        bias = factor * weights.log()
        log_p = (model.logits(targets.states) + bias).detach().double().log_softmax(-1)
        nll = np.zeros((6, 3))
        for prompt, label, row in zip(targets.prompts.tolist(), targets.labels.tolist(), log_p, strict=True):
            nll[prompt, prepared.bucket_of[label]] -= 1000 * float(row[label])
        np.testing.assert_allclose(record["nll"][name], nll, atol=1)
        for mode, numbers in uniforms.items():
            upper = model.upper_for_decoding()
            answers = decode(model, upper, prepared.prompts, Transform(bias), NEW_TOKENS, numbers, "tests")
            kept = record["texts"][f"{name} {mode}"]
            texts = [model.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in answers]
            assert kept["texts"] == texts
            assert kept["ended"] == [int(one.ended) for one in answers]
            seen.add((mode, json.dumps(texts)))
    assert len(seen) > len(strengths), "a bias changes texts"
    assert (weights.log().abs() > 0.1).sum() > 10


def test_untouched_is_the_model_as_it_came_whatever_ran_before(finished, make_experiment):
    experiment = make_experiment()
    run_all(experiment, [PDL, UNTOUCHED])
    untouched, trained = record_of(experiment, UNTOUCHED), record_of(experiment, PDL)
    assert same(untouched) == same(record_of(finished[UNTOUCHED], UNTOUCHED))
    assert same(trained) == same(record_of(finished[PDL], PDL))
    assert (untouched["losses"], untouched["learning_rate"], list(untouched["nll"])) == ([], None, [NATURAL])
    assert untouched["nll"][NATURAL] != trained["nll"][NATURAL]


def test_arms_share_batches_and_random_numbers_and_seeds_do_not(make_experiment, count_calls):
    decodings, trainings = count_calls("decode"), count_calls("train")
    chosen = [("focal", 0), ("inverse-square-root", 0), ("focal", 1)]
    run_all(make_experiment(), [Run("dialogue", arm, seed) for arm, seed in chosen])
    numbers = [arguments[5] for arguments in decodings if arguments[5] is not None]
    assert numbers[0].shape == (6, NEW_TOKENS)
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[2])
    batches = [arguments[4] for arguments in trainings if len(arguments[4]) == TINY.steps]
    assert batches[0] == batches[1]
    assert batches[0] != batches[2]
    searches = [arguments[4] for arguments in trainings if len(arguments[4]) != TINY.steps]
    assert searches == [batches[0][: TINY.search_steps]] * 4, "two rates for each arm, once for its seeds"


# The learning rate


def test_the_learning_rate_with_the_smallest_number_is_chosen_and_never_one_that_diverged():
    tried = {
        "0.1": {"nll": float("nan"), "own": 3.0},
        "0.2": {"nll": 2.0, "own": 1.0},
        "0.3": {"nll": 1.5, "own": float("inf")},
        "0.4": {"nll": 1.7, "own": 0.5},
    }
    assert best_rate(tried, "nll") == "0.3"
    assert best_rate(tried, "own") == "0.4"
    with pytest.raises(UserError, match=r"every learning rate diverged \(0\.1\)"):
        best_rate({"0.1": tried["0.1"]}, "nll")


def test_validation_chooses_by_the_calibrated_model_and_tells_the_other_choice(make_experiment, monkeypatch):
    numbers = iter([Validation(calibrated_nll=3.0, own_loss=1.0), Validation(calibrated_nll=2.0, own_loss=2.0)])
    monkeypatch.setattr(matrix, "validate", lambda *arguments: next(numbers))
    run = Run("dialogue", "focal", 0)
    experiment = make_experiment()
    run_all(experiment, [run])
    rates = record_of(experiment, run)["learning_rate"]
    assert (rates["chosen"], rates["by_own_loss"]) == (0.01, 0.001)


def search(make_experiment, monkeypatch, nll_of, rates=(2e-4, 6e-4, 2e-3)):
    """What is recorded of a search where validation says `nll_of(rate)`."""
    given = []
    monkeypatch.setattr(matrix, "FURTHER_RATES", 3)
    monkeypatch.setattr(matrix, "train", lambda *arguments: given.append(arguments[5]) or [1.0])
    monkeypatch.setattr(matrix, "validate", lambda *arguments: Validation(nll_of(given[-1]), own_loss=1.0))
    experiment = make_experiment(settings=replace(TINY, learning_rates=rates))
    found = experiment.choose_learning_rate(
        Run("dialogue", "focal", 0), ARMS["focal"], None, experiment.prepared("dialogue")
    )
    assert [f"{rate:g}" for rate in given] == list(found["tried"])
    return list(found["tried"]), found["chosen"]


@pytest.mark.parametrize(
    ("best", "further", "chosen"),
    [
        (6e-4, [], 6e-4),
        (2e-3, ["0.006"], 2e-3),
        (6e-3, ["0.006", "0.02"], 6e-3),
        (1.0, ["0.006", "0.02", "0.06"], 6e-2),  # at most three more
        (2e-4, ["7e-05"], 2e-4),
        (7e-5, ["7e-05", "2e-05"], 7e-5),
        (1e-9, ["7e-05", "2e-05", "7e-06"], 7e-6),
    ],
)
def test_the_search_goes_on_while_the_best_rate_is_at_an_end(make_experiment, monkeypatch, best, further, chosen):
    found = search(make_experiment, monkeypatch, lambda rate: abs(np.log(rate / best)))
    assert found == (["0.0002", "0.0006", "0.002", *further], chosen)


def test_a_further_rate_that_diverges_ends_the_search(make_experiment, monkeypatch):
    found = search(make_experiment, monkeypatch, lambda rate: -rate if rate < 0.005 else float("nan"))
    assert found == (["0.0002", "0.0006", "0.002", "0.006"], 2e-3)


def test_a_single_rate_is_taken_as_it_is(make_experiment, monkeypatch):
    assert search(make_experiment, monkeypatch, lambda rate: rate, rates=(6e-4,)) == (["0.0006"], 6e-4)


def test_a_learning_rate_that_diverges_is_not_chosen_even_if_it_is_the_first(make_experiment):
    experiment, run = make_experiment(settings=replace(TINY, learning_rates=(1e30, 1e-3))), Run("dialogue", "focal", 0)
    run_all(experiment, [run])
    record = record_of(experiment, run)
    assert record["learning_rate"]["chosen"] == record["learning_rate"]["by_own_loss"] == 1e-3
    assert np.isnan(record["learning_rate"]["tried"]["1e+30"]["calibrated_nll"])
    assert np.isfinite(record["losses"]).all()


def test_without_a_learning_rate_that_works_there_is_nothing_to_compare(make_experiment):
    experiment = make_experiment(settings=replace(TINY, learning_rates=(1e30, 1e35)))
    with pytest.raises(UserError) as caught:
        run_all(experiment, [CROSS_ENTROPY])
    assert "every learning rate diverged (1e+30, 1e+35)" in one_line(caught)
    assert not records.record_path(experiment.folder, "dialogue", "cross-entropy", 0).exists()


def test_the_learning_rate_is_found_once_for_all_seeds_even_without_the_cache(make_experiment, count_calls):
    trainings = count_calls("train")
    first, second = (Run("dialogue", "focal", seed) for seed in (0, 1))
    run_all(make_experiment(), [first])
    assert len(trainings) == 3
    run_all(make_experiment(), [second])
    assert len(trainings) == 4
    experiment = make_experiment(cache="another")
    records.record_path(experiment.folder, "dialogue", "focal", 1).unlink()
    run_all(experiment, [second])
    assert len(trainings) == 5
    assert record_of(experiment, second)["learning_rate"] == record_of(experiment, first)["learning_rate"]
