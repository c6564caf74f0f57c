"""A task made ready: its split as ids, its counts, and what the frozen layers make of it. Each part is kept."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cache import Cache
from benchmarks.quality.decoding import PromptBatch, prepare_prompts
from benchmarks.quality.encoding import Encoded, States, encode_those_that_fit, run_below
from benchmarks.quality.errors import UserError
from benchmarks.quality.language_model import LanguageModel
from benchmarks.quality.metrics.per_text import common_words_of
from benchmarks.quality.scoring import assign_buckets
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import versions_of
from benchmarks.quality.tasks.pairs import Pair, Task
from benchmarks.quality.tasks.split import split
from pdl_kernels import TokenCounts

PARTS = ("training", "validation", "held_out")
SPLIT_SEED = 0


@dataclass
class Prepared:
    """Everything that the arms of one task share."""

    task: Task
    pairs: dict[str, list[Pair]]
    states: dict[str, States]
    counts: TokenCounts
    model: LanguageModel

    @cached_property
    def bucket_of(self) -> Tensor:  # (V,)
        return assign_buckets(self.counts.counts)

    @cached_property
    def prompts(self) -> list[PromptBatch]:
        return prepare_prompts(self.model, self.states["held_out"].encoded)

    @cached_property
    def common_words(self) -> frozenset[str]:
        return common_words_of([pair.reference for pair in self.pairs["training"]])

    def digest(self) -> str:
        """Of the held-out prompts and references, so that texts can be matched with them later."""
        return digest_of(self.pairs["held_out"])


def digest_of(pairs: list[Pair]) -> str:
    content = "\x1e".join(f"{pair.source}\x1f{pair.reference}" for pair in pairs)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def is_prepared(task: Task, cache: Cache) -> bool:
    return all(cache.path(f"{task.name}/{part}.pt").exists() for part in PARTS)


def prepare(task: Task, model: LanguageModel, settings: Settings, cache: Cache, wait: bool = True) -> Prepared | None:
    """None without waiting where another process is at it."""
    with cache.claim(f"{task.name}/prepare", wait) as mine:
        if not mine:
            return None
        start = time.perf_counter()
        made_before = is_prepared(task, cache)
        document = cache.load(f"{task.name}/pairs.json")
        if document is None:
            document = choose_pairs(task, model.tokenizer, settings)
            cache.save(f"{task.name}/pairs.json", document)
        elif document["made from"] != made_from(task):
            was = document["made from"]
            raise UserError(f"{cache.folder / task.name} was made from {was}; here are {made_from(task)}: delete it")
        pairs = {part: pairs_of(document[part]) for part in PARTS}
        states = {}
        for part in PARTS:
            encoded = [Encoded(*ids) for ids in document[part]["ids"]]
            states[part] = states_of(encoded, model, cache, task.name, part)
        if not made_before:
            cache.save(f"{task.name}/seconds.json", round(time.perf_counter() - start, 1))
    counts = TokenCounts(model.vocab_size)
    try:
        counts.update([one.targets for one in states["training"].encoded], shift=False)
    except IndexError as error:
        raise UserError(f"{cache.folder / task.name} was made with another vocabulary ({error}): delete it") from None
    return Prepared(task, pairs, states, counts, model)


def states_of(encoded: list[Encoded], model: LanguageModel, cache: Cache, task: str, part: str) -> States:
    """Those that are kept, if they are of these ids; else they are made."""
    name = f"{task}/{part}.pt"
    ids = hashlib.sha256(repr([(one.prompt, one.targets) for one in encoded]).encode()).hexdigest()
    kept = cache.load(name)
    if kept is not None and kept.get("ids") == ids:
        return States(kept["values"], kept["offsets"].tolist(), encoded)
    made = run_below(model, encoded, f"{task}: frozen layers, {part.replace('_', '-')}")
    cache.save(name, {"values": made.values, "offsets": torch.tensor(made.offsets), "ids": ids})
    return made


def pairs_of(part: dict[str, Any]) -> list[Pair]:
    return [Pair(tuple(turns), *rest) for turns, *rest in part["pairs"]]


def made_from(task: Task) -> dict[str, Any]:
    """What the pairs and their ids depend on, beside the settings."""
    limits = {"prompt tokens": task.prompt_tokens, "new tokens": task.new_tokens}
    return {"versions": versions_of(task.name), "instruction": task.instruction, **limits}


def choose_pairs(task: Task, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """The pairs that fit, split by group."""
    fitting = encode_those_that_fit(task.load(), task, tokenizer)
    ids_of = {id(pair): ids for pair, ids in fitting}
    parts = split(
        [pair for pair, _ in fitting],
        training=settings.training_pairs,
        validation=settings.validation_pairs,
        held_out=settings.held_out_pairs,
        seed=SPLIT_SEED,
    )
    document: dict[str, Any] = {"fitting": len(fitting), "made from": made_from(task)}
    for part in PARTS:
        chosen: list[Pair] = getattr(parts, part)
        document[part] = {
            "pairs": [(pair.turns, pair.reference, pair.group) for pair in chosen],
            "ids": [(ids_of[id(pair)].prompt, ids_of[id(pair)].targets) for pair in chosen],
        }
    return document
