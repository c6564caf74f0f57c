"""Each score against a slow computation of its definition, or numbers worked by hand."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from benchmarks.quality.errors import UserError
from benchmarks.quality.metrics import corpus, per_text
from benchmarks.quality.metrics.corpus import Types
from benchmarks.quality.metrics.words import ngrams, word_spans, words

TEXTS = [
    "the cat saw the dog",
    "",
    "the the the",
    "a dog and a cat and a bird",
    "...",
    "birds sing",
    "the cat saw a bird",
]


@pytest.fixture(scope="module")
def sacrebleu():
    """Skips where the packages are missing, or one that they need."""
    pytest.importorskip("rouge_score.rouge_scorer")
    return pytest.importorskip("sacrebleu.metrics")


@pytest.fixture
def m():
    """(7, P): the set itself, one prompt alone, one without words alone, and four draws."""
    P = len(TEXTS)
    rows = [
        np.ones(P),
        P * np.eye(P)[0],
        P * np.eye(P)[1],
        *np.random.default_rng(1).multinomial(P, [1 / P] * P, size=4),
    ]
    return np.array(rows, dtype=np.int64)


def repeated(m):
    """For each resample, its word lists, literally as often as it has them."""
    return [[words(text) for text, times in zip(TEXTS, row, strict=True) for _ in range(times)] for row in m]


def counts_of(texts, n):
    return Counter(ngram for text in texts for ngram in ngrams(text, n))


def test_words():
    assert words("It\u2019s Dr. O'Neill's well-known max_size: 3.5, ÜBER!") == (
        ["it's", "dr", "o'neill's", "well", "known", "max", "size", "3", "5", "über"]
    )
    assert words(" -- '...' _ ") == words("") == []
    text = "İ said: 'No, no!'"  # the first letter becomes longer in lower case
    assert [text[slice(*span)] for span in word_spans(text)] == ["İ", "said", "No", "no"]


def test_ngrams():
    assert ngrams(["a", "b", "a"], 1) == [("a",), ("b",), ("a",)]
    assert ngrams(["a", "b", "a"], 3) == [("a", "b", "a")]
    assert ngrams(["a", "b", "a"], 4) == ngrams([], 1) == []
    with pytest.raises(ValueError, match="n is 0"):
        ngrams(["a"], 0)


def test_common_words_end_with_the_type_that_crosses_the_limit():
    assert per_text.common_words_of(["a a a a a a a a", "c b d"]) == {"a", "b", "c"}  # 8 + 1 + 1 of 11: ties by word
    assert per_text.common_words_of(["a a a a a a a a a b"]) == {"a"}  # 90 % exactly
    assert per_text.common_words_of(["a a a a a a a a b c"]) == {"a", "b"}
    assert per_text.common_words_of(["", "!"]) == frozenset()


def test_content_words_and_repetition():
    assert per_text.content_words("She can't see the ox, but Harry saw 2 red kites. Red!") == {
        "see",
        "harry",
        "saw",
        "red",
        "kites",
    }
    assert per_text.repetition("a b c") == 0  # one 3-gram
    assert per_text.repetition("a a a a") == pytest.approx(1 / 2)  # aaa aaa
    assert per_text.repetition("a b a b a") == pytest.approx(1 / 3)  # aba bab aba
    assert per_text.repetition("") == per_text.repetition("?") == 0


def test_one_text_by_hand(sacrebleu):
    scores = per_text.score_texts(
        ["The ferret saw a wombat, a wombat"],
        ["the ferret saw the quokka"],
        ["Wombat facts: what ferrets see."],
        frozenset({"the", "a", "saw"}),
    )
    # The longest common subsequence is "the ferret saw", of 7 and 5 words.
    assert scores["rouge_l"] == pytest.approx([2 * 3 / (7 + 5)])
    assert scores["words"].tolist() == [7]
    assert [scores[f"rare_{name}"].tolist() for name in ("predicted", "wanted", "hits")] == [[2], [2], [1]]
    assert (scores["content"].tolist(), scores["content_found"].tolist()) == ([3], [1])  # wombat; not ferret, not saw
    assert scores["repetition"].tolist() == [0]
    assert np.isnan(scores["self_bleu"]).all()  # no other text
    assert {name: str(values.dtype) for name, values in scores.items()} == {
        **dict.fromkeys(("rouge_l", "chrf", "repetition", "self_bleu"), "float64"),
        **dict.fromkeys(("words", "rare_predicted", "rare_wanted", "rare_hits", "content", "content_found"), "int64"),
    }


def test_chrf_by_its_formula(sacrebleu):
    text, reference = "a cat sat", "the cat sat on"
    precisions, recalls = [], []
    for n in range(1, 7):
        have, want = counts_of([text.replace(" ", "")], n), counts_of([reference.replace(" ", "")], n)
        precisions.append((have & want).total() / have.total())
        recalls.append((have & want).total() / want.total())
    P, R = np.mean(precisions), np.mean(recalls)
    scores = per_text.score_texts([text], [reference], [""], frozenset())
    assert scores["chrf"] == pytest.approx([100 * 5 * P * R / (4 * P + R)])


def test_a_perfect_text_an_empty_one_and_one_without_words(sacrebleu):
    reference = "Ferrets like quokkas."
    scores = per_text.score_texts([reference, "", "?!"], [reference] * 3, [""] * 3, frozenset())
    assert scores["rouge_l"].tolist() == [1, 0, 0]
    assert scores["chrf"].tolist() == pytest.approx([100, 0, 0])
    assert scores["rare_hits"].tolist() == [3, 0, 0]
    assert scores["rare_wanted"].tolist() == [3, 3, 3]
    assert np.isfinite(scores["self_bleu"]).all()
    no_texts = per_text.score_texts([], [], [], frozenset())
    assert {values.shape for values in no_texts.values()} == {(0,)}


def test_self_bleu_is_sacrebleus(sacrebleu):
    bleu = sacrebleu.BLEU(effective_order=True, lowercase=True, tokenize="13a")
    texts = [*TEXTS, "The cat, the dog; the cat saw: the dog!", "A dog and A CAT and"]
    texts.append("the dog " * 9)  # 18 tokens: one of 13 is as far from these as from 8, and the shorter is chosen
    others = [texts[:index] + texts[index + 1 :] for index in range(len(texts))]
    slow = [bleu.sentence_score(text, rest).score for text, rest in zip(texts, others, strict=True)]
    assert len({round(score, 3) for score in slow}) > 4
    np.testing.assert_allclose(per_text.self_bleu(texts), slow, rtol=1e-12)

    sampled = per_text.self_bleu(texts, sample=3)
    assert np.isnan(sampled[3:]).all()
    np.testing.assert_allclose(sampled[:3], per_text.self_bleu(texts[:3]))
    assert per_text.self_bleu(["the same five words here"] * 4).tolist() == pytest.approx([100] * 4)


def test_score_alone_needs_no_references(sacrebleu):
    alone = per_text.score_alone(TEXTS)
    scores = per_text.score_texts(TEXTS, TEXTS[::-1], TEXTS, frozenset())
    assert set(alone) == {"words", "repetition", "self_bleu"}
    for name, values in alone.items():
        np.testing.assert_array_equal(values, scores[name])
        assert values.dtype == scores[name].dtype


def test_unequal_numbers_of_texts(sacrebleu):
    with pytest.raises(ValueError, match="2 texts, 1 references and 2 sources came"):
        per_text.score_texts(["a", "b"], ["a"], ["a", "b"], frozenset())


@pytest.mark.parametrize("missing", ["rouge_score.rouge_scorer", "sacrebleu.metrics"])
def test_a_missing_package(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install sacrebleu rouge-score"):
        per_text.score_texts(["a"], ["a"], ["a"], frozenset())


def test_spraying_rare_words_lowers_precision_and_f1(sacrebleu):
    references = ["the ferret saw the quokka", "a wombat ate the orchid", "the zebra met a tapir"]
    texts = ["the ferret saw the kiwi", "a wombat ate the lily", "the zebra met a llama"]
    dictionary = [f"rarity{number}" for number in range(50)]
    sprayed = [f"{text} {' '.join(dictionary[index::3])}" for index, text in enumerate(texts)]
    rare = []
    for candidates in (texts, sprayed):
        scores = per_text.score_texts(candidates, references, references, frozenset({"the", "a"}))
        rare.append([scores[f"rare_{name}"] for name in ("hits", "predicted", "wanted")])
    (hits, predicted, wanted), (hits_sprayed, predicted_sprayed, _) = rare
    m = np.ones((1, 3), dtype=np.int64)
    assert corpus.recall(hits_sprayed, wanted, m) == corpus.recall(hits, wanted, m)
    assert corpus.precision(hits_sprayed, predicted_sprayed, m) < corpus.precision(hits, predicted, m) / 4
    assert corpus.f1(hits_sprayed, predicted_sprayed, wanted, m) < corpus.f1(hits, predicted, wanted, m) / 2
    assert Types([words(text) for text in sprayed], 1).distinct(m) > Types([words(text) for text in texts], 1).distinct(
        m
    )


def test_sums_and_means():
    m = np.array([[1, 1, 1], [3, 0, 0], [0, 1, 2], [0, 3, 0]])
    top, bottom = np.array([1, 0, 5]), np.array([2, 0, 4])
    np.testing.assert_allclose(corpus.ratio_of_sums(top, bottom, m), [1, 0.5, 1.25, math.nan])
    np.testing.assert_allclose(corpus.mean(top, m), [2, 1, 10 / 3, 0])
    np.testing.assert_allclose(corpus.mean_of_finite(np.array([1, math.nan, 5]), m), [3, 1, 5, math.nan])
    assert np.isnan(corpus.mean(np.array([1, math.nan, 5]), m)).all()


def test_f1_is_micro_averaged():
    m = np.array([[1, 1, 1], [0, 3, 0], [0, 0, 3], [2, 1, 0]])
    hits, predicted, wanted = np.array([1, 0, 0]), np.array([2, 0, 3]), np.array([4, 1, 0])
    np.testing.assert_allclose(corpus.precision(hits, predicted, m), [1 / 5, math.nan, 0, 2 / 4])
    np.testing.assert_allclose(corpus.recall(hits, wanted, m), [1 / 5, 0, math.nan, 2 / 9])
    np.testing.assert_allclose(corpus.f1(hits, predicted, wanted, m), [1 / 5, 0, 0, 2 / (1 / (2 / 4) + 1 / (2 / 9))])
    assert corpus.f1(np.zeros(1), np.zeros(1), np.zeros(1), np.ones((1, 1), dtype=np.int64)).tolist() == [0]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1 << 19, 40])  # the second: one or two resamples at a time
def test_corpus_scores_are_those_of_repeated_texts(monkeypatch, m, n, chunk):
    monkeypatch.setattr(corpus, "_CHUNK", chunk)
    types = Types([words(text) for text in TEXTS], n)
    counters = [counts_of(texts, n) for texts in repeated(m)]
    total = np.array([counter.total() for counter in counters])
    unique = np.array([len(counter) for counter in counters])
    assert total[2] == 0  # a resample without words
    np.testing.assert_array_equal(types.total(m), total)
    np.testing.assert_array_equal(types.unique(m), unique)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(types.distinct(m), unique / total)
        np.testing.assert_allclose(types.expectation_adjusted(30, m), unique / (30 * (1 - (29 / 30) ** total)))
    expected = [rarefied([counts_of([text], n) for text in texts], 5) for texts in repeated(m)]
    np.testing.assert_allclose(types.rarefied(5, m), expected, rtol=1e-11)
    np.testing.assert_allclose(types.zipf_slope(m), [zipf(counter, 1000) for counter in counters], atol=1e-12)
    np.testing.assert_allclose(types.zipf_slope(m, 4), [zipf(counter, 4) for counter in counters], atol=1e-12)


def rarefied(counters, size):
    """Of texts with these n-grams, by the Gamma function of the texts that are left."""
    T, N = len(counters), sum(counter.total() for counter in counters)
    if size > N:
        return math.nan
    k = size * T / N

    def choose(n):
        return math.gamma(n + 1) / math.gamma(k + 1) / math.gamma(n - k + 1) if n >= k else 0.0

    types = Counter(ngram for counter in counters for ngram in counter)  # in how many texts each is
    return sum(1 - choose(T - t) / choose(T) for t in types.values()) / size


def zipf(counter, ranks):
    counts = sorted(counter.values(), reverse=True)[:ranks]
    if len(counts) < 2:
        return math.nan
    return np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0]


def test_rarefaction_by_hand():
    one = np.ones((1, 2), dtype=np.int64)
    types = Types([["a", "a"], ["a", "b"]], 1)  # of 2 texts with 4 words, 1 is drawn: b is there half the time
    assert types.rarefied(2, one) == pytest.approx(1.5 / 2)
    assert types.rarefied(4, one) == pytest.approx(types.distinct(one))  # all texts are drawn
    assert np.isnan(types.rarefied(5, one))
    with pytest.raises(ValueError, match="size is 0"):
        types.rarefied(0, one)


def test_rarefaction_is_the_average_over_draws_of_texts():
    random = np.random.default_rng(0)
    texts = [[f"w{number}" for number in random.zipf(1.5, 20) % 50] for _ in range(10)]
    draws = []
    for _ in range(2000):
        chosen = random.choice(10, 3, replace=False)
        draws.append(len({word for text in chosen for word in texts[text]}) / 60)
    error = np.std(draws) / math.sqrt(len(draws))
    whole = Types(texts, 1).rarefied(60, np.ones((1, 10), dtype=np.int64))
    assert whole == pytest.approx(np.mean(draws), abs=4 * error)


def test_a_text_that_repeats_itself_looks_no_more_diverse_among_many():
    """One by one, of 3,000 words few repeat; a text has its repetitions together."""
    loops = Types([[f"w{text}"] * 30 for text in range(100)], 1)
    assert loops.rarefied(300, np.ones((1, 100), dtype=np.int64)) == pytest.approx(10 / 300)


def test_expectation_adjusted_is_1_for_uniform_words():
    random = np.random.default_rng(0)
    m = np.ones((1, 1), dtype=np.int64)
    for length in (200, 2000):  # distinct-1 falls with the length, this does not
        values = [
            Types([random.integers(500, size=length).astype(str).tolist()], 1).expectation_adjusted(500, m)
            for _ in range(20)
        ]
        assert np.mean(values) == pytest.approx(1, abs=0.02)
    assert Types([["a", "a", "b"]], 1).expectation_adjusted(10, m) == pytest.approx(2 / (10 * (1 - 0.9**3)))
    assert Types([["a", "a"]], 1).expectation_adjusted(1, m) == pytest.approx(1)
    with pytest.raises(ValueError, match="vocabulary is 0"):
        Types([["a"]], 1).expectation_adjusted(0, m)


def test_zipf_slope_of_a_power_law():
    text = [f"w{rank}" for rank in range(1, 2001) for _ in range(round(1e5 * rank**-0.8))]
    assert Types([text], 1).zipf_slope(np.ones((1, 1), dtype=np.int64)) == pytest.approx(-0.8, abs=1e-3)
    assert Types([["a", "b", "c"]], 1).zipf_slope(np.ones((1, 1), dtype=np.int64)) == pytest.approx(0)


def test_equal_texts_and_no_words_at_all():
    m = np.array([[1, 1, 1], [0, 3, 0]])
    equal = Types([["a", "b", "c"]] * 3, 2)
    assert equal.unique(m).tolist() == [2, 2]
    assert equal.distinct(m) == pytest.approx([2 / 6, 2 / 6])
    wordless = Types([[], [], []], 1)
    assert wordless.unique(m).tolist() == [0, 0]
    for values in (
        wordless.distinct(m),
        wordless.rarefied(1, m),
        wordless.expectation_adjusted(9, m),
        wordless.zipf_slope(m),
    ):
        assert values.shape == (2,)
        assert np.isnan(values).all()


def test_rouge_l_against_the_references_of_others():
    texts, references = ["a b", "c d", "e f"], ["a b", "a x", "c d"]
    scores = per_text.rouge_l_of_others(texts, references, ["g", "h", "i"])
    assert scores == pytest.approx([(0.5 + 0) / 2, (1 + 0) / 2, 0])
    assert per_text.rouge_l_of_others(texts, references, ["g", "g", "i"]) == pytest.approx([0, 1, 0])
    assert per_text.rouge_l_of_others(texts, references, ["g", "h", "i"], others=1) == pytest.approx([0.5, 1, 0])
    assert per_text.rouge_l_of_others(texts, references, ["g"] * 3).tolist() == [0, 0, 0]


def test_other_prompts_than_the_texts():
    with pytest.raises(ValueError, match=r"m has shape \(2, 4\); accepted is \(resamples, 3\)"):
        Types([["a"]] * 3, 1).unique(np.ones((2, 4), dtype=np.int64))
