"""Counts and weight tables on disk: whole, atomic, and recognised."""

import contextlib
import json
import os

import pytest
import safetensors.torch
import torch

from pdl_kernels import (
    ClassBalancedWeighting,
    IDFWeighting,
    InverseFrequencyWeighting,
    PowerLawWeighting,
    SmoothedInverseWeighting,
    SquareRootInverseFrequencyWeighting,
    TokenCounts,
    load_weights,
    save_weights,
)
from pdl_kernels.weights import files
from pdl_kernels.weights.recipes import weightings

V = 6
KINDS = {"counts": TokenCounts.load, "weights": load_weights}


def make_counts(documents=True):
    counts = TokenCounts(V, documents=documents, tokenizer="animals").update([[0, 1, 2, 2], [3, 2]], shift=False)
    counts.counted = "two lines, not shifted"
    return counts


def write(kind, path):
    if kind == "counts":
        make_counts().save(path)
    else:
        save_weights(path, torch.linspace(0.5, 2, V), PowerLawWeighting(0.7), make_counts())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("as_path", [str, os.fspath, lambda path: path], ids=["str", "fspath", "Path"])
def test_counts_come_back(tmp_path, documents, as_path):
    counts = make_counts(documents)
    counts.counts[4] = 2**53 + 1
    path = as_path(tmp_path / "counts.safetensors")
    counts.save(path)
    loaded = TokenCounts.load(path)
    assert loaded == counts
    assert (loaded.tokenizer, loaded.counted) == ("animals", "two lines, not shifted")
    assert loaded.counts.dtype == torch.int64
    content = (tmp_path / "counts.safetensors").read_bytes()
    counting_goes_on = loaded.update([[0, 4]], shift=False)
    assert counting_goes_on == counts.update([[0, 4]], shift=False)
    assert (tmp_path / "counts.safetensors").read_bytes() == content, "what was loaded may not be the file's memory"
    loaded.save(path)
    assert TokenCounts.load(path) == loaded


def test_other_programs_can_read_what_is_in_a_file(tmp_path):
    make_counts().save(tmp_path / "c")
    with safetensors.safe_open(tmp_path / "c", framework="np") as file:
        assert file.get_tensor("counts").tolist() == [1, 1, 3, 1, 0, 0]
        assert file.get_tensor("document_counts").tolist() == [1, 1, 2, 1, 0, 0]
        header = file.metadata()
    assert header["format_version"] == "1"
    assert json.loads(header["facts"]) == {
        "vocab_size": V,
        "tokens": 6,
        "sequences": 2,
        "rows_read": 0,
        "tokenizer": "animals",
        "counted": "two lines, not shifted",
        "left_out": 0,
        "parts": [],
        "eos_id": None,
        "special_ids": [],
    }


EVERY_WEIGHTING = [
    PowerLawWeighting(),
    PowerLawWeighting.paper(),
    PowerLawWeighting(0.3, 2, normalize="max", unseen="cap", neutral_ids=[4, 0, 4], clip=[0.1, 3]),
    InverseFrequencyWeighting(unseen=0, normalize=None),
    SquareRootInverseFrequencyWeighting(normalize="vocabulary_mean"),
    ClassBalancedWeighting(beta=0.9, clip=(0, float("inf"))),
    SmoothedInverseWeighting(a=0.1, unseen="formula"),
    IDFWeighting(neutral_ids={1}),
]


def test_every_weighting_is_in_the_list():
    assert {type(weighting) for weighting in EVERY_WEIGHTING} == set(weightings().values())


@pytest.mark.parametrize("weighting", EVERY_WEIGHTING, ids=repr)
def test_weights_come_back_with_their_recipe(tmp_path, weighting):
    counts = make_counts()
    table = weighting.table(counts, vocab_size=V + 2)
    save_weights(tmp_path / "w", table, weighting, counts)
    loaded = load_weights(tmp_path / "w")
    assert loaded.table.dtype == torch.float32
    assert torch.equal(loaded.table, table)
    assert loaded.weighting == weighting
    assert loaded.facts == {"tokens": 6, "counted": "two lines, not shifted", "tokenizer": "animals"}
    assert torch.equal(loaded.weighting.table(counts, vocab_size=V + 2), table), "the recipe makes the same bits again"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_table_without_a_recipe(tmp_path, dtype):
    table = torch.linspace(0, 2, 10).to(dtype)[::2].requires_grad_()
    save_weights(tmp_path / "w", table)
    loaded = load_weights(tmp_path / "w")
    assert torch.equal(loaded.table, table.detach().float())
    assert loaded.weighting is None
    assert loaded.facts == {}


@pytest.mark.parametrize("table", [torch.tensor([1.0, -1.0]), torch.tensor([torch.nan]), torch.ones(2, 2)], ids=str)
def test_no_file_for_a_bad_table(tmp_path, table):
    with pytest.raises(ValueError, match="table"):
        save_weights(tmp_path / "w", table)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Written whole or not at all


class FullDisk:
    """A file that takes half of what is written."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


def fail(error):
    def raising(*_):
        raise error

    return raising


def break_writing(monkeypatch, fault):
    if fault == "full disk":

        @contextlib.contextmanager
        def opened(*args):
            with open(*args) as file:
                yield FullDisk(file)

        monkeypatch.setattr(files, "open", opened, raising=False)
    elif fault == "interrupted":
        monkeypatch.setattr(os, "fsync", fail(KeyboardInterrupt()))
    else:
        monkeypatch.setattr(os, "replace", fail(PermissionError("not yours")))


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fault", ["full disk", "interrupted", "no renaming"])
def test_a_failed_write_leaves_things_as_they_were(tmp_path, monkeypatch, kind, fault, existing):
    path = tmp_path / "file"
    if existing:
        path.write_bytes(b"what was there")
    with monkeypatch.context() as patch:
        break_writing(patch, fault)
        with pytest.raises((OSError, KeyboardInterrupt)):
            write(kind, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] * existing
    if existing:
        assert path.read_bytes() == b"what was there"
    write(kind, path)
    KINDS[kind](path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_file_is_complete_before_it_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "counts"
    replace = os.replace

    def checked(source, target):
        assert TokenCounts.load(source) == make_counts()
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    make_counts().save(path)
    assert TokenCounts.load(path) == make_counts()


def test_a_directory_or_a_missing_one_as_path(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        KINDS[kind](tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        KINDS[kind](tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "no folder" / "file"):
        with pytest.raises(OSError, match="folder"):
            write(kind, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and foreign files


def test_every_truncation_is_noticed(tmp_path, kind):
    path = tmp_path / "file"
    write(kind, path)
    content = path.read_bytes()
    for length in {*range(0, len(content), 7), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"file is damaged or no safetensors file"):
            KINDS[kind](path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"\xff" * 100,
        bytes(range(256)) * 4,
        b"to be or not to be",
        b'{"counts": [1, 2]}',
        b"PK\3\4" * 9,
    ],
    ids=["empty", "zeros", "ones", "bytes", "text", "json", "zip"],
)
def test_other_content_is_no_file_of_ours(tmp_path, kind, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"file is damaged or no safetensors file"):
        KINDS[kind](tmp_path / "file")


def test_a_pickle_is_not_opened(tmp_path, kind):
    torch.save({"counts": torch.ones(V)}, tmp_path / "file")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        KINDS[kind](tmp_path / "file")


def test_files_of_another_kind_program_or_version(tmp_path, kind, monkeypatch):
    path = tmp_path / "file"
    other = "weights" if kind == "counts" else "counts"
    write(other, path)
    with pytest.raises(ValueError, match=r"file is pdl_kernels (token counts|weight table); accepted is pdl_kernels"):
        KINDS[kind](path)
    safetensors.torch.save_file({"counts": torch.ones(V, dtype=torch.int64), "weights": torch.ones(V)}, path)
    with pytest.raises(ValueError, match="is a safetensors file of another program; accepted is"):
        KINDS[kind](path)
    monkeypatch.setattr(files, "FORMAT_VERSION", 2)
    write(kind, path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"of version 2; accepted is .* of version 1"):
        KINDS[kind](path)


def rewrite(path, kind, tensors=None, **changes):
    """The file of `write`, with other tensors or other facts; None takes a fact out."""
    write(kind, path)
    name = {"counts": "token counts", "weights": "weight table"}[kind]
    held, facts = files.load(path, name)
    facts = {key: value for key, value in (facts | changes).items() if value is not ...}
    files.save(path, name, held | (tensors or {}), facts)


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({}, {"tokens": 5}, "add up to 6, and it says 5"),
        ({"counts": torch.tensor([1, 1, 3, 1, 0, 1])}, {}, "add up to 7, and it says 6"),
        ({}, {"vocab_size": V + 1}, rf"shape \({V},\), not int64 of \({V + 1},\)"),
        ({"counts": torch.ones(V)}, {}, "counts are torch.float32"),
        ({"counts": torch.ones(V, dtype=torch.int32)}, {}, "counts are torch.int32"),
        ({"counts": torch.tensor([-1, 2, 3, 1, 1, 0])}, {}, "counts are negative"),
        ({"counts": torch.ones(2, 3, dtype=torch.int64)}, {}, r"shape \(2, 3\)"),
        ({"document_counts": torch.ones(V + 1, dtype=torch.int64)}, {}, "document_counts are"),
        ({}, {"tokens": ...}, "does not say tokens"),
        ({}, {"sequences": ..., "counted": ...}, "does not say counted, sequences"),
        ({}, {"sequences": -1}, "sequences are -1"),
        ({}, {"sequences": "2"}, "sequences are '2'"),
    ],
)
def test_facts_that_contradict_the_counts(tmp_path, tensors, facts, message):
    rewrite(tmp_path / "file", "counts", tensors, **facts)
    with pytest.raises(ValueError, match=f"file is damaged: .*{message}"):
        TokenCounts.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({}, {"recipe": ...}, "no recipe"),
        ({}, {"recipe": {"name": "magic"}}, "name is 'magic'"),
        ({}, {"recipe": {"name": "power_law", "gamma": 3}}, "gamma"),
        ({}, {"recipe": {"name": "power_law", "alpha": -1}}, "alpha is -1"),
        ({}, {"recipe": 5}, ""),
        ({"weights": torch.tensor([1.0, -1.0])}, {}, r"table\[1\] is -1"),
        ({"weights": torch.tensor([torch.nan])}, {}, r"table\[0\] is nan"),
        ({"weights": torch.ones(2, 2)}, {}, r"shape \(2, 2\)"),
        ({"weights": torch.ones(2, dtype=torch.int64)}, {}, "int64"),
    ],
)
def test_weight_files_that_hold_something_else(tmp_path, tensors, facts, message):
    rewrite(tmp_path / "file", "weights", tensors, **facts)
    with pytest.raises(ValueError, match=f"file is damaged: .*{message}"):
        load_weights(tmp_path / "file")


@pytest.mark.parametrize("facts", ["[1, 2]", "5", "null", '"facts"', "{", ""])
def test_facts_that_are_no_facts(tmp_path, kind, facts):
    name = {"counts": "token counts", "weights": "weight table"}[kind]
    header = {"format": f"pdl_kernels {name}", "format_version": "1", "facts": facts}
    tensors = {"counts": torch.ones(V, dtype=torch.int64), "weights": torch.ones(V)}
    safetensors.torch.save_file(tensors, tmp_path / "file", header)
    with pytest.raises(ValueError, match="file is damaged"):
        KINDS[kind](tmp_path / "file")
