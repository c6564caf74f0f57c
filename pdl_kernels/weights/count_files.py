"""The files of `TokenCounts`."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pdl_kernels.weights import files

FILE_KIND = "token counts"


def save(path: str | os.PathLike[str], tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    files.save(path, FILE_KIND, tensors, facts)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file, which agree with each other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one of another kind or version.
    """
    tensors, facts = files.load(path, FILE_KIND)
    problem = _problem(tensors, facts)
    if problem:
        raise ValueError(f"{os.fspath(path)} is damaged: {problem}")
    return tensors, facts


def _problem(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    if missing := {"vocab_size", "tokens", "sequences", "rows_read", "tokenizer", "counted"} - facts.keys():
        return f"it does not say {', '.join(sorted(missing))}"
    for name in ("sequences", "rows_read"):
        if not isinstance(facts[name], int) or facts[name] < 0:
            return f"{name} are {facts[name]!r}"
    if "counts" not in tensors:
        return "it holds no counts"
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64 or tensor.shape != (facts["vocab_size"],):
            return f"{name} are {tensor.dtype} of shape {tuple(tensor.shape)}, not int64 of ({facts['vocab_size']},)"
        if (tensor < 0).any():
            return f"{name} are negative"
    if int(tensors["counts"].sum()) != facts["tokens"]:
        return f"the counts add up to {int(tensors['counts'].sum())}, and it says {facts['tokens']}"
    return None
