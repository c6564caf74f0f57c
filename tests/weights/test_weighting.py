"""What every weighting does after its formula: normalise, clip, unseen, neutral; and what it refuses."""

import math

import pytest
import torch
from helpers.weightings import COUNTS, EVERY_FORMULA, OPTIONS, for_all, make_counts, power_law, table_by_hand
from hypothesis import assume
from hypothesis import strategies as st

from pdl_kernels import (
    ClassBalancedWeighting,
    InverseFrequencyWeighting,
    PowerLawWeighting,
    SmoothedInverseWeighting,
    SquareRootInverseFrequencyWeighting,
    pdl_cross_entropy,
)
from pdl_kernels.weights.weighting import Weighting


@for_all(
    counts=COUNTS,
    options=OPTIONS,
    alpha=st.sampled_from([0, 0.25, 0.4, 1.0, 2.0]),
    eps=st.sampled_from([0, 1e-7, 0.5, 1.0, 100.0]),
    padding=st.integers(0, 3),
)
def test_the_five_steps(counts, options, alpha, eps, padding):
    assume(all(index < len(counts) + padding for index in options["neutral_ids"]))
    weighting = PowerLawWeighting(alpha, eps, **options)
    vocab_size = len(counts) + padding
    try:
        expected = table_by_hand(counts + [0] * padding, power_law(alpha, eps), **options)
    except ValueError:
        with pytest.raises(ValueError, match=r"normalize is|unseen is|not finite"):
            weighting.table(torch.tensor(counts), vocab_size)
        return
    table = weighting.table(torch.tensor(counts), vocab_size)
    assert table.dtype == torch.float32
    assert table.tolist() == pytest.approx(expected, rel=2e-7, abs=1e-37)


def test_the_steps_on_numbers_to_follow_by_eye():
    counts = torch.tensor([4, 4, 1, 0])
    inverse = {"alpha": 1.0, "eps": 0.0}

    def table(**options):
        return PowerLawWeighting(**inverse, **options).table(counts, vocab_size=5).tolist()

    # The formula: 1/4, 1/4, 1, unseen. Mean over the nine targets: 3/9.
    assert table(normalize=None) == [0.25, 0.25, 1, 1, 1]
    assert table() == pytest.approx([0.75, 0.75, 3, 1, 1])
    assert table(normalize="vocabulary_mean") == pytest.approx([0.5, 0.5, 2, 1, 1])
    assert table(normalize="max", unseen=7) == [0.25, 0.25, 1, 7, 7]
    assert table(clip=(0.8, 2)) == pytest.approx([0.8, 0.8, 2, 1, 1])
    assert table(clip=(0.8, 2), unseen="cap") == pytest.approx([0.8, 0.8, 2, 2, 2])
    assert table(clip=(0.8, 2), unseen=5) == pytest.approx([0.8, 0.8, 2, 5, 5])  # a number is not clipped
    # Neutral types do not take part: five targets remain, of mean weight 2/5.
    assert table(neutral_ids=[1, 4]) == pytest.approx([0.625, 1, 2.5, 1, 1])
    assert table(neutral_ids=[2], unseen="cap", clip=(0, 0.5)) == pytest.approx([0.5, 0.5, 1, 0.5, 0.5])
    assert table(clip=(0, 0.5), unseen="formula") == pytest.approx([0.5] * 5)


@pytest.mark.parametrize("kind", EVERY_FORMULA)
@pytest.mark.parametrize("neutral_ids", [(), (0, 1, 39)])
def test_normalisations_make_what_they_say_1(kind, neutral_ids):
    counts = make_counts()
    chosen = counts.counts > 0
    chosen[list(neutral_ids)] = False
    n = counts.counts[chosen].double()

    def weights(normalize):
        return EVERY_FORMULA[kind](normalize=normalize, neutral_ids=neutral_ids).table(counts)[chosen].double()

    assert (weights("token_mean") * n).sum() / n.sum() == pytest.approx(1, rel=1e-7)
    assert weights("vocabulary_mean").mean() == pytest.approx(1, rel=1e-7)
    assert weights("max").max() == 1
    bare = weights(None)
    for normalize in ("token_mean", "vocabulary_mean", "max"):
        ratio = weights(normalize) / bare
        assert ratio.max() / ratio.min() == pytest.approx(1, rel=1e-6), "normalising is one factor for all"


@for_all(
    counts=COUNTS,
    scale=st.sampled_from([2, 3, 1000]),
    normalize=st.sampled_from(["token_mean", "vocabulary_mean", "max"]),
    kind=st.sampled_from(["power_law", "inverse", "square_root_inverse", "smoothed_inverse"]),
)
def test_a_larger_corpus_of_the_same_kind_gives_the_same_table(counts, scale, normalize, kind):
    assume(any(counts))
    weighting = EVERY_FORMULA[kind](normalize=normalize, **({"eps": 0} if kind == "power_law" else {}))
    counts = torch.tensor(counts)
    torch.testing.assert_close(weighting.table(counts * scale), weighting.table(counts), rtol=3e-7, atol=0)


@pytest.mark.lesson("table as long as the tokenizer")
@pytest.mark.parametrize("kind", EVERY_FORMULA)
def test_a_padded_output_layer(kind):
    counts = make_counts()
    weighting = EVERY_FORMULA[kind](unseen=0.5)
    table = weighting.table(counts, vocab_size=64)
    assert table.shape == (64,)
    assert torch.equal(table[:40], weighting.table(counts))
    assert table[40:].tolist() == [0.5] * 24
    assert weighting.table(counts, vocab_size=40).shape == (40,)
    logits, targets = torch.randn(3, 64), torch.tensor([1, 5, 9])
    assert pdl_cross_entropy(logits, targets, table).isfinite()
    with pytest.raises(ValueError, match="weights"):
        pdl_cross_entropy(logits, targets, weighting.table(counts))


@pytest.mark.parametrize("kind", EVERY_FORMULA)
def test_the_same_counts_give_the_same_bits(kind):
    """Whatever the number of threads, the process, or the tensor's strides."""
    counts = make_counts(V=100_000)
    table = EVERY_FORMULA[kind]().table(counts)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(EVERY_FORMULA[kind]().table(counts), table)
    finally:
        torch.set_num_threads(threads)
    if kind != "idf":
        strided = torch.stack([counts.counts, counts.counts], 1)[:, 0]
        assert torch.equal(EVERY_FORMULA[kind]().table(strided), table)


def test_what_is_given_is_left_alone():
    counts = torch.tensor([5, 0, 2])
    table = PowerLawWeighting(neutral_ids=[0]).table(counts)
    table += 1
    assert counts.tolist() == [5, 0, 2]
    assert not PowerLawWeighting().table(torch.tensor([5.0, 1.0], requires_grad=True)).requires_grad


def test_a_neutral_id_may_be_in_the_padding():
    assert PowerLawWeighting(neutral_ids=[4], unseen=0.0).table(torch.ones(2), 5).tolist() == [1, 1, 0, 0, 1]


def test_a_formula_of_ones_own():
    class Constant(Weighting):
        name = "constant"

        def formula(self, frequencies):
            return torch.full_like(frequencies.tokens, 3.0)

    assert Constant(unseen="formula").table(torch.tensor([5, 0])).tolist() == [1, 1]
    assert Constant(unseen=0.5, normalize=None).table(torch.tensor([5, 0])).tolist() == [3, 0.5]


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, "alpha is -0.1; accepted are finite numbers >= 0"),
        ({"alpha": math.nan}, ValueError, "alpha is nan"),
        ({"alpha": math.inf}, ValueError, "alpha is inf"),
        ({"alpha": "0.4"}, TypeError, "alpha is a str"),
        ({"alpha": True}, TypeError, "alpha is a bool"),
        ({"eps": -1}, ValueError, "eps is -1"),
        ({"eps": math.nan}, ValueError, "eps is nan"),
        ({"normalize": "mean"}, ValueError, "normalize is 'mean'; accepted are 'token_mean', 'vocabulary_mean', 'max'"),
        ({"normalize": True}, ValueError, "normalize is True"),
        ({"unseen": -1}, ValueError, "unseen is -1"),
        ({"unseen": math.nan}, ValueError, "unseen is nan"),
        ({"unseen": "max"}, ValueError, "unseen is 'max'; accepted are a number >= 0, 'formula' and 'cap'"),
        ({"unseen": None}, TypeError, "unseen is a NoneType"),
        ({"neutral_ids": [-1]}, ValueError, r"neutral_ids\[0\] is -1"),
        ({"neutral_ids": [1.0]}, TypeError, r"neutral_ids\[0\] is a float"),
        ({"neutral_ids": [True]}, TypeError, r"neutral_ids\[0\] is a bool"),
        ({"clip": (2, 1)}, ValueError, r"clip is \(2, 1\); accepted are 0 <= low <= high"),
        ({"clip": (-1, 1)}, ValueError, "0 <= low"),
        ({"clip": (0, math.nan)}, ValueError, "clip is"),
        ({"clip": (1,)}, ValueError, "clip is"),
        ({"clip": ("0", "1")}, ValueError, "clip is"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        PowerLawWeighting(**options)


@pytest.mark.parametrize(
    ("weighting", "counts", "vocab_size", "message"),
    [
        (PowerLawWeighting(1, 0, unseen="formula"), [3, 0], None, "entry 1 .*count 0.* not finite"),
        (InverseFrequencyWeighting(unseen="formula"), [3, 0], None, "entry 1 .* not finite"),
        (SquareRootInverseFrequencyWeighting(unseen="formula"), [3], 2, "entry 1 .* not finite"),
        (ClassBalancedWeighting(unseen="formula"), [3, 0], None, "entry 1 .* not finite"),
        (
            PowerLawWeighting(10, 1e-7, normalize=None, unseen="formula"),
            [3, 0],
            None,
            "entry 1 .* not finite in float32",
        ),
        (PowerLawWeighting(), [0, 0], None, "normalize is 'token_mean', and no type is both seen and not neutral"),
        (PowerLawWeighting(neutral_ids=[1]), [0, 5], None, "no type is both seen and not neutral"),
        (PowerLawWeighting(normalize=None, unseen="cap"), [0], None, "unseen is 'cap'"),
        (SmoothedInverseWeighting(), [0], None, "counts are all 0"),
        (PowerLawWeighting(neutral_ids=[0, 2]), [1, 1], None, "neutral_ids hold 2; accepted are ids from 0 to 1"),
        (PowerLawWeighting(), [1, 1, 1], 2, "vocab_size is 2; accepted are integers >= 3"),
        (PowerLawWeighting(alpha=2000), [5, 5], None, "cannot be normalised: their token_mean is 0"),
        (PowerLawWeighting(), [1, -1], None, r"counts\[1\] is -1"),
        (PowerLawWeighting(), [1, math.nan], None, r"counts\[1\] is nan"),
        (PowerLawWeighting(), [1, math.inf], None, r"counts\[1\] is inf"),
        (PowerLawWeighting(), [[1, 1]], None, r"counts have shape \(1, 2\)"),
    ],
)
def test_no_table(weighting, counts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        weighting.table(torch.tensor(counts), vocab_size)


@pytest.mark.parametrize("counts", [[1, 2], None, {1: 2}, torch.ones(2, dtype=torch.complex64)], ids=repr)
def test_no_counts(counts):
    with pytest.raises(TypeError, match="counts are"):
        PowerLawWeighting().table(counts)


@pytest.mark.parametrize("vocab_size", [3.0, "3", True])
def test_bad_vocab_size(vocab_size):
    with pytest.raises(TypeError, match="vocab_size is a"):
        PowerLawWeighting().table(torch.ones(2), vocab_size)
