"""The other recipes, against their formulas in plain Python; and recipes written down and read again."""

import json
import math
from decimal import Decimal, localcontext

import pytest
import torch
from helpers.weightings import COUNTS, EVERY_FORMULA, OPTIONS, for_all, power_law, table_by_hand
from hypothesis import assume

from pdl_kernels import (
    ClassBalancedWeighting,
    IDFWeighting,
    InverseFrequencyWeighting,
    PowerLawWeighting,
    SmoothedInverseWeighting,
    SquareRootInverseFrequencyWeighting,
    TokenCounts,
)
from pdl_kernels.weights.recipes import from_recipe, weightings

NUMBERS = [1, 2, 3, 50, 10_000, 10**9]


def test_every_weighting_has_its_name():
    assert weightings() == EVERY_FORMULA


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


# Written down and read again

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
