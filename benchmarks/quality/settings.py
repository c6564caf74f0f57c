"""How large the experiment is. What changes a number is part of the settings, and so of the cache's name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

CACHE_VERSION = 2  # to be raised when what the stages keep would no longer fit


@dataclass(frozen=True)
class Settings:
    model: str | None = None  # a folder or a name on the hub; None: the packaged SmolLM2-135M-Instruct
    model_version: str = ""  # of the package, or what tells one state of a folder from another
    layers: int | None = 4  # how many of the last layers are trained; None: everything
    training_pairs: int = 5120
    validation_pairs: int = 500
    held_out_pairs: int = 500
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (2e-4, 6e-4, 2e-3)
    search_steps: int = 80  # of each run that a learning rate is chosen by
    seeds: int = 3
    compute_dtype: str = "bfloat16"

    @property
    def steps(self) -> int:
        """One epoch."""
        return self.training_pairs // self.batch_size

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def digest(self) -> str:
        """A short name for everything that changes a number."""
        content = json.dumps({"version": CACHE_VERSION, **self.facts()}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:10]


def for_device(
    device: torch.device, dtype: torch.dtype, model: str | None, model_version: str, layers: int | str | None = None
) -> Settings:
    """Without `layers`, a number or "all", the last ones on a CPU and all of them on a GPU.

    Learning rates are smaller where everything is trained.
    """
    name = str(dtype).removeprefix("torch.")
    settings = Settings(model, model_version, compute_dtype=name)
    if layers == "all" or (layers is None and device.type != "cpu"):
        return replace(settings, layers=None, learning_rates=(1e-5, 3e-5, 1e-4))
    return settings if layers is None else replace(settings, layers=int(layers))


def quick(settings: Settings) -> Settings:
    """Small enough for a few minutes on two cores; what it finds means nothing."""
    return replace(
        settings,
        training_pairs=128,
        validation_pairs=12,
        held_out_pairs=12,
        learning_rates=settings.learning_rates[1:2],
        search_steps=4,
        seeds=1,
    )
