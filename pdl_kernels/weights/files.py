"""Tensors and facts about them in one safetensors file, written whole or not at all; and the files of counts."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT_VERSION = 1
COUNTS = "token counts"  # the kind of file that `TokenCounts` writes


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename: a reader sees the old file or the new one, never a part."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `tensors` with `facts`, which JSON must be able to hold, as a file of this `kind`."""
    header = {"format": f"pdl_kernels {kind}", "format_version": str(FORMAT_VERSION), "facts": json.dumps(facts)}
    replace_file(path, safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, header))


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, one of another program or kind, or one of a newer version of this package.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") == f"pdl_kernels {kind}" and header.get("format_version") == str(FORMAT_VERSION):
                facts = json.loads(header["facts"])
                if not isinstance(facts, dict):
                    raise ValueError(f"its facts are a {type(facts).__name__}")
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged or no safetensors file ({error})") from None
    found = header.get("format") or "a safetensors file of another program"
    if found == f"pdl_kernels {kind}":
        found += f" of version {header.get('format_version')}"
    raise ValueError(f"{os.fspath(path)} is {found}; accepted is pdl_kernels {kind} of version {FORMAT_VERSION}")


def load_counts(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `load`, of a file that `TokenCounts` wrote; ValueError also where its tensors and facts do not agree."""
    tensors, facts = load(path, COUNTS)
    problem = _problem_of_counts(tensors, facts)
    if problem:
        raise ValueError(f"{os.fspath(path)} is damaged: {problem}")
    return tensors, facts


def _problem_of_counts(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
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
