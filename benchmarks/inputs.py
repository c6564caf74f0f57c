"""What is measured on: logits like a trained model's, Zipf targets, weights from the same counts, ignored prompts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pdl_kernels import power_law_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
IGNORE_INDEX = -100
IGNORED_SHARE = 0.1  # of every sequence: its prompt, which supervised fine-tuning does not learn
SEQUENCE_ROWS = 512
CONFIDENT_EVERY = 4  # one row in so many has a target probability near 1, the others are flat
CONFIDENT_MARGIN = 6.0  # nats between the target's logit and the log-sum-exp of the others
LOGIT_DEVIATION = 2.0
CORPUS_TOKENS = 1e8
PIECE_ELEMENTS = 1 << 24  # random numbers made at a time: their float32 copy stays small


class Case(NamedTuple):
    """One shape: (rows, vocab_size) logits of `dtype`."""

    rows: int
    vocab_size: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab_size * self.itemsize

    def __str__(self) -> str:
        return f"{self.rows} x {self.vocab_size} {self.dtype}"


class Inputs(NamedTuple):
    case: Case
    logits: Tensor  # (rows, V)
    targets: Tensor  # (rows,) int64, IGNORE_INDEX where ignored
    weights: Tensor  # (V,) float32

    @property
    def device(self) -> torch.device:
        return self.logits.device


def counted_rows(rows: int) -> int:
    """How many of `rows` targets are not ignored."""
    return int((~_ignored(rows, torch.device("cpu"))).sum())


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    ranks = torch.arange(1, case.vocab_size + 1, dtype=torch.float64, device=device)
    frequencies = (1 / ranks) / (1 / ranks).sum()  # Zipf's law
    targets = torch.multinomial(frequencies, case.rows, replacement=True, generator=generator)
    weights = power_law_weights((frequencies * CORPUS_TOKENS).round(), alpha=0.4, eps=1.0)

    logits = torch.empty(case.rows, case.vocab_size, dtype=DTYPES[case.dtype], device=device)
    # The log-sum-exp of V normal numbers of deviation d is about log(V) + d**2 / 2.
    confident_logit = math.log(case.vocab_size) + LOGIT_DEVIATION**2 / 2 + CONFIDENT_MARGIN
    piece_rows = max(1, PIECE_ELEMENTS // case.vocab_size)
    for start in range(0, case.rows, piece_rows):
        piece = logits[start : start + piece_rows]
        numbers = torch.randn(piece.shape, generator=generator, device=device) * LOGIT_DEVIATION
        rows = torch.arange(start, start + piece.shape[0], device=device)
        confident = rows % CONFIDENT_EVERY == 0
        numbers[confident, targets[rows[confident]]] = confident_logit
        piece.copy_(numbers)

    targets[_ignored(case.rows, device)] = IGNORE_INDEX
    return Inputs(case, logits, targets, weights.to(device=device, dtype=torch.float32))


def _ignored(rows: int, device: torch.device) -> Tensor:
    """(rows,) whether the row belongs to a prompt: the beginning of every sequence, so that neighbours share it."""
    length = min(rows, SEQUENCE_ROWS)
    return torch.arange(rows, device=device) % length < int(IGNORED_SHARE * length)
