"""What counts as a word, in every score that counts words."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Letters and digits of any script, with apostrophes inside: "don't" is one word, "well-known" and "max_size" are two.
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each word of the text starts and ends, so that a text can be cut after a word without joining words."""
    return [match.span() for match in _WORD.finditer(text)]


def words(text: str) -> list[str]:
    """The words of a text in order, in lower case and with straight apostrophes; punctuation is no word.

    A word is a run of letters and digits of any script. Apostrophes between such runs belong to the word; hyphens,
    underscores and decimal points separate words.

        >>> words("It's a well-known file_name.")
        ["it's", 'a', 'well', 'known', 'file', 'name']
    """
    return [text[start:end].lower().replace("\u2019", "'") for start, end in word_spans(text)]


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n neighbouring words, in order: len(words) - n + 1 of them, or none.

    >>> ngrams(["a", "b", "c"], 2)
    [('a', 'b'), ('b', 'c')]
    """
    if n < 1:
        raise ValueError(f"n is {n}; accepted are 1 and more")
    return list(zip(*(words[start:] for start in range(n)), strict=False))
