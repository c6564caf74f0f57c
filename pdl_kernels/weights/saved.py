"""Weight tables on disk, each with the recipe that made it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from torch import Tensor

from pdl_kernels.weights import files
from pdl_kernels.weights.checks import check_table
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.recipes import from_recipe
from pdl_kernels.weights.weighting import Weighting

FILE_KIND = "weight table"


class SavedWeights(NamedTuple):
    """What a weight file holds."""

    table: Tensor  # (V,) float32
    weighting: Weighting | None  # the recipe, if it was given to save_weights
    facts: dict[str, Any]  # "tokens", "counted" and "tokenizer" of the counts, if they were given


def save_weights(
    path: str | os.PathLike[str],
    table: Tensor,
    weighting: Weighting | None = None,
    counts: TokenCounts | None = None,
) -> None:
    """Write a table, its recipe and what was counted, as a safetensors file, whole or not at all."""
    check_table(table)
    facts: dict[str, Any] = {"recipe": None if weighting is None else weighting.recipe()}
    if counts is not None:
        facts |= {"tokens": counts.total, "counted": counts.counted, "tokenizer": counts.tokenizer}
    files.save(path, FILE_KIND, {"weights": table.detach().float().cpu()}, facts)


def load_weights(path: str | os.PathLike[str]) -> SavedWeights:
    """Read what `save_weights` wrote. FileNotFoundError; ValueError: damaged, or a file of another kind or version."""
    tensors, facts = files.load(path, FILE_KIND)
    if "weights" not in tensors or "recipe" not in facts:
        raise ValueError(f"{os.fspath(path)} is damaged: it holds no weights or no recipe")
    try:
        check_table(tensors["weights"])
        recipe = facts.pop("recipe")
        weighting = None if recipe is None else from_recipe(recipe)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error}") from None
    return SavedWeights(tensors["weights"], weighting, facts)
