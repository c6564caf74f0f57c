"""Counts that were interrupted: what is kept, and that the rest is counted once."""

import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.counting import ROWS, TEXTS, V, by_hand, from_dataset, from_texts, oracle
from helpers.tokenizers import make_transformers_tokenizer

from pdl_kernels import TokenCounts
from pdl_kernels.weights import tally

ROOT = Path(__file__).resolve().parents[2]


class Interrupted:
    """`rows` until `stop` of them were read, then `error`; it also counts what is read."""

    def __init__(self, rows, stop=None, error=KeyboardInterrupt):
        self.rows, self.stop, self.error, self.read = rows, stop, error, 0

    def __iter__(self):
        for row in self.rows:
            if self.read == self.stop:
                raise self.error
            self.read += 1
            yield row


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("stop", range(len(ROWS)))
def test_counting_goes_on_where_it_stopped(tmp_path, stop, error):
    rows = [{"labels": row} for row in ROWS]
    path = tmp_path / "checkpoint"
    resume = functools.partial(from_dataset, documents=True, checkpoint=path, batch_size=2)
    with pytest.raises(error):
        resume(Interrupted(rows, stop, error))
    done = stop // 2 * 2  # whole batches
    assert path.exists() == (done > 0)
    if done:
        assert TokenCounts.load(path) == TokenCounts(V, documents=True).update(ROWS[:done], shift=True)
    got = resume(rows)
    assert got == from_dataset(rows, documents=True) == TokenCounts.load(path)
    assert resume(rows) == got, "a finished checkpoint is not counted twice"


def test_every_batch_is_counted_once_over_many_interruptions(tmp_path):
    rows = [{"labels": row} for row in np.random.default_rng(0).integers(0, V, (60, 4)).tolist()]
    for stop in range(5, 60, 5):
        with pytest.raises(KeyboardInterrupt):
            from_dataset(Interrupted(rows, stop), checkpoint=tmp_path / "c", batch_size=5)
    got = from_dataset(rows, checkpoint=tmp_path / "c", batch_size=5)
    assert got.counts.tolist() == oracle([row["labels"] for row in rows])


@pytest.mark.parametrize("kind", ["texts", "arrow", "streamed"])
def test_texts_and_data_sets_go_on(datasets, tmp_path, monkeypatch, kind):
    path = tmp_path / "checkpoint"
    dataset = datasets.Dataset.from_dict({"labels": ROWS})
    source = {"texts": TEXTS * 3, "arrow": dataset, "streamed": dataset.to_iterable_dataset()}[kind]

    def run(source, **options):
        if kind == "texts":
            return from_texts(source, by_hand, vocab_size=V, batch_size=2, **options)
        return from_dataset(source, batch_size=2, **options)

    calls = 0
    add = TokenCounts._add

    def interrupted(self, *batch):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return add(self, *batch)

    monkeypatch.setattr(TokenCounts, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, checkpoint=path)
    assert TokenCounts.load(path).sequences == 4
    assert run(source, checkpoint=path) == run(source)


def test_checkpoints_are_written_on_the_way(tmp_path, monkeypatch):
    """A killed process writes nothing at the end."""
    monkeypatch.setattr(tally, "CHECKPOINT_IDS", 5)
    saved = []
    save = TokenCounts.save
    monkeypatch.setattr(TokenCounts, "save", lambda self, path: (saved.append(self.sequences), save(self, path)))
    rows = [{"labels": [1, 2, 3]}] * 10
    from_dataset(rows, checkpoint=tmp_path / "c", batch_size=1)
    assert saved == [3, 6, 9, 10]


def test_a_first_run_that_fails_at_once_leaves_no_checkpoint(datasets, tmp_path):
    dataset = datasets.Dataset.from_dict({"labels": ROWS})
    with pytest.raises(ValueError, match="column is"):
        from_dataset(dataset, column="label", checkpoint=tmp_path / "c")
    assert not list(tmp_path.iterdir())
    assert from_dataset(dataset, checkpoint=tmp_path / "c").counts.tolist() == oracle(ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": V + 1}, "vocab_size 12; accepted is 13"),
        ({"shift": False}, "not shifted"),
        ({"ignore_index": 0}, "ignore_index 0"),
        ({"column": "other"}, "column 'other'"),
        ({"documents": True}, "documents=False; accepted is True"),
        ({"tokenizer": "b"}, "'a'; accepted is 'b'"),
        ({"source": "elsewhere"}, "elsewhere"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change, message):
    rows = [{"labels": row, "other": row} for row in ROWS]
    settings = {"vocab_size": V, "tokenizer": "a", "checkpoint": tmp_path / "c", "progress": False}
    TokenCounts.from_dataset(rows, **settings)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        TokenCounts.from_dataset(rows, **(settings | change))
    assert str(tmp_path / "c") in str(caught.value)
    assert (tmp_path / "c").read_bytes() == before


def test_a_checkpoint_of_another_data_set_is_refused(datasets, tmp_path):
    dataset = datasets.Dataset.from_dict({"labels": ROWS})
    from_dataset(dataset, checkpoint=tmp_path / "c")
    assert from_dataset(dataset, checkpoint=tmp_path / "c").counts.tolist() == oracle(ROWS)
    for other in (dataset.shuffle(seed=1), dataset.select(range(5)), datasets.Dataset.from_dict({"labels": ROWS[:4]})):
        with pytest.raises(ValueError, match="holds counts of column 'labels' of data set"):
            from_dataset(other, checkpoint=tmp_path / "c")


@pytest.mark.parametrize("change", [{"shift": False}, {"add_special_tokens": False}, {"append_eos": True}])
def test_a_checkpoint_of_texts_encoded_otherwise_is_refused(tmp_path, change):
    tokenizer = make_transformers_tokenizer()
    from_texts(TEXTS, tokenizer, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="holds counts of texts"):
        from_texts(TEXTS, tokenizer, checkpoint=tmp_path / "c", **change)


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    first, second = make_transformers_tokenizer(), make_transformers_tokenizer()
    first.name_or_path, second.name_or_path = "animals", "plants"
    from_texts(TEXTS, first, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="counts tokens of 'animals'; accepted is 'plants'"):
        from_texts(TEXTS, second, checkpoint=tmp_path / "c")


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path):
    (tmp_path / "c").write_text("precious")
    with pytest.raises(ValueError, match="damaged"):
        from_dataset([{"labels": [1, 2]}], checkpoint=tmp_path / "c")
    assert (tmp_path / "c").read_text() == "precious"


def test_rows_of_several_sequences_go_on_at_the_right_row(tmp_path):
    rows = [{"labels": [[1, 2], [3, 4, 5]]}] * 6
    with pytest.raises(KeyboardInterrupt):
        from_dataset(Interrupted(rows, 4), checkpoint=tmp_path / "c", batch_size=2)
    assert from_dataset(rows, checkpoint=tmp_path / "c", batch_size=2) == from_dataset(rows)


COUNT_AND_STOP = """
import sys
import datasets
from pdl_kernels import TokenCounts
from pdl_kernels.weights import tally
dataset = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
def interrupted(add, calls=[]):
    def count(self, *batch):
        calls.append(1)
        if len(calls) == 3 and sys.argv[4] == "stop":
            raise KeyboardInterrupt
        return add(self, *batch)
    return count
TokenCounts._add = interrupted(TokenCounts._add)
dataset = dataset.map(lambda row: {"labels": [token + 1 for token in row["labels"]]})
counts = TokenCounts.from_dataset(dataset, 14, checkpoint=sys.argv[2], batch_size=2, progress=False)
print(counts.counts.tolist(), counts.sequences)
"""


def test_another_process_goes_on(datasets, tmp_path):
    """The fingerprint of a data set from files, mapped by a function, is the same in the next process."""
    rows = [[token % V for token in row] for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"labels": row}) + "\n" for row in rows))
    (tmp_path / "count.py").write_text(COUNT_AND_STOP)

    def run(what):
        arguments = [tmp_path / "count.py", tmp_path / "rows.jsonl", tmp_path / "c", tmp_path / "cache", what]
        environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
        )

    stopped = run("stop")
    assert "KeyboardInterrupt" in stopped.stderr
    assert TokenCounts.load(tmp_path / "c").sequences == 4
    done = run("go on")
    expected = Counter(token + 1 for row in rows for token in row[1:])
    assert done.stdout.split("\n")[-2] == f"{[expected[token] for token in range(14)]} 8", done.stderr
