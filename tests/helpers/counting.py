"""Rows of label ids, texts, and their counts by hand."""

import functools
from collections import Counter

import numpy as np

from helpers.tokenizers import ANT, BEE, CAT, UNK, WORDS
from pdl_kernels import TokenCounts

V = 12
ROWS = [[1, 2, 2], [], [5], [-100, 7, 7, -100, 3], [0, 11], [4, 4, 4, 4], [9, -100], [1, 2]]
TEXTS = ["ant bee", "cat", "", "ant ant eel", "dog"]
IDS = [[ANT, BEE], [CAT], [], [ANT, ANT, UNK], [7]]

from_dataset = functools.partial(TokenCounts.from_dataset, vocab_size=V, progress=False)
from_dataloader = functools.partial(TokenCounts.from_dataloader, vocab_size=V, progress=False)
from_texts = functools.partial(TokenCounts.from_texts, progress=False)


def oracle(rows, shift=True, ignore_index=-100, vocab_size=V):
    """(V,) counts of `rows`, a list of sequences of which None is an empty one, in plain Python."""
    counter = Counter(token for row in rows for token in (row or [])[int(shift) :] if token != ignore_index)
    return [counter[token] for token in range(vocab_size)]


def by_hand(text):
    return [WORDS.index(word) if word in WORDS else UNK for word in text.split()]


def count(rows, shift=True, documents=False, **options):
    return TokenCounts(V, documents=documents).update(rows, shift=shift, **options)


def random_rows(*shape, seed=0, vocab_size=V):
    return np.random.default_rng(seed).integers(0, vocab_size, shape)
