"""Texts from a model: greedy, or sampled with random numbers that all arms share.

transformers' `generate` has neither random numbers of one's own nor a prefix that many models share, so the loop is
here; the model's forward pass and its cache are transformers'. A tested property: greedy texts are those of `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.quality.encoding import Encoded, batches_of_similar_length
from benchmarks.quality.language_model import LanguageModel

try:
    from transformers.cache_utils import Cache, DynamicLayer
except ImportError:  # `language_model.load`, which comes first, says what to install
    Cache = DynamicLayer = object  # type: ignore[assignment, misc]

LIKELIEST = 512  # looked at first, since most nuclei are smaller and sorting everything takes three times as long
NUCLEUS = 0.9  # the share of the probability that sampling draws from (top-p)
PROMPT_TOKENS_AT_A_TIME = 32_768
SHRINK_AT = 0.75  # finished texts leave the batch when no more than this share is left


@dataclass(frozen=True)
class Transform:
    """What is done to logits before a token is chosen: (logits + bias) / temperature."""

    bias: Tensor | None = None  # (V,)
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:  # (N, V) -> (N, V) float32
        changed = logits.float() if self.bias is None else logits.float() + self.bias
        return changed if self.temperature == 1 else changed / self.temperature

    def to(self, device: torch.device) -> Transform:
        return Transform(None if self.bias is None else self.bias.to(device), self.temperature)


@dataclass(frozen=True)
class Answer:
    tokens: list[int]  # without EOS
    ended: bool  # by EOS, within the length allowed


class RoomyLayer(DynamicLayer):
    """A layer of the cache whose memory is there from the start: a step writes one column and copies nothing."""

    def __init__(self, keys: Tensor, values: Tensor, room: int):  # (B, heads, L, D), `room` more columns
        super().__init__()
        self.lazy_initialization(keys, values)
        batch, heads, self.length, size = keys.shape
        self.buffers = []
        for part in (keys, values):
            buffer = part.new_empty(batch, heads, self.length + room, size)
            buffer[:, :, : self.length] = part
            self.buffers.append(buffer)
        self._point()

    def _point(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self._point()
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        self.buffers = [buffer.index_select(0, rows) for buffer in self.buffers]
        self._point()


def roomy(layers: Sequence[DynamicLayer], room: int) -> Cache:
    return Cache(layers=[RoomyLayer(layer.keys, layer.values, room) for layer in layers])


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of similar length, padded on the left, after the frozen layers."""

    rows: list[int]
    inputs: Tensor  # (B, L, H) hidden states, or (B, L) ids
    mask: Tensor  # (B, L) int64, 0 where padded
    positions: Tensor  # (B, L) int64
    layers: list[DynamicLayer]  # the frozen layers' cache


@torch.inference_mode()
def prepare_prompts(model: LanguageModel, encoded: Sequence[Encoded]) -> list[PromptBatch]:
    """What all arms and decodings of one task share."""
    batches = []
    lengths = [len(one.prompt) for one in encoded]
    for rows in batches_of_similar_length(lengths, PROMPT_TOKENS_AT_A_TIME):
        length = max(lengths[row] for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, length - lengths[row] :] = torch.tensor(encoded[row].prompt)
            mask[place, length - lengths[row] :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = empty_cache(model.lower)
        options = {} if cache is None else {"attention_mask": mask, "position_ids": positions, "cache": cache}
        inputs = model.below(ids, **options)
        batches.append(PromptBatch(rows, inputs, mask, positions, [] if cache is None else list(cache.layers)))
    return batches


def empty_cache(part: nn.Module | None) -> Cache | None:
    return None if part is None else Cache(layers=[DynamicLayer() for _ in part.layers])


@torch.inference_mode()
def decode(
    model: LanguageModel,
    upper: nn.Module,  # of `model.upper_for_decoding()`
    prompts: Sequence[PromptBatch],
    transform: Transform,
    new_tokens: int,
    uniforms: Tensor | None,  # (prompts, new_tokens) in [0, 1), for sampling; None for greedy decoding
    description: str,
) -> list[Answer]:
    """One answer per prompt, in the prompts' order."""
    answers: dict[int, Answer] = {}
    total = sum(len(batch.rows) for batch in prompts)
    with tqdm(total=total, desc=description, unit="text", dynamic_ncols=True, leave=False) as progress:
        for batch in prompts:
            answers |= decode_batch(model, upper, batch, transform, new_tokens, uniforms, progress)
    return [answers[row] for row in range(total)]


def decode_batch(
    model: LanguageModel,
    upper: nn.Module,
    batch: PromptBatch,
    transform: Transform,
    new_tokens: int,
    uniforms: Tensor | None,
    progress: tqdm,
) -> dict[int, Answer]:
    eos = model.tokenizer.eos_token_id
    lower_cache = roomy(batch.layers, new_tokens)
    prompt_cache = empty_cache(upper)
    mask, positions = batch.mask, batch.positions
    states = model.above(batch.inputs, upper, attention_mask=mask, position_ids=positions, cache=prompt_cache)
    upper_cache = roomy(prompt_cache.layers, new_tokens)
    last, position = states[:, -1], positions[:, -1:]

    rows = torch.tensor(batch.rows)  # of the prompts that are still being answered
    written: dict[int, list[int]] = {row: [] for row in batch.rows}
    answers: dict[int, Answer] = {}
    for step in range(new_tokens):
        logits = transform(model.logits(last))
        chosen = logits.argmax(-1) if uniforms is None else draw(logits, uniforms[rows, step].to(logits.device))
        ended = (chosen == eos).tolist()
        for row, token, end in zip(rows.tolist(), chosen.tolist(), ended, strict=True):
            if row in answers:
                continue
            if end:
                answers[row] = Answer(written[row], ended=True)
                progress.update()
            else:
                written[row].append(token)
        if len(answers) == len(batch.rows) or step == new_tokens - 1:
            break
        going = torch.tensor([row not in answers for row in rows.tolist()])
        if going.sum() <= SHRINK_AT * len(going):
            keep = going.nonzero()[:, 0]
            rows, keep = rows[keep], keep.to(model.device)
            chosen, mask, position = chosen[keep], mask[keep], position[keep]
            for layer in (*lower_cache.layers, *upper_cache.layers):
                layer.select(keep)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        options = {"attention_mask": mask, "position_ids": position}
        lower_options = {} if model.lower is None else {**options, "cache": lower_cache}
        inputs = model.below(chosen[:, None], **lower_options)
        last = model.above(inputs, upper, **options, cache=upper_cache)[:, -1]
    for row in batch.rows:
        if row not in answers:
            answers[row] = Answer(written[row], ended=False)
            progress.update()
    return answers


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:  # (N, V) float32, (N,) -> (N,) int64
    """One token a row from the nucleus: the fewest of the likeliest tokens that have `NUCLEUS` of the probability.

    The tokens stand in the order of their probability, and the uniform number is looked up in their running sum, so
    two models that agree draw the same token from the same number.
    """
    normaliser = logits.logsumexp(-1, keepdim=True)
    values = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1).values  # in falling order
    chosen = pick(values, normaliser, uniforms)
    short = (values - normaliser).exp().sum(-1) < NUCLEUS
    if short.any():
        chosen[short] = pick(in_falling_order(logits[short]), normaliser[short], uniforms[short])
    return (logits == chosen).int().argmax(-1)  # the first of equals


def pick(values: Tensor, normaliser: Tensor, uniforms: Tensor) -> Tensor:  # (N, K) falling, (N, 1), (N,) -> (N, 1)
    """The logit of the token that is drawn."""
    probabilities = (values - normaliser).exp()
    sums = probabilities.cumsum(-1)
    kept = ((sums - probabilities) < NUCLEUS).sum(-1, keepdim=True)  # the token that crosses the share is one of them
    mass = sums.gather(1, kept - 1)
    place = torch.searchsorted(sums, uniforms[:, None] * mass, right=True)
    return values.gather(1, torch.minimum(place, kept - 1))  # rounding of the running sum may lead beyond


def in_falling_order(logits: Tensor) -> Tensor:  # (N, V) -> (N, V)
    """On a CPU numpy sorts in a tenth of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(-np.sort(-logits.numpy(), axis=-1))
    return logits.sort(dim=-1, descending=True).values
