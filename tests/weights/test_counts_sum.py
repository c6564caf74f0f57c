"""Counts are a sum: any partition, in any order, gives the same."""

import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
from helpers.counting import V, count, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from pdl_kernels import TokenCounts

sequences = st.lists(st.lists(st.sampled_from([-100, *range(V)]), max_size=6), max_size=8)


def for_all(**strategies):
    def decorate(check):
        return settings(max_examples=60, deadline=None, derandomize=True, database=None)(given(**strategies)(check))

    return decorate


@for_all(rows=sequences, shift=st.booleans(), ignore_index=st.sampled_from([-100, 0, 5]))
def test_lists_against_the_oracle(rows, shift, ignore_index):
    rows = [[token if token != -100 else ignore_index for token in row] for row in rows]
    got = count(rows, shift, documents=True, ignore_index=ignore_index)
    assert got.counts.tolist() == oracle(rows, shift, ignore_index)
    held = Counter(token for row in rows for token in set(row[int(shift) :]) - {ignore_index})
    assert got.document_counts.tolist() == [held[token] for token in range(V)]
    assert got.sequences == (len(rows) or 1)  # [] is one empty sequence


@for_all(rows=sequences, shift=st.booleans(), cuts=st.lists(st.integers(0, 8), max_size=4), data=st.data())
def test_any_partition_gives_the_same(rows, shift, cuts, data):
    ends = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    parts = [rows[a:b] for a, b in itertools.pairwise(ends)]
    whole = TokenCounts(V, documents=True)
    for part in parts:
        whole.update(part, shift=shift)
    order = data.draw(st.permutations(parts))
    partial = [count(part, shift, documents=True) for part in order]
    total = sum(partial, start=TokenCounts(V, documents=True))
    assert total == whole
    if rows:
        assert total == count(rows, shift, documents=True)
        assert sum(partial) == total


@for_all(a=sequences, b=sequences, c=sequences, documents=st.booleans())
def test_merging_is_associative_and_commutative(a, b, c, documents):
    a, b, c = (count(rows, documents=documents) for rows in (a, b, c))
    kept = copy.deepcopy((a, b, c))
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + TokenCounts(V, documents=documents) == a
    assert (a, b, c) == kept, "adding may not change what is added"
    assert a.copy().merge(b) == a + b


def test_merging_is_in_place_and_returns_self():
    a, b = count([[0, 1, 2]]), count([[0, 2, 2]])
    assert a.merge(b) is a
    assert a.counts.tolist() == oracle([[0, 1, 2], [0, 2, 2]], True)
    assert a.sequences == 2
    assert b == count([[0, 2, 2]])
    assert a.merge(a).total == 8
    a += b
    assert a.total == 10


def test_copies_share_nothing():
    original = count([[0, 1, 2]], documents=True)
    original.tokenizer, original.counted = "animals", "a corpus"
    for duplicate in (original.copy(), copy.deepcopy(original), pickle.loads(pickle.dumps(original)), sum([original])):
        assert duplicate == original
        assert (duplicate.tokenizer, duplicate.counted) == ("animals", "a corpus")
        duplicate.update([[0, 5, 5]], shift=True)
        assert duplicate.total == 4
    assert original.total == 2
    assert original.document_counts.sum() == 2


def test_equality_sees_every_number():
    counts = count([[0, 1, 2]], documents=True)
    assert counts != count([[0, 1, 2]])
    assert counts != count([[0, 1, 3]], documents=True)
    assert counts != count([[0, 1, 2], []], documents=True)
    assert counts != TokenCounts(V + 1, documents=True).update([[0, 1, 2]], shift=True)
    assert counts != "counts"
    with pytest.raises(TypeError, match="unhashable"):
        hash(counts)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (TokenCounts(V + 1), ValueError, rf"vocab_size {V + 1}; accepted is {V}"),
        (TokenCounts(V, documents=True), ValueError, "documents=True; accepted is False"),
        (TokenCounts(V, tokenizer="b"), ValueError, "'b'; accepted is 'a'"),
        (torch.zeros(V), TypeError, "other is a Tensor"),
    ],
)
def test_counts_that_do_not_merge(other, error, message):
    counts = TokenCounts(V, tokenizer="a").update([[0, 1]], shift=True)
    before = counts.copy()
    with pytest.raises(error, match=message):
        counts.merge(other)
    with pytest.raises(error):
        counts + other
    assert counts == before


def test_the_name_of_the_tokenizer_survives_merging():
    assert (TokenCounts(V) + TokenCounts(V, tokenizer="a")).tokenizer == "a"
    assert (TokenCounts(V, tokenizer="a") + TokenCounts(V)).tokenizer == "a"
