"""Writes texts as the file that `pdl-kernels count` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pdl_kernels.weights.files import replace_file


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """One {"text": ...} a line; an old file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
