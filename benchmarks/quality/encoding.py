"""Pairs as token ids, and what the frozen layers make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.errors import UserError
from benchmarks.quality.language_model import LanguageModel
from benchmarks.quality.tasks.pairs import Pair, Task

IGNORED = -100
PAIRS_AT_A_TIME = 1024
TOKENS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Encoded:
    """One pair as ids: the prompt in the model's chat template, and the reference with EOS, which is a target, too."""

    prompt: list[int]
    targets: list[int]

    @property
    def inputs(self) -> list[int]:
        """What the model reads: everything but the last target."""
        return self.prompt + self.targets[:-1]


def encode(pairs: Sequence[Pair], task: Task, tokenizer: Any) -> list[Encoded]:
    """References are tokenized by themselves: the template's prompt ends before them."""
    conversations = [pair.messages(task.instruction) for pair in pairs]
    try:
        prompts = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses the messages of {task.name}: {error}") from None
    references = tokenizer([pair.reference for pair in pairs], add_special_tokens=False)["input_ids"]
    return [
        Encoded(prompt, [*reference, tokenizer.eos_token_id])
        for prompt, reference in zip(prompts, references, strict=True)
    ]


def encode_those_that_fit(pairs: Sequence[Pair], task: Task, tokenizer: Any) -> list[tuple[Pair, Encoded]]:
    """Pairs within the task's limits, in their order, with their ids."""
    fitting: list[tuple[Pair, Encoded]] = []
    with tqdm(total=len(pairs), desc=f"{task.name}: tokenizing", unit="pair", dynamic_ncols=True, leave=False) as bar:
        for start in range(0, len(pairs), PAIRS_AT_A_TIME):
            some = pairs[start : start + PAIRS_AT_A_TIME]
            fitting += [
                (pair, ids)
                for pair, ids in zip(some, encode(some, task, tokenizer), strict=True)
                if len(ids.prompt) <= task.prompt_tokens and 1 < len(ids.targets) <= task.new_tokens
            ]
            bar.update(len(some))
    return fitting


@dataclass(frozen=True)
class States:
    """What the upper part takes, for many sequences of different lengths, one behind the other."""

    values: Tensor  # (T, H) hidden states, or (T,) ids where everything is trained
    offsets: list[int]  # sequence i is values[offsets[i]:offsets[i + 1]]
    encoded: list[Encoded]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs (B, L, ...) padded on the right, where causal attention never looks, and labels (B, L)."""
        length = max(self.offsets[row + 1] - self.offsets[row] for row in rows)
        inputs = self.values.new_zeros(len(rows), length, *self.values.shape[1:])
        labels = torch.full((len(rows), length), IGNORED)
        for place, row in enumerate(rows):
            start, end = self.offsets[row], self.offsets[row + 1]
            inputs[place, : end - start] = self.values[start:end]
            ids = self.encoded[row]
            first = len(ids.prompt) - 1  # the prompt's last token predicts the first target
            labels[place, first : first + len(ids.targets)] = torch.tensor(ids.targets)
        return inputs, labels

    def __len__(self) -> int:
        return len(self.encoded)


def batches_of_similar_length(lengths: Sequence[int], tokens: int = TOKENS_AT_A_TIME) -> Iterator[list[int]]:
    """Row numbers, shortest first, in groups of at most `tokens` padded tokens."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if group and (len(group) + 1) * lengths[row] > tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@torch.inference_mode()
def run_below(model: LanguageModel, encoded: list[Encoded], description: str) -> States:
    """Pass every sequence through the frozen layers once."""
    lengths = [len(ids.inputs) for ids in encoded]
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ids = torch.cat([torch.tensor(one.inputs) for one in encoded])
    if model.lower is None:
        return States(ids, offsets, encoded)
    values = torch.empty(offsets[-1], model.output_weight.shape[1], dtype=model.compute_dtype)
    with tqdm(total=len(ids), desc=description, unit="token", dynamic_ncols=True, leave=False) as progress:
        for rows in batches_of_similar_length(lengths):
            batch = torch.zeros(len(rows), max(lengths[row] for row in rows), dtype=torch.int64)
            for place, row in enumerate(rows):
                batch[place, : lengths[row]] = ids[offsets[row] : offsets[row + 1]]
            hidden = model.below(batch.to(model.device)).cpu()  # (B, L, H)
            for place, row in enumerate(rows):
                values[offsets[row] : offsets[row + 1]] = hidden[place, : lengths[row]]
            progress.update(sum(lengths[row] for row in rows))
    return States(values, offsets, encoded)
