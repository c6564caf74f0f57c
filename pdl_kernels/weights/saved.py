"""Weight tables on disk, each with the recipe that made it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from pdl_kernels.distributed import equality
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
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a table, its recipe and what was counted, as a safetensors file, whole or not at all.

    Args:
        table: (V,) floating, finite, >= 0; written in float32.
        weighting: the recipe, to be kept with the table.
        counts: what the table was made of: how many tokens, of what and of which tokenizer is kept, the counts are not.
        group: a group of torch.distributed, such as `torch.distributed.group.WORLD`, every rank of which calls this.
            They check that all have the same, the group's first rank writes to its `path`, and the others wait until
            the file is there. None, which WORLD also is before `init_process_group`: this process alone, whatever
            others do.

    Raises:
        TypeError, ValueError: a table that is none.
        OSError: the file cannot be written.
        ValueError: on every rank of the group, where a rank has another table, recipe, number of tokens or tokenizer;
            it names the rank. What was counted, in words, may differ, and is kept as the first rank says it.
        RuntimeError: another rank of the group has failed; names it and its error. Or torch.distributed is not
            initialised.
    """
    caller = f"save_weights to {os.fspath(path)}"
    with equality.together(caller, group):
        check_table(table)
        weights = table.detach().float().cpu()
        facts: dict[str, Any] = {"recipe": None if weighting is None else weighting.recipe()}
        if counts is not None:
            facts |= {"tokens": counts.total, "counted": counts.counted, "tokenizer": counts.tokenizer}
    known = {"tokens": facts.get("tokens"), "tokenizer": facts.get("tokenizer")}
    equality.check_equal(caller, {"table": weights, "weighting": facts["recipe"], "counts": known}, group)
    with equality.together(caller, group):
        if equality.is_first(group):
            files.save(path, FILE_KIND, {"weights": weights}, facts)


def load_weights(path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> SavedWeights:
    """Read what `save_weights` wrote.

    Args:
        group: a group of torch.distributed, such as `torch.distributed.group.WORLD`, every rank of which calls this.
            Each reads its own `path`, and they check that they have read the same. None: as in `save_weights`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one of another kind or version. On every rank of the group, where a rank has read
            another table, recipe or facts than the others; it names the rank.
        RuntimeError: another rank of the group cannot read its file; names it and its error. Or torch.distributed is
            not initialised.
    """
    caller = f"load_weights of {os.fspath(path)}"
    with equality.together(caller, group):
        saved = _read(path)
    recipe = None if saved.weighting is None else saved.weighting.recipe()
    equality.check_equal(caller, {"table": saved.table, "weighting": recipe, **saved.facts}, group)
    return saved


def _read(path: str | os.PathLike[str]) -> SavedWeights:
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
