"""The command line of `finetune_docstrings.py`, and what can be refused before any work is done."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.backends import choose_backend
from pdl_kernels.errors import first_line

NEEDED_MODULES = ("transformers", "accelerate", "gguf", "matplotlib", "rich", "tqdm")


class UserError(Exception):
    """A mistake in the call or the installation that one line explains."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return value


def non_negative_number(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text}")
    return value


def seed_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text}")
    return value


def parse_options(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; a mistake ends the program with one line and exit status 2."""
    parser = OneLineParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--alpha", type=non_negative_number, default=0.4, help="exponent of the power law; 0 is cross entropy")
    add("--eps", type=positive_number, default=1.0, help="added to every count")
    add("--steps", type=positive_integer, default=60, help="optimiser steps of each run")
    add("--batch-size", type=positive_integer, default=4, help="sequences per step")
    add("--sequence-length", type=positive_integer, default=128, help="tokens per sequence")
    add("--held-out-sequences", type=positive_integer, default=96, help="sequences to evaluate on, at most")
    add("--learning-rate", type=positive_number, default=2e-4, help="of AdamW at the first step; falls linearly to 0")
    add("--layers", type=positive_integer, default=4, help="how many of the last layers are trained")
    add("--seed", type=seed_number, default=0, help="of the split and of the order of the batches")
    add("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    add("--backend", choices=("auto", "triton", "eager"), default="auto", help="of the loss")
    add("--loss", choices=("logits", "linear"), default="logits", help="linear: fused with the output layer")
    add("--output", type=Path, default=Path("results"), help="folder for the PNG and the JSON file")
    return parser.parse_args(arguments)


def require_modules() -> None:
    missing = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})")


def prepare_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: no permission to write there")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from None
    return device


def backend_that_runs(backend: str, device: torch.device) -> str:
    """The backend that `backend` stands for, after trying the loss once: one that cannot run is refused before minutes
    of work."""
    logits, targets = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        chosen = choose_backend(backend, device, logits.dtype)
        pdl_cross_entropy(logits, targets, backend=chosen)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"--backend {backend} cannot run on {device}: {first_line(error)}") from None
    return chosen
