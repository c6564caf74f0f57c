"""The options that the two fine-tuning examples share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from docstring_options import OneLineParser, non_negative_number, positive_integer, positive_number, seed_number

QUICK = {"steps": 20, "batch_size": 4, "max_length": 96, "layers": 2, "learning_rate": 5e-4, "held_out": 40}


def layers_number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text}")
    return value


def make_parser(description: str, output: str) -> OneLineParser:
    """A parser with the shared options; `output` is the folder where results go unless --output says another."""
    parser = OneLineParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", help="a folder or a name on the Hugging Face hub; without it SmolLM2-135M-Instruct, offline")
    add(
        "--data",
        nargs="+",
        help="files of chats (messages) or of prompts with completions, such as rows.jsonl, or OWNER/NAME:SPLIT on the "
        "Hugging Face hub; without it docstrings of the running Python",
    )
    add("--kind", choices=("chats", "completions", "texts"), help="of the data, where the columns do not tell")
    add("--column", help="of the data: what is learned, where the columns' names do not tell")
    add("--prompt", help="of the data: the column before the completions, or a template with columns in braces")
    add("--rows", type=positive_integer, default=20_000, help="of the data, read at most")
    add("--held-out", type=positive_integer, default=200, help="rows to evaluate on, at most; a tenth is held out")
    add("--alpha", type=non_negative_number, default=0.4, help="exponent of the power law; 0 is cross entropy")
    add("--steps", type=positive_integer, default=200, help="optimiser steps of each run")
    add("--batch-size", type=positive_integer, default=4, help="rows of a micro-batch")
    add("--accumulation", type=positive_integer, default=1, help="micro-batches of a step")
    add("--max-length", type=positive_integer, default=256, help="tokens of a row; what follows is cut off")
    add("--learning-rate", type=positive_number, default=2e-4, help="of AdamW at the first step; falls linearly to 0")
    add("--layers", type=layers_number, default=4, help="how many of the last layers are trained; 0: all of the model")
    add("--seed", type=seed_number, default=0, help="of the split and of the order of the batches")
    add("--output", type=Path, default=Path(output), help="folder for checkpoints and results")
    add("--quick", action="store_true", help="few steps and short rows, unless other options say otherwise")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, Any] = QUICK
) -> argparse.Namespace:
    """The options; a mistake ends the program with one line and exit status 2."""
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args(arguments)
    return options
