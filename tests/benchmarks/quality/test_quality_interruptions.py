"""The experiment started again, by several processes, or with other settings and data than the first time."""

from dataclasses import replace

import pytest
import torch
from helpers.quality import PDL, TINY, UNTOUCHED, files_in, make_task, one_line, record_of, same, use_task

from benchmarks.quality import matrix, prepare, records
from benchmarks.quality.cache import Cache
from benchmarks.quality.errors import UserError
from benchmarks.quality.matrix import Experiment, Run, run_all

# Starting again


@pytest.mark.parametrize(
    ("name", "call", "error", "trainings_left", "decodings_left"),
    [
        ("train", 2, KeyboardInterrupt, 3, 6),  # of two learning rates, the second
        ("train", 3, KeyboardInterrupt, 1, 6),  # the training itself
        ("decode", 1, KeyboardInterrupt, 0, 6),
        ("decode", 4, ValueError, 0, 3),
        ("score_texts", 5, KeyboardInterrupt, 0, 5),  # twice for the references and twice for each set of texts
    ],
)
def test_an_interrupted_run_goes_on_where_it_was(
    finished, make_experiment, count_calls, name, call, error, trainings_left, decodings_left
):
    calls = count_calls(name, failing=call, error=error)
    with pytest.raises(error):
        run_all(make_experiment(), [PDL])
    assert len(calls) == call
    experiment = make_experiment()
    assert not records.record_path(experiment.folder, "dialogue", "pdl-1", 0).exists()
    trainings, decodings = count_calls("train"), count_calls("decode")
    run_all(experiment, [PDL])
    assert same(record_of(experiment, PDL)) == same(record_of(finished[PDL], PDL))
    assert (len(trainings), len(decodings)) == (trainings_left, decodings_left)
    run_all(make_experiment(), [PDL])
    assert (len(trainings), len(decodings)) == (trainings_left, decodings_left), "what is recorded is not done again"


def test_the_seconds_of_both_starts_are_told(make_experiment, count_calls):
    count_calls("decode", failing=2)
    with pytest.raises(KeyboardInterrupt):
        run_all(make_experiment(), [UNTOUCHED])
    experiment = make_experiment()
    before = experiment.cache.load("dialogue/untouched-seed0.json")["seconds"]
    run_all(experiment, [UNTOUCHED])
    assert set(before) == set(record_of(experiment, UNTOUCHED)["seconds"]) == {"scoring", "writing", "text scores"}
    assert experiment.seconds["writing"] > before["writing"] > 0


def test_interrupted_preparation_goes_on_where_it_was(make_experiment, monkeypatch):
    parts, run_below = [], prepare.run_below

    def interrupted(model, encoded, description):
        parts.append(description.split(", ")[1])
        if len(parts) == 2:
            raise KeyboardInterrupt
        return run_below(model, encoded, description)

    monkeypatch.setattr(prepare, "run_below", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_experiment().prepared("dialogue")
    use_task(monkeypatch, make_task(load=None))  # its pairs are kept
    found = make_experiment().prepared("dialogue")
    assert parts == ["training", "validation", "validation", "held-out"]
    again = make_experiment().prepared("dialogue")
    assert len(parts) == 4
    for part, states in found.states.items():
        assert torch.equal(again.states[part].values, states.values)
        assert again.states[part].offsets == states.offsets
        assert again.states[part].encoded == states.encoded
    assert again.pairs == found.pairs
    assert torch.equal(again.counts.counts, found.counts.counts)


def test_each_task_is_prepared_before_the_first_run(make_experiment, monkeypatch):
    style = make_task("style", seed=1)
    use_task(monkeypatch, style)
    experiment, prepared = make_experiment(), []
    monkeypatch.setattr(Experiment, "run", lambda self, run: prepared.append(prepare.is_prepared(style, self.cache)))
    run_all(experiment, [UNTOUCHED, Run("style", "untouched", 0)])
    assert prepared == [True, True]


def test_one_task_is_in_memory(make_experiment, monkeypatch):
    use_task(monkeypatch, make_task("style", seed=1))
    experiment = make_experiment()
    first, second = experiment.prepared("dialogue"), experiment.prepared("style")
    assert experiment.prepared("style") is second
    assert first.digest() != second.digest()
    assert experiment.prepared("dialogue") is not first


def test_a_run_on_a_full_disk_keeps_what_it_had(finished, make_experiment, monkeypatch, set_disk_full):
    experiment, saved, save = make_experiment(), [], Cache.save

    def save_until_the_disk_is_full(cache, name, value):
        saved.append(name)
        if saved.count("dialogue/pdl-1-seed0.json") == 3:  # its seconds, then two sets of texts
            set_disk_full(True)
        save(cache, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "save", save_until_the_disk_is_full)
        with pytest.raises(UserError, match=r"dialogue/pdl-1-seed0\.json: No space left on device"):
            run_all(experiment, [PDL])
    set_disk_full(False)
    assert [name for name in files_in(experiment.cache.folder) if "/." in name] == []
    assert list(experiment.cache.load("dialogue/pdl-1-seed0.json")["texts"]) == ["natural greedy"]
    run_all(make_experiment(), [PDL])
    assert same(record_of(experiment, PDL)) == same(record_of(finished[PDL], PDL))


# Several processes


def test_a_claim_is_for_one_at_a_time(tmp_path):
    first, second = (Cache(tmp_path, TINY) for _ in range(2))
    with first.claim("dialogue/x") as mine:
        assert mine
        with second.claim("dialogue/x", wait=False) as also_mine:
            assert not also_mine
        with second.claim("dialogue/y", wait=False) as other:
            assert other
    with second.claim("dialogue/x", wait=False) as mine:
        assert mine


def test_a_claim_ends_with_an_exception(tmp_path):
    cache = Cache(tmp_path, TINY)
    with pytest.raises(KeyboardInterrupt), cache.claim("x"):
        raise KeyboardInterrupt
    with cache.claim("x", wait=False) as mine:
        assert mine


def test_what_another_process_is_at_is_left_alone(make_experiment, count_calls):
    experiment, decodings = make_experiment(), count_calls("decode")
    with Cache(experiment.cache.folder.parent, TINY).claim(UNTOUCHED.name):
        run_all(experiment, [UNTOUCHED])
    assert decodings == []
    assert not records.record_path(experiment.folder, "dialogue", "untouched", 0).exists()
    run_all(experiment, [UNTOUCHED])
    assert len(decodings) == 2


def test_what_another_process_has_just_recorded_is_not_done_again(make_experiment, monkeypatch):
    """Its record appears between the look at all records and the claim."""
    experiment, seen = make_experiment(), []

    def is_done(folder, run):
        seen.append(run)
        return len(seen) > 1

    monkeypatch.setattr(matrix, "is_done", is_done)
    monkeypatch.setattr(Experiment, "run", None)
    run_all(experiment, [UNTOUCHED])
    assert seen == [UNTOUCHED] * 2


def test_what_another_process_prepares_need_not_be_waited_for(make_experiment, monkeypatch):
    experiment = make_experiment()
    monkeypatch.setattr(prepare, "choose_pairs", None)
    with Cache(experiment.cache.folder.parent, TINY).claim("dialogue/prepare"):
        assert prepare.prepare(make_task(), experiment.model, TINY, experiment.cache, wait=False) is None


# What is refused


def test_records_of_other_settings_are_not_added_to(make_experiment):
    run_all(make_experiment(), [UNTOUCHED])
    other = replace(TINY, batch_size=8, learning_rates=(1e-3,))
    with pytest.raises(UserError) as caught:
        run_all(make_experiment(settings=other), [PDL])
    assert one_line(caught).endswith(
        "task.json.xz was made in another way (batch_size 4 there, 8 here; learning_rates [0.001, 0.01] there, [0.001] "
        "here): give another folder with --out"
    )
    run_all(make_experiment(out="other", settings=other), [UNTOUCHED])


def test_records_of_other_pairs_are_not_added_to(make_experiment, monkeypatch):
    run_all(make_experiment(), [UNTOUCHED])
    use_task(monkeypatch, make_task(seed=1), {"made-up": "2.0"})
    second = make_experiment(cache="other")
    use_task(monkeypatch, make_task(seed=1), {"made-up": "2.0"})
    with pytest.raises(UserError, match=r"held-out pairs of \{'made-up': '1.0'\} there\): give another folder"):
        run_all(second, [PDL])


@pytest.mark.parametrize(
    ("changes", "versions"),
    [
        ({}, {"made-up": "2.0"}),
        ({"instruction": "Reply."}, None),
        ({"prompt_tokens": 99}, None),
        ({"new_tokens": 15}, None),
    ],
)
def test_pairs_made_from_other_data_are_not_used(make_experiment, monkeypatch, changes, versions):
    first, second = make_experiment(), make_experiment()
    first.prepared("dialogue")
    use_task(monkeypatch, make_task(**changes), versions)
    with pytest.raises(UserError) as caught:
        second.prepared("dialogue")
    message = one_line(caught)
    assert message.startswith(f"{first.cache.folder / 'dialogue'} was made from {{'versions': {{'made-up': '1.0'}}, ")
    assert message.endswith(": delete it")


def test_states_of_other_ids_are_made_anew(make_experiment, monkeypatch):
    experiment = make_experiment()
    was = experiment.prepared("dialogue").states
    document = experiment.cache.load("dialogue/pairs.json")
    first, second, *rest = document["held_out"]["ids"]
    document["held_out"]["ids"] = [second, first, *rest]
    experiment.cache.save("dialogue/pairs.json", document)
    made, run_below = [], prepare.run_below
    monkeypatch.setattr(prepare, "run_below", lambda *arguments: made.append(arguments[2]) or run_below(*arguments))
    now = prepare.prepare(make_task(), experiment.model, TINY, experiment.cache).states
    assert made == ["dialogue: frozen layers, held-out"]
    assert torch.equal(now["validation"].values, was["validation"].values)
    assert torch.equal(now["held_out"].batch([0])[0], was["held_out"].batch([1])[0])


def test_ids_of_another_vocabulary_are_refused(make_experiment):
    experiment = make_experiment()
    document = prepare.choose_pairs(make_task(), experiment.model.tokenizer, TINY)
    document["training"]["ids"][0][1][-1] = 10_000  # the last target, which no layer reads
    experiment.cache.save("dialogue/pairs.json", document)
    with pytest.raises(UserError) as caught:
        experiment.prepared("dialogue")
    assert "was made with another vocabulary" in one_line(caught)
