"""Scores of one text: against its reference, against its source, and on its own.

    rouge_l      F1 of the longest common subsequence of words (Lin, 2004), 0 to 1, without stemming. The rouge-score
                 package has its own words: runs of a-z and 0-9, everything else separates.
    rouge_l_others  the mean ROUGE-L against references of other prompts: what a text scores without answering its own.
    chrf         chrF2, the F-score of character n-grams up to 6 (Popović, 2015), 0 to 100.
    rare         a word type is rare if it is none of the common words of the references, `common_words_of`. Types, not
                 words: whoever repeats one rare word has found one.
    content      word types of more than two characters that are no function words; found: those that the source has.
    repetition   1 - distinct 3-grams / 3-grams, within one text.
    self_bleu    BLEU of a text against the other texts of the same model (Zhu et al., 2018, Texygen), 0 to 100; high
                 means that the texts resemble each other.

rouge-score and sacrebleu are needed only here, and imported only when they are used.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.quality.errors import UserError
from benchmarks.quality.metrics.words import ngrams, words

# With these words of the references, the most frequent first, 90 % of all their words are common.
COMMON_TENTHS = 9

# The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries, and adverbs that say
# little by themselves.
_FUNCTION_WORDS = """
a an the this that these those some any each every both either neither such another other others same own
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself
we us our ours ourselves they them their theirs themselves who whom whose which what one
in on at by for from with without about into onto over under of off to up down out through during before after
above below between against until than as per via upon within among
and or but nor so yet if because while although though since unless whether when where why how
am is are was were be been being do does did doing done have has had having
will would shall should can could may might must ought
not no yes too very just only also then there here again once more most much many few less
all even still ever never
i'm i've i'll i'd you're you've you'll you'd he's she's it's we're we've we'll they're they've that's there's
what's who's let's don't doesn't didn't isn't aren't wasn't weren't can't couldn't won't wouldn't shouldn't
haven't hasn't hadn't
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
CONTENT_LETTERS = 3  # content words have at least so many characters

SELF_BLEU_SAMPLE = 100
OTHERS = 10  # references of other prompts that a text is held against


@dataclass(frozen=True)
class TextScores:
    """The scores of one text, all of them numbers; counts of word types are sizes of sets."""

    rouge_l: float  # 0..1
    chrf: float  # 0..100
    words: int
    rare_predicted: int  # rare word types in the text
    rare_wanted: int  # rare word types in the reference
    rare_hits: int  # rare word types in both
    content: int  # content word types in the text
    content_found: int  # those of them that the source has
    repetition: float  # 0..1
    self_bleu: float  # 0..100; nan for texts outside the sample


def common_words_of(references: Sequence[str]) -> frozenset[str]:
    """The most frequent word types that together make up 90 % of all words of the references.

    Types are taken by falling count, and alphabetically where counts are equal; the type with which the words taken
    reach 90 % is the last. Every other type, also each that no reference has, is rare.
    """
    counts = Counter(word for reference in references for word in words(reference))
    total = counts.total()
    common: set[str] = set()
    covered = 0
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if 10 * covered >= COMMON_TENTHS * total:
            break
        common.add(word)
        covered += count
    return frozenset(common)


def content_words(text: str) -> set[str]:
    """Word types that say what a text is about: at least three characters, and no function word."""
    return {word for word in words(text) if len(word) >= CONTENT_LETTERS and word not in FUNCTION_WORDS}


def repetition(text: str) -> float:
    """1 - distinct 3-grams / 3-grams within the text; 0 where it has fewer than two 3-grams."""
    found = ngrams(words(text), 3)
    return 1 - len(set(found)) / len(found) if len(found) >= 2 else 0.0


def self_bleu(texts: Sequence[str], sample: int = SELF_BLEU_SAMPLE) -> np.ndarray:
    """(texts,) BLEU of each of the first `sample` texts with all others of them as references; nan for later texts.

    The numbers are those of sacrebleu's sentence BLEU with effective order, in lower case, split as mteval-v13a does.
    A text's n-gram counts as often as it is in that one of the others which has it most often, so it is enough to know
    of each n-gram the two highest counts: the second is for the text that has the first. The value depends on the
    sample's size; only equal sizes compare. One text alone has no others: nan. Cost: about 0.05 s for 100 texts of 25
    words, 0.4 s for 200 words.
    """
    scores = np.full(len(texts), np.nan)
    bleu = _optional("sacrebleu.metrics").BLEU(effective_order=True, lowercase=True, tokenize="13a")
    tokens = [bleu.tokenizer(text.lower().rstrip()).split() for text in texts[:sample]]
    if len(tokens) < 2:
        return scores
    orders = range(1, bleu.max_ngram_order + 1)
    counts = [Counter(ngram for n in orders for ngram in ngrams(text, n)) for text in tokens]
    highest: dict[tuple[str, ...], tuple[int, int]] = {}  # of each n-gram, the two highest counts in one text
    for of_text in counts:
        for ngram, count in of_text.items():
            first, second = highest.get(ngram, (0, 0))
            highest[ngram] = (max(first, count), max(second, min(first, count)))

    for index, of_text in enumerate(counts):
        correct, total = [0] * len(orders), [0] * len(orders)
        for ngram, count in of_text.items():
            first, second = highest[ngram]
            total[len(ngram) - 1] += count
            correct[len(ngram) - 1] += min(count, second if count == first else first)
        length = len(tokens[index])
        others = (len(text) for other, text in enumerate(tokens) if other != index)
        closest = min(others, key=lambda other: (abs(other - length), other))
        scores[index] = bleu.compute_bleu(correct, total, length, closest, bleu.smooth_method, None, True).score
    return scores


def score_alone(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores that need nothing but the texts: words (int64), repetition and self_bleu (float64), each (texts,)."""
    return {
        "words": np.array([len(words(text)) for text in texts], dtype=np.int64),
        "repetition": np.array([repetition(text) for text in texts], dtype=np.float64),
        "self_bleu": self_bleu(texts),
    }


def score_texts(
    texts: Sequence[str], references: Sequence[str], sources: Sequence[str], common_words: frozenset[str]
) -> dict[str, np.ndarray]:
    """Every field of TextScores as an array (texts,): int64 for counts, float64 for the others.

    Errors: ValueError where texts, references and sources are not equally many; UserError where rouge-score or
    sacrebleu is missing.
    """
    if not len(texts) == len(references) == len(sources):
        came = f"{len(texts)} texts, {len(references)} references and {len(sources)} sources"
        raise ValueError(f"{came} came; accepted are equally many")
    rouge = _optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    chrf = _optional("sacrebleu.metrics").CHRF()
    alone = {name: values.tolist() for name, values in score_alone(texts).items()}

    rows = []
    for index, (text, reference, source) in enumerate(zip(texts, references, sources, strict=True)):
        predicted, wanted = set(words(text)) - common_words, set(words(reference)) - common_words
        content = content_words(text)
        rows.append(
            TextScores(
                rouge_l=rouge.score(reference, text)["rougeL"].fmeasure,
                chrf=chrf.sentence_score(text, [reference]).score,
                rare_predicted=len(predicted),
                rare_wanted=len(wanted),
                rare_hits=len(predicted & wanted),
                content=len(content),
                content_found=len(content.intersection(words(source))),
                **{name: values[index] for name, values in alone.items()},
            )
        )
    dtypes = {"int": np.int64, "float": np.float64}  # annotations are texts here
    return {
        field.name: np.array([getattr(row, field.name) for row in rows], dtype=dtypes[str(field.type)])
        for field in fields(TextScores)
    }


def rouge_l_of_others(
    texts: Sequence[str], references: Sequence[str], groups: Sequence[object], others: int = OTHERS
) -> np.ndarray:
    """(texts,) the mean ROUGE-L of each text against the next `others` references that are of another group.

    What is common to all references, above all frequent words, scores here as it does against the text's own. 0 where
    every reference is of one group.
    """
    rouge = _optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    scores = np.zeros(len(texts))
    for index, text in enumerate(texts):
        following = ((index + step) % len(texts) for step in range(1, len(texts)))
        chosen = list(islice((place for place in following if groups[place] != groups[index]), others))
        if chosen:
            scores[index] = np.mean([rouge.score(references[place], text)["rougeL"].fmeasure for place in chosen])
    return scores


def require_scorers() -> None:
    """UserError where rouge-score or sacrebleu is missing: before hours of work rather than after."""
    for module in ("rouge_score.rouge_scorer", "sacrebleu.metrics"):
        _optional(module)


def _optional(module: str) -> Any:
    """A module of one of the two packages that only these scores need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:  # also where only one of the packages that it needs is missing
        raise UserError(f"{error}: scoring texts needs `pip install sacrebleu rouge-score`") from error
