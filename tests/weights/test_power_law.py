"""From counts to weights, against the formulas in plain Python."""

import json
import math
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import reference
from pdl_kernels import (
    ClassBalancedWeighting,
    IDFWeighting,
    InverseFrequencyWeighting,
    PDLCrossEntropyLoss,
    PowerLawWeighting,
    SmoothedInverseWeighting,
    SquareRootInverseFrequencyWeighting,
    TokenCounts,
    WeightSchedule,
    pdl_cross_entropy,
    power_law_weights,
)
from pdl_kernels.weights.power_law import Weighting
from pdl_kernels.weights.recipes import from_recipe, weightings

ROOT = Path(__file__).resolve().parents[2]


def for_all(**strategies):
    def decorate(check):
        return settings(max_examples=150, deadline=None, derandomize=True, database=None)(given(**strategies)(check))

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# power_law_weights: the bare formula


def test_formula():
    counts = torch.tensor([0, 1, 10, 10**9])
    for alpha, eps in ((0.0, 1e-7), (0.4, 1.0), (1.0, 1e-7), (2.0, 0.5)):
        weights = power_law_weights(counts, alpha, eps)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), reference.power_law_weights(counts, alpha, eps), rtol=1e-7, atol=0)


def test_paper_defaults_make_an_unseen_token_own_the_batch():
    assert power_law_weights(torch.tensor([0, 5])).tolist() == pytest.approx([1e7, 0.2], rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "alpha", "eps", "message"),
    [
        (torch.tensor([1, -2]), 1.0, 1.0, r"counts\[1\] is -2"),
        (torch.tensor([1.0, float("nan")]), 1.0, 1.0, r"counts\[1\] is nan"),
        (torch.tensor([[1]]), 1.0, 1.0, r"shape \(1, 1\)"),
        (torch.tensor([1]), -1.0, 1.0, "alpha is -1.0"),
        (torch.tensor([1]), float("nan"), 1.0, "alpha is nan"),
        (torch.tensor([1]), 1.0, -1.0, "eps is -1.0"),
        (torch.tensor([3, 0]), 1.0, 0.0, "entry 1 .* not finite"),
    ],
)
def test_bad_input(counts, alpha, eps, message):
    with pytest.raises(ValueError, match=message):
        power_law_weights(counts, alpha, eps)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="counts are list"):
        power_law_weights([1, 2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64])
def test_counts_of_every_dtype(dtype):
    weights = power_law_weights(torch.tensor([0, 1, 100], dtype=dtype), alpha=0.5, eps=1)
    assert weights.tolist() == pytest.approx([1, 2**-0.5, 101**-0.5], rel=1e-7)


def test_token_counts_are_counts():
    counts = TokenCounts(3).update([[1, 1, 2]], shift=False)
    assert torch.equal(power_law_weights(counts), power_law_weights(counts.counts))


# ---------------------------------------------------------------------------------------------------------------------
# Formula, normalise, clip, unseen, neutral


def table_by_hand(counts, formula, normalize="token_mean", unseen=1.0, neutral_ids=(), clip=None):
    """The five steps on Python numbers; `formula` maps a count to a weight. ValueError: there is no table."""
    ids = range(len(counts))
    chosen = [i for i in ids if counts[i] > 0 and i not in neutral_ids]
    weights = [formula(count) for count in counts]
    if normalize is not None:
        if not chosen:
            raise ValueError
        divisor = {
            "token_mean": lambda: sum(counts[i] * weights[i] for i in chosen) / sum(counts[i] for i in chosen),
            "vocabulary_mean": lambda: sum(weights[i] for i in chosen) / len(chosen),
            "max": lambda: max(weights[i] for i in chosen),
        }[normalize]()
        weights = [weight / divisor for weight in weights]
    if clip is not None:
        weights = [min(max(weight, clip[0]), clip[1]) for weight in weights]
    if unseen == "cap":
        if not chosen:
            raise ValueError
        cap = max(weights[i] for i in chosen)
        weights = [weights[i] if counts[i] > 0 else cap for i in ids]
    elif unseen != "formula":
        weights = [weights[i] if counts[i] > 0 else unseen for i in ids]
    weights = [1.0 if i in neutral_ids else weights[i] for i in ids]
    if any(math.isinf(weight) for weight in weights):
        raise ValueError
    return weights


def power_law(alpha, eps):
    return lambda n: (n + eps) ** -alpha if n + eps > 0 or alpha == 0 else math.inf


COUNTS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 10**6)), min_size=1, max_size=8)
OPTIONS = st.fixed_dictionaries(
    {
        "normalize": st.sampled_from(["token_mean", "vocabulary_mean", "max", None]),
        "unseen": st.sampled_from([1.0, 0, 0.25, 30.0, "formula", "cap"]),
        "neutral_ids": st.sets(st.integers(0, 3)).map(tuple),
        "clip": st.sampled_from([None, (0, 1), (0.5, 2.0), (1, 1), (0.9, math.inf), (0.0, 1e-3)]),
    }
)


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


EVERY_FORMULA = {
    "power_law": PowerLawWeighting,
    "inverse": InverseFrequencyWeighting,
    "square_root_inverse": SquareRootInverseFrequencyWeighting,
    "class_balanced": ClassBalancedWeighting,
    "smoothed_inverse": SmoothedInverseWeighting,
    "idf": IDFWeighting,
}


def test_every_weighting_has_its_name():
    assert weightings() == EVERY_FORMULA


def make_counts(V=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    popularity = 1 / torch.arange(1, V + 1).double()
    rows = torch.multinomial(popularity.expand(50, V), 30, replacement=True, generator=generator)
    return TokenCounts(V, documents=True).update(rows, shift=True)


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


def test_the_mean_weight_of_a_target_is_1_in_the_loss():
    """What token_mean is for: equally hard tokens give the loss of plain cross entropy."""
    labels = torch.tensor([[3, 1, 1, 2, 1, 0, 1]])
    counts = TokenCounts(5).update(labels, shift=False)
    loss = pdl_cross_entropy(torch.zeros(1, 7, 5), labels, PowerLawWeighting().table(counts), reduction="token_mean")
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


@for_all(counts=COUNTS, options=OPTIONS, eps=st.sampled_from([0, 1.0]))
def test_alpha_0_gives_ones(counts, options, eps):
    assume(any(counts[:4]))
    options |= {
        "neutral_ids": (),
        "clip": None,
        "unseen": options["unseen"] if isinstance(options["unseen"], str) else 1,
    }
    assert PowerLawWeighting(0, eps, **options).table(torch.tensor(counts)).tolist() == [1] * len(counts)
    assert power_law_weights(torch.tensor(counts), 0, eps).tolist() == [1] * len(counts)


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


def test_the_papers_weighting_is_the_bare_formula():
    paper = PowerLawWeighting.paper()
    assert (paper.alpha, paper.eps, paper.normalize, paper.unseen, paper.clip) == (1.0, 1e-7, None, "formula", None)
    counts = torch.cat([torch.arange(50_000), torch.zeros(3), torch.tensor([1e12])])
    assert torch.equal(paper.table(counts), power_law_weights(counts, 1.0, 1e-7))
    assert torch.equal(paper.table(counts), power_law_weights(counts))
    assert paper.table(counts).max() == 1e7


def test_the_recommended_preset():
    preset = PowerLawWeighting()
    assert preset == PowerLawWeighting(0.4, 1.0, normalize="token_mean", unseen=1.0, neutral_ids=(), clip=None)
    table = preset.table(torch.tensor([10**6, 10**3, 10, 0]))
    assert table[0] < 1 < table[1] < table[2]
    assert table[3] == 1


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


def test_another_process_gives_the_same_bits():
    code = (
        "import torch; from pdl_kernels import PowerLawWeighting; "
        "print(PowerLawWeighting(0.37).table(torch.arange(70_000) ** 2).view(torch.int32).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert int(done.stdout) == PowerLawWeighting(0.37).table(torch.arange(70_000) ** 2).view(torch.int32).sum().item()


def test_what_is_given_is_left_alone():
    counts = torch.tensor([5, 0, 2])
    table = PowerLawWeighting(neutral_ids=[0]).table(counts)
    table += 1
    assert counts.tolist() == [5, 0, 2]
    assert not PowerLawWeighting().table(torch.tensor([5.0, 1.0], requires_grad=True)).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# The other recipes

NUMBERS = [1, 2, 3, 50, 10_000, 10**9]


@pytest.mark.parametrize("beta", [0, 0.5, 0.9, 0.9999, 1 - 1e-9, 1 - 1e-15])
def test_class_balanced(beta):
    """Against 60 digits: 1 - beta ** n cancels in floats."""
    with localcontext() as context:
        context.prec = 60
        expected = [float((1 - Decimal(beta)) / (1 - Decimal(beta) ** n)) for n in NUMBERS]
    table = ClassBalancedWeighting(beta=beta, normalize=None).table(torch.tensor([*NUMBERS, 0]))
    assert table.tolist() == pytest.approx([*expected, 1], rel=1e-6)


def test_inverse_and_square_root_inverse():
    counts = torch.tensor([*NUMBERS, 0])
    assert InverseFrequencyWeighting(normalize=None).table(counts).tolist() == pytest.approx(
        [*(1 / n for n in NUMBERS), 1]
    )
    expected = [*(n**-0.5 for n in NUMBERS), 1]
    assert SquareRootInverseFrequencyWeighting(normalize=None).table(counts).tolist() == pytest.approx(
        expected, rel=1e-7
    )
    for like, alpha in ((InverseFrequencyWeighting, 1), (SquareRootInverseFrequencyWeighting, 0.5)):
        torch.testing.assert_close(like().table(counts), PowerLawWeighting(alpha, 0).table(counts), rtol=2e-7, atol=0)


@pytest.mark.parametrize("a", [1e-6, 1e-3, 0.3, 1])
def test_smoothed_inverse(a):
    counts = torch.tensor([*NUMBERS, 0])
    weighting = SmoothedInverseWeighting(a=a, normalize=None, unseen="formula")
    expected = [a / (a + n / sum(NUMBERS)) for n in NUMBERS]
    assert weighting.table(counts).tolist() == pytest.approx([*expected, 1], rel=1e-6)


def test_idf():
    rows = [[0, 0, 1], [0, 2], [0, 1, 1], [], [-100, 0]]
    counts = TokenCounts(5, documents=True).update(rows, shift=False)
    held = [4, 2, 1]  # sequences that hold 0, 1, 2
    expected = [math.log((1 + 5) / (1 + d)) + 1 for d in held]
    assert IDFWeighting(normalize=None).table(counts).tolist() == pytest.approx([*expected, 1, 1])
    unseen = math.log(6) + 1
    table = IDFWeighting(normalize=None, unseen="formula").table(counts, vocab_size=7)
    assert table.tolist() == pytest.approx([*expected, *[unseen] * 4])
    for other in (TokenCounts(5).update(rows, shift=False), counts.counts):
        with pytest.raises(ValueError, match="documents=True"):
            IDFWeighting().table(other)


@pytest.mark.parametrize("kind", [kind for kind in EVERY_FORMULA if kind != "idf"])
@for_all(counts=COUNTS, options=OPTIONS)
def test_the_other_recipes_take_the_same_five_steps(kind, counts, options):
    assume(all(index < len(counts) for index in options["neutral_ids"]))
    formula = {
        "power_law": power_law(0.4, 1.0),
        "inverse": power_law(1, 0),
        "square_root_inverse": power_law(0.5, 0),
        "class_balanced": lambda n: 1e-4 / -math.expm1(n * math.log(0.9999)) if n else math.inf,
        "smoothed_inverse": lambda n: 1e-3 / (1e-3 + n / sum(counts)) if sum(counts) else math.nan,
    }[kind]
    weighting = EVERY_FORMULA[kind](**options)
    if kind == "smoothed_inverse" and not any(counts):
        with pytest.raises(ValueError, match="all 0"):
            weighting.table(torch.tensor(counts))
        return
    try:
        expected = table_by_hand(counts, formula, **options)
    except ValueError:
        with pytest.raises(ValueError, match=r"normalize is|unseen is|not finite"):
            weighting.table(torch.tensor(counts))
        return
    assert weighting.table(torch.tensor(counts)).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-37)


# ---------------------------------------------------------------------------------------------------------------------
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
        ({"neutral_ids": [-1]}, ValueError, "neutral_ids hold -1"),
        ({"neutral_ids": [1.0]}, TypeError, "neutral_ids hold a float"),
        ({"neutral_ids": [True]}, TypeError, "neutral_ids hold a bool"),
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
    ("make", "message"),
    [
        (lambda: ClassBalancedWeighting(beta=1), "beta is 1"),
        (lambda: ClassBalancedWeighting(beta=-0.1), "beta is -0.1"),
        (lambda: SmoothedInverseWeighting(a=0), "a is 0"),
        (lambda: SmoothedInverseWeighting(a=1.5), "a is 1.5"),
    ],
)
def test_bad_options_of_the_other_recipes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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


def test_a_neutral_id_may_be_in_the_padding():
    assert PowerLawWeighting(neutral_ids=[4], unseen=0.0).table(torch.ones(2), 5).tolist() == [1, 1, 0, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

WEIGHTINGS = [
    PowerLawWeighting(),
    PowerLawWeighting.paper(),
    PowerLawWeighting(0.3, 2, normalize="max", unseen="cap", neutral_ids=[4, 0, 4], clip=[0.1, 3]),
    InverseFrequencyWeighting(unseen=0, normalize=None),
    SquareRootInverseFrequencyWeighting(normalize="vocabulary_mean"),
    ClassBalancedWeighting(beta=0.9, clip=(0, math.inf)),
    SmoothedInverseWeighting(a=0.1, unseen="formula"),
    IDFWeighting(neutral_ids={1}),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_recipes_come_back(weighting):
    recipe = weighting.recipe()
    assert recipe["name"] == weighting.name
    assert from_recipe(recipe) == weighting
    assert from_recipe(json.loads(json.dumps(recipe))) == weighting
    assert hash(from_recipe(recipe)) == hash(weighting)


def test_a_recipe_is_frozen_and_in_order():
    ids = [5, 2, 2]
    weighting = PowerLawWeighting(neutral_ids=ids, clip=[0, 1])
    ids.append(7)
    assert weighting.neutral_ids == (2, 5)
    assert weighting.clip == (0.0, 1.0)
    with pytest.raises(AttributeError):
        weighting.alpha = 1.0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "name is None"),
        ({"name": "zipf"}, "name is 'zipf'; accepted are 'power_law'"),
        ({"name": "power_law", "beta": 1}, "does not fit PowerLawWeighting"),
        ({"name": "power_law", "alpha": -1}, "alpha is -1"),
    ],
)
def test_bad_recipes(recipe, message):
    with pytest.raises(ValueError, match=message):
        from_recipe(recipe)


def test_a_formula_of_ones_own():
    class Constant(Weighting):
        name = "constant"

        def formula(self, frequencies):
            return torch.full_like(frequencies.tokens, 3.0)

    assert Constant(unseen="formula").table(torch.tensor([5, 0])).tolist() == [1, 1]
    assert Constant(unseen=0.5, normalize=None).table(torch.tensor([5, 0])).tolist() == [3, 0.5]


# ---------------------------------------------------------------------------------------------------------------------
# Schedules

TABLE = torch.tensor([0.0, 1e-7, 0.5, 1.0, 3.0, 1e7])


def test_the_ramp():
    schedule = WeightSchedule(TABLE, steps=8, start=3)
    for step in range(20):
        r = min(max(step - 3, 0) / 8, 1)
        assert schedule.ratio_at(step) == r
        weights = schedule.weights_at(step)
        assert weights.dtype == torch.float32
        expected = [1 + r * (w - 1) for w in TABLE.tolist()] if r < 1 else TABLE.tolist()
        assert weights.tolist() == pytest.approx(expected, rel=1e-6)
        assert (weights >= 0).all()
    assert torch.equal(schedule.weights_at(3), torch.ones(6)), "plain cross entropy at the start"


def test_the_end_is_the_table_bit_for_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        schedule = WeightSchedule(TABLE.to(dtype), steps=2)
        for step in (2, 3, 10**9):
            assert torch.equal(schedule.weights_at(step), TABLE.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_float32_at_every_step(dtype):
    schedule = WeightSchedule(TABLE.to(dtype), steps=4)
    assert {schedule.weights_at(step).dtype for step in range(6)} == {torch.float32}


def test_no_steps_jump_at_the_start():
    schedule = WeightSchedule(TABLE, steps=0, start=2)
    assert torch.equal(schedule.weights_at(1), torch.ones(6))
    assert torch.equal(schedule.weights_at(2), TABLE)


def test_weights_in_place_of_the_losss():
    schedule = WeightSchedule(torch.tensor([3.0, 0.5]), steps=4)
    loss = PDLCrossEntropyLoss(torch.ones(2), reduction="sum")
    storage = loss.weights.data_ptr()
    for step, expected in ((0, [1, 1]), (1, [1.5, 0.875]), (4, [3, 0.5])):
        assert schedule.weights_at(step, loss.weights) is loss.weights
        assert loss.weights.tolist() == expected
        assert loss(torch.zeros(1, 2), torch.tensor([0])).item() == pytest.approx(expected[0] * math.log(2), rel=1e-6)
    assert loss.weights.data_ptr() == storage


def test_a_schedules_weights_are_ones_own():
    schedule = WeightSchedule(TABLE, steps=1)
    schedule.weights_at(5).zero_()
    assert torch.equal(schedule.weights_at(5), TABLE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((TABLE, -1), ValueError, "steps is -1"),
        ((TABLE, 1, -1), ValueError, "start is -1"),
        ((TABLE, math.nan), ValueError, "steps is nan"),
        ((-TABLE, 1), ValueError, r"table\[1\] is"),
        ((TABLE[None], 1), ValueError, "table has shape"),
        ((TABLE.long(), 1), TypeError, "table is torch.int64"),
        (([1.0], 1), TypeError, "table is list"),
    ],
)
def test_bad_schedules(arguments, error, message):
    with pytest.raises(error, match=message):
        WeightSchedule(*arguments)


@pytest.mark.parametrize("step", [-1, math.nan])
def test_bad_steps(step):
    with pytest.raises(ValueError, match="step is"):
        WeightSchedule(TABLE, 3).weights_at(step)
