"""describe: its numbers by hand, and each warning where it belongs and nowhere else."""

import pytest
import torch
from helpers.tokenizers import ANT, BEE, BOS, CAT, EOS, TURN, WORDS, make_tokenizer, make_transformers_tokenizer

from pdl_kernels import PowerLawWeighting, TokenCounts, describe, special_token_ids


def zipf(V=20_000, targets=3e6, exponent=1.0):
    """Counts by Zipf's law; the rarest types of a short corpus are never seen."""
    popularity = torch.arange(1, V + 1).double() ** -exponent
    return (targets * popularity / popularity.sum()).round().long()


def kinds(table, counts, tokenizer=None):
    """The warnings, each by the words that tell it from the others."""
    words = {
        "holds": "one token type holds",
        "sample": "the effective sample size is",
        "mean": "a target weighs",
        "unseen": "were never counted and weigh up to",
        "zero": "every target weighs 0",
        "eos": "EOS (",
    }
    found = describe(table, counts, tokenizer).warnings
    named = [name for warning in found for name, start in words.items() if start in warning]
    assert len(named) == len(found), found
    return named


def test_every_number_by_hand():
    table = torch.tensor([0.5, 2.0, 4.0, 1.0, 8.0])
    counts = torch.tensor([8, 2, 0, 1])  # one entry shorter: padding of the output layer
    found = describe(table, counts)
    assert (found.vocab_size, found.types_seen, found.targets) == (5, 3, 11)
    # The 11 targets weigh 8 x 0.5 + 2 x 2 + 1 = 9; the squares are 8 x 0.25 + 2 x 4 + 1 = 11.
    assert found.effective_sample == pytest.approx(81 / (11 * 11))
    assert found.mean_weight == pytest.approx(9 / 11)
    assert (found.lightest, found.heaviest, found.unseen_heaviest) == (0.5, 2.0, 8.0)
    assert found.frequent_share == pytest.approx(1)
    assert found.frequent_share_unweighted == pytest.approx(1)

    def entries(types):
        return [(entry.id, entry.count, entry.weight, pytest.approx(entry.share)) for entry in types]

    by_weight = [(4, 0, 8, 0), (2, 0, 4, 0), (1, 2, 2, 4 / 9), (3, 1, 1, 1 / 9), (0, 8, 0.5, 4 / 9)]
    assert entries(found.heaviest_types) == by_weight
    assert entries(found.lightest_types) == [by_weight[i] for i in (4, 3, 2)]
    assert entries(found.largest_types) == [by_weight[i] for i in (4, 2, 3)]
    assert {entry.text for entry in found.heaviest_types} == {None}


def test_the_100_most_frequent_types():
    counts = torch.arange(1, 151)
    found = describe(1 / counts.double(), counts)  # every type weighs the same over the corpus
    assert found.frequent_share == pytest.approx(100 / 150)
    assert found.frequent_share_unweighted == pytest.approx(sum(range(51, 151)) / sum(range(1, 151)))
    assert [entry.id for entry in found.heaviest_types] == list(range(10))
    assert [entry.id for entry in found.lightest_types] == list(range(149, 139, -1))
    assert found.unseen_heaviest is None


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_effective_sample_does_not_depend_on_the_scale(scale):
    """It is the sample size that the weights leave: as computed from one weight per target, laid out one by one."""
    counts = torch.tensor([40, 10, 5, 1])
    table = torch.tensor([0.2, 1.0, 3.0, 9.0]) * scale
    w = table.repeat_interleave(counts).double()
    found = describe(table, counts)
    assert found.effective_sample == pytest.approx((w.sum() ** 2 / (len(w) * (w**2).sum())).item(), rel=1e-6)
    assert found.mean_weight == pytest.approx(w.mean().item(), rel=1e-6)


def test_equal_weights_leave_everything_as_it_is():
    counts = zipf()
    found = describe(torch.ones(len(counts)), counts)
    assert found.effective_sample == pytest.approx(1)
    assert found.mean_weight == 1
    assert found.frequent_share == pytest.approx(found.frequent_share_unweighted)
    assert found.warnings == ()


def test_token_counts_and_tensors_are_described_alike():
    counts = TokenCounts(4).update([[1, 1, 2, 3, 3, 3]], shift=False)
    table = PowerLawWeighting().table(counts)
    assert describe(table, counts) == describe(table, counts.counts) == describe(table.double(), counts.counts.float())


def test_the_short_form():
    found = describe(torch.tensor([0.5, 2.0, 900.0]), torch.tensor([8000, 2000, 0]))
    lines = str(found).split("\n")
    assert lines[:5] == [
        "10,000 targets, 2 of 3 types seen",
        "effective sample size    64.0% of the targets",
        "mean weight of a target  0.8",
        "weights of seen types    0.5 to 2",
        "weight in the 100 most frequent types  100.0% (plain cross entropy: 100.0%)",
    ]
    assert lines[5:] == [f"warning: {warning}" for warning in found.warnings]
    assert len(lines) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Warnings


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
@pytest.mark.parametrize(("V", "targets"), [(1000, 1e5), (32_000, 1e5), (131_072, 1e9)])
def test_the_recommended_preset_on_natural_text_gives_no_warning(V, targets, exponent):
    counts = zipf(V, targets, exponent)
    for weighting in (PowerLawWeighting(), PowerLawWeighting(neutral_ids=(0, V - 1), unseen="cap")):
        assert kinds(weighting.table(counts, vocab_size=V + 64), counts) == []


def test_the_papers_weights_on_natural_text_give_warnings():
    counts = zipf(50_000, 1e5)
    assert kinds(PowerLawWeighting.paper().table(counts), counts) == ["mean", "unseen"]
    assert kinds(PowerLawWeighting(1.0, 1e-7).table(counts), counts) == [], "normalised, unseen at 1"


def test_one_type_holds_the_weight():
    counts = torch.tensor([1000, 1000, 1])
    found = describe(torch.tensor([0.5, 0.5, 1000.0]), counts)
    assert found.warnings[0] == (
        "one token type holds 50% of the weight: id 2, counted 1 times (plain cross entropy gives it 0.05%)"
    )
    assert kinds(torch.tensor([0.7, 0.7, 400.0]), counts) == ["sample"]  # 22 %
    # Half of the targets are one type anyhow: the weights are not to blame.
    assert kinds(torch.tensor([1.5, 0.5]), torch.tensor([10, 10])) == []
    assert kinds(torch.ones(1), torch.tensor([10])) == []


def test_a_small_effective_sample():
    def table(share):  # one target of 1000 weighs w, the others 1, so that the effective sample is this share
        n = 1000
        a, b, c = 1 - share * n, 2 * (n - 1), (n - 1) ** 2 - share * n * (n - 1)
        w = (-b - (b * b - 4 * a * c) ** 0.5) / (2 * a)
        return torch.tensor([1.0, w])

    counts = torch.tensor([999, 1])
    assert describe(table(0.09), counts).effective_sample == pytest.approx(0.09, rel=1e-5)
    assert "sample" in kinds(table(0.099), counts)
    assert "sample" not in kinds(table(0.101), counts)
    assert "9.0%" in " ".join(describe(table(0.09), counts).warnings)


@pytest.mark.parametrize(("scale", "warned"), [(0.49, True), (0.5, False), (1.0, False), (2.0, False), (2.01, True)])
def test_a_mean_far_from_1(scale, warned):
    counts = torch.tensor([10, 10, 10])
    assert kinds(torch.full((3,), scale), counts) == ["mean"] * warned
    if warned:
        assert f"a target weighs {scale:.3g} on average" in describe(torch.full((3,), scale), counts).warnings[0]


@pytest.mark.parametrize(("unseen", "warned"), [(99.0, False), (101.0, True)])
def test_heavy_types_that_were_never_counted(unseen, warned):
    table, counts = torch.tensor([1.0, 1.0, unseen, 0.1]), torch.tensor([5, 5])
    assert kinds(table, counts) == ["unseen"] * warned
    if warned:
        (warning,) = describe(table, counts).warnings
        assert warning.startswith("2 token types were never counted and weigh up to 101: one occurrence counts as much")


def test_weights_of_0():
    counts = torch.tensor([3, 4, 0])
    assert kinds(torch.tensor([0.0, 0.0, 1.0]), counts) == ["zero"]
    found = describe(torch.zeros(3), counts)
    assert (found.effective_sample, found.mean_weight, found.frequent_share) == (0, 0, 0)


def counts_of_animals(eos):
    end = [EOS] if eos else []
    return TokenCounts(12).update([[BOS, ANT, BEE, *end], [BOS, ANT, CAT, ANT, *end]], shift=True)


def test_an_end_of_text_that_was_never_counted():
    """Two sequences of weight 1e7 beside five targets of weights below 1."""
    tokenizer = make_transformers_tokenizer()
    counts = counts_of_animals(eos=False)
    table = PowerLawWeighting.paper().table(counts)
    warning = next(warning for warning in describe(table, counts, tokenizer).warnings if "EOS" in warning)
    assert "EOS ('</s>', id 2) was never counted" in warning
    assert "once per sequence it would hold 100% of the weight" in warning
    table = torch.full((12,), 1.5)
    (warning,) = describe(table, counts, tokenizer).warnings
    assert f"it would hold {2 / 7:.0%} of the weight" in warning
    (warning,) = describe(table, counts.counts, tokenizer).warnings  # without the number of sequences
    assert "EOS ('</s>', id 2) was never counted" in warning


@pytest.mark.parametrize("make", [make_tokenizer, lambda: make_transformers_tokenizer(eos_token=None), lambda: None])
def test_no_warning_without_an_end_of_text(make):
    counts = counts_of_animals(eos=False)
    assert kinds(torch.ones(12), counts, make()) == []


def test_no_warning_where_the_end_of_text_was_counted():
    tokenizer = make_transformers_tokenizer()
    counts = counts_of_animals(eos=True)
    assert kinds(PowerLawWeighting().table(counts), counts, tokenizer) == []
    assert kinds(torch.ones(2), counts.counts[:2] + 1, tokenizer) == [], "an output layer that has no EOS"


def test_the_end_of_text_warning_goes_when_its_advice_is_followed():
    tokenizer = make_transformers_tokenizer()
    counts = counts_of_animals(eos=False)
    table = PowerLawWeighting(neutral_ids=special_token_ids(tokenizer)).table(counts)
    assert kinds(table, counts, tokenizer) == []


# ---------------------------------------------------------------------------------------------------------------------
# Tokens as text


@pytest.mark.parametrize("make", [make_tokenizer, make_transformers_tokenizer])
def test_types_are_shown_as_text(make):
    counts = counts_of_animals(eos=True)
    table = torch.linspace(2, 1, 12)
    found = describe(table, counts, make())
    shown = {entry.id: entry.text for entry in (*found.heaviest_types, *found.lightest_types, *found.largest_types)}
    assert shown[ANT] == "ant"
    assert shown[EOS] == "</s>"
    assert shown[TURN] == "<|turn|>"
    assert shown[TURN + 1] is None, "the output layer is longer than the tokenizer"
    assert [shown[i] for i in range(8)] == list(WORDS)
    heavy = describe(torch.tensor([1.0] * 5 + [900.0] + [1.0] * 6), counts, make())
    assert "'bee' (id 5)" in heavy.warnings[0]


@pytest.mark.parametrize("tokenizer", ["gpt2", str.split, 5], ids=["str", "function", "number"])
def test_a_tokenizer_of_another_kind(tokenizer):
    with pytest.raises(TypeError, match=r"tokenizer is a \w+; accepted is a transformers tokenizer"):
        describe(torch.ones(2), torch.ones(2), tokenizer)


@pytest.mark.parametrize(
    ("table", "counts", "error", "message"),
    [
        (torch.ones(2), torch.ones(3), ValueError, "counts have 3 entries; accepted are at most 2"),
        (torch.ones(2), torch.zeros(2), ValueError, "counts are all 0"),
        (torch.tensor([1.0, -1.0]), torch.ones(2), ValueError, r"table\[1\] is -1"),
        (torch.tensor([1.0, torch.inf]), torch.ones(2), ValueError, r"table\[1\] is inf"),
        (torch.ones(2), torch.tensor([1, -1]), ValueError, r"counts\[1\] is -1"),
        (torch.ones(2), [1, 1], TypeError, "counts are list"),
        ([1.0], torch.ones(1), TypeError, "table is list"),
    ],
)
def test_bad_input(table, counts, error, message):
    with pytest.raises(error, match=message):
        describe(table, counts)
