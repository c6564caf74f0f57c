"""The steps from counts to weights on Python's numbers, and counts and options to try them on."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdl_kernels import (
    ClassBalancedWeighting,
    IDFWeighting,
    InverseFrequencyWeighting,
    PowerLawWeighting,
    SmoothedInverseWeighting,
    SquareRootInverseFrequencyWeighting,
    TokenCounts,
)

EVERY_FORMULA = {
    "power_law": PowerLawWeighting,
    "inverse": InverseFrequencyWeighting,
    "square_root_inverse": SquareRootInverseFrequencyWeighting,
    "class_balanced": ClassBalancedWeighting,
    "smoothed_inverse": SmoothedInverseWeighting,
    "idf": IDFWeighting,
}

COUNTS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 10**6)), min_size=1, max_size=8)
OPTIONS = st.fixed_dictionaries(
    {
        "normalize": st.sampled_from(["token_mean", "vocabulary_mean", "max", None]),
        "unseen": st.sampled_from([1.0, 0, 0.25, 30.0, "formula", "cap"]),
        "neutral_ids": st.sets(st.integers(0, 3)).map(tuple),
        "clip": st.sampled_from([None, (0, 1), (0.5, 2.0), (1, 1), (0.9, math.inf), (0.0, 1e-3)]),
    }
)


def for_all(**strategies):
    def decorate(check):
        return settings(max_examples=150, deadline=None, derandomize=True, database=None)(given(**strategies)(check))

    return decorate


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


def make_counts(V=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    popularity = 1 / torch.arange(1, V + 1).double()
    rows = torch.multinomial(popularity.expand(50, V), 30, replacement=True, generator=generator)
    return TokenCounts(V, documents=True).update(rows, shift=True)
