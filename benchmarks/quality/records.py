"""What is kept of the experiment: one file a task, and one for each trained model, compressed, with all its texts."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.cache import explained
from benchmarks.quality.errors import UserError
from pdl_kernels.weights.files import replace_file

SCHEMA = "pdl-kernels quality"
VERSION = 2
THOUSANDTHS = ("rouge_l", "rouge_l_others", "chrf", "cut_rouge_l", "cut_chrf")  # kept as whole thousandths


def record_path(folder: Path, task: str, arm: str, seed: int) -> Path:
    return folder / task / f"{arm}-seed{seed}.json.xz"


def task_path(folder: Path, task: str) -> Path:
    return folder / task / "task.json.xz"


def write(path: Path, document: dict[str, Any]) -> None:
    content = json.dumps({"schema": SCHEMA, "version": VERSION, **document}, ensure_ascii=False, separators=(",", ":"))
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME))


def read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(lzma.decompress(path.read_bytes()))
    except (OSError, lzma.LZMAError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if document.get("schema") != SCHEMA or document.get("version") != VERSION:
        raise UserError(f"{path} is not a record of this program's version: expected {SCHEMA} {VERSION}")
    return document


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists there."""
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def compact(scores: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Per-text scores as whole numbers."""
    return {
        name: (np.round(values * 1000) if name in THOUSANDTHS else values).astype(np.int64).tolist()
        for name, values in scores.items()
    }


def expanded(scores: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: np.array(values) / (1000 if name in THOUSANDTHS else 1) for name, values in scores.items()}
