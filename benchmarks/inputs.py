"""What is measured on: logits like a trained model's, Zipf targets, weights from the same counts, ignored prompts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pdl_kernels import power_law_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)  # of Llama-2, GPT-2, Llama-3, Qwen-2.5 and Gemma
IGNORE_INDEX = -100
IGNORED_SHARE = 0.1  # of every sequence: its prompt, which supervised fine-tuning does not learn
SEQUENCE_ROWS = 512
CONFIDENT_EVERY = 4  # one row in so many has a target probability near 1, the others are flat
CONFIDENT_MARGIN = 6.0  # nats between the target's logit and the log-sum-exp of the others
LOGIT_DEVIATION = 2.0
CORPUS_TOKENS = 1e8
BLOCK_ELEMENTS = 1 << 24  # random numbers made at a time: their float32 copy stays small


class Case(NamedTuple):
    """One shape: (rows, vocab_size) logits of `dtype`, given as they are or as a projection of hidden states."""

    rows: int
    vocab_size: int
    dtype: str
    hidden_size: int = 0  # of the hidden states; 0: the logits are the input
    ignored: float = IGNORED_SHARE

    @property
    def linear(self) -> bool:
        return self.hidden_size > 0

    @property
    def loss(self) -> str:
        """What `--loss` calls it."""
        return "linear" if self.linear else "logits"

    @property
    def counted(self) -> int:
        """How many of the targets are not ignored."""
        return int((~_ignored(self, torch.device("cpu"))).sum())

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab_size * self.itemsize

    def __str__(self) -> str:
        if not self.linear:
            return f"{self.rows} x {self.vocab_size} {self.dtype}"
        return f"{self.rows} x {self.hidden_size} x {self.vocab_size} {self.dtype}, {self.ignored:.0%} ignored"


class Inputs(NamedTuple):
    """What a contender gets. `sources` are what it differentiates: the logits, or hidden states and output layer."""

    case: Case
    sources: tuple[Tensor, ...]  # ((rows, V),) or ((rows, H), (V, H))
    targets: Tensor  # (rows,) int64, IGNORE_INDEX where ignored
    weights: Tensor  # (V,) float32
    upstream: float = 1.0  # gradient of the loss, which a contender may make use of

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def logits(self) -> Tensor:
        (logits,) = self.sources
        return logits


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    ranks = torch.arange(1, case.vocab_size + 1, dtype=torch.float64, device=device)
    frequencies = (1 / ranks) / (1 / ranks).sum()  # Zipf's law
    targets = torch.multinomial(frequencies, case.rows, replacement=True, generator=generator)
    weights = power_law_weights((frequencies * CORPUS_TOKENS).round(), alpha=0.4, eps=1.0)
    make = _hidden_and_head if case.linear else _logits
    sources = make(case, targets, generator)
    targets[_ignored(case, device)] = IGNORE_INDEX
    return Inputs(case, sources, targets, weights.to(device=device, dtype=torch.float32))


def _logits(case: Case, targets: Tensor, generator: torch.Generator) -> tuple[Tensor]:
    device = targets.device
    logits = torch.empty(case.rows, case.vocab_size, dtype=DTYPES[case.dtype], device=device)
    block_rows = max(1, BLOCK_ELEMENTS // case.vocab_size)
    for start in range(0, case.rows, block_rows):
        block = logits[start : start + block_rows]
        numbers = torch.randn(block.shape, generator=generator, device=device) * LOGIT_DEVIATION
        rows = torch.arange(start, start + block.shape[0], device=device)
        confident = rows % CONFIDENT_EVERY == 0
        numbers[confident, targets[rows[confident]]] = _confident_logit(case)
        block.copy_(numbers)
    return (logits,)


def _hidden_and_head(case: Case, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Their product is distributed like the logits of the other cases, confident rows included."""
    device = targets.device
    # A dot product of H normal numbers with entries of deviation d / sqrt(H) has deviation d.
    scale = LOGIT_DEVIATION / case.hidden_size**0.5
    head = torch.randn(case.vocab_size, case.hidden_size, generator=generator, device=device) * scale
    hidden = torch.randn(case.rows, case.hidden_size, generator=generator, device=device)
    confident = torch.arange(case.rows, device=device) % CONFIDENT_EVERY == 0
    rows = head[targets[confident]]
    hidden[confident] += rows * (_confident_logit(case) / LOGIT_DEVIATION**2)  # rows @ rows is about d**2
    return hidden.to(DTYPES[case.dtype]), head.to(DTYPES[case.dtype])


def _confident_logit(case: Case) -> float:
    # The log-sum-exp of V normal numbers of deviation d is about log(V) + d**2 / 2.
    return math.log(case.vocab_size) + LOGIT_DEVIATION**2 / 2 + CONFIDENT_MARGIN


def _ignored(case: Case, device: torch.device) -> Tensor:
    """(rows,) whether the row belongs to a prompt: the beginning of every sequence, so that neighbours share it."""
    length = min(case.rows, SEQUENCE_ROWS)
    return torch.arange(case.rows, device=device) % length < int(case.ignored * length)
