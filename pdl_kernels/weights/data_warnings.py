"""What counts themselves tell about whether they can be those of training's targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pdl_kernels.weights.counts import TokenCounts

HEAVIEST = 0.01  # of the types seen: the largest weights
LISTED = 3  # special tokens named in a warning

Named = Callable[[int], str]  # a token's id and, where it is known, its text


def eos_warnings(
    eos: int | None, weights: Tensor, tokens: Tensor, sequences: int, mean_weight: float, named: Named
) -> Sequence[str]:
    """What EOS, which training often adds to the texts, would weigh if it was left out of the counts.

    Of no concern to the loss where its weight is 1, as in plain cross entropy.
    """
    if eos is None or not 0 <= eos < len(weights) or tokens[eos] > 0 or weights[eos] == 1:
        return []
    problem = f"EOS ({named(eos)}) was never counted: if training has it as a target, "
    if sequences == 0:
        return [f"{problem}count it, or make it neutral"]
    mass = sequences * weights[eos].item()
    share = mass / (mass + mean_weight * tokens.sum().item())
    return [f"{problem}once per sequence it would hold {share:.0%} of the weight; count it, or make it neutral"]


def special_token_warnings(
    special: Sequence[int], weights: Tensor, tokens: Tensor, mean_weight: float, named: Named
) -> Sequence[str]:
    """Whether training would learn, above all, tokens that a template puts there."""
    seen = weights[tokens > 0]
    least = seen.sort(descending=True).values[max(int(HEAVIEST * len(seen)) - 1, 0)]
    heavy = [
        index
        for index in special
        if index < len(weights) and tokens[index] > 0 and weights[index] >= least and weights[index] > mean_weight
    ]
    if not heavy:
        return []
    heavy.sort(key=lambda index: -weights[index].item())
    listed = ", ".join(
        f"{named(index)}, counted {int(tokens[index]):,} times, weighs {weights[index].item():.3g}"
        for index in heavy[:LISTED]
    )
    more = f", and {len(heavy) - LISTED} more" if len(heavy) > LISTED else ""
    return [
        f"special tokens are among the heaviest types: {listed}{more}; neutral_ids (--neutral-special) makes them 1"
    ]


def mixture_warnings(counts: TokenCounts) -> Sequence[str]:
    """Whether prompts were counted together with answers."""
    parts = set(counts.parts)
    if "answers" in parts and parts & {"prompts", "texts"}:
        others = "prompts" if "prompts" in parts else "texts"
        return [
            f"these are counts of {others} and answers together: right where training has a loss on both (TRL: "
            "assistant_only_loss=False for chats, completion_only_loss=False for completions), and wrong elsewhere"
        ]
    return []
