"""The records of a folder as series: every score of every way to get text, for the sample and for each resample.

A series is an array (1 + R,): its first element is the score itself, the others those of R resamples of prompts and
seeds (`benchmarks.quality.intervals`). Differences of series are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import records
from benchmarks.quality.arms import ARMS, CROSS_ENTROPY, MAIN_ARMS, NATURAL, variants_of
from benchmarks.quality.errors import UserError
from benchmarks.quality.intervals import Resamples, combine, draw
from benchmarks.quality.metrics.corpus import (
    Types,
    f1,
    mean,
    mean_of_finite,
    missed_by_draws,
    precision,
    ratio_of_sums,
    recall,
)
from benchmarks.quality.metrics.per_text import score_alone
from benchmarks.quality.metrics.words import words
from benchmarks.quality.scoring import BUCKETS
from benchmarks.quality.tasks import TASKS

RESAMPLES = 500
PAIRS_STEP = 100  # the number of word pairs that diversity is measured on is a multiple of this
PAIRS_SHARE = 0.7  # of those that the shortest set of texts has; resamples have about four fifths of them


@dataclass(frozen=True)
class Reading:
    """A trained model and a way to read its logits."""

    arm: str
    variant: str = NATURAL

    @property
    def title(self) -> str:
        return next(one.title for one in variants_of(ARMS[self.arm]) if one.name == self.variant)


def readings(arms: Sequence[str]) -> list[Reading]:
    return [Reading(arm, variant.name) for arm in arms for variant in variants_of(ARMS[arm])]


class TextSet:
    """The texts of one model in one mode, with everything that is computed from them, once."""

    def __init__(self, kept: dict[str, Any], references: dict[str, Any]):
        self.texts: list[str] = kept["texts"]
        self.kept = records.expanded(kept["scores"])
        self.wanted = np.array(references["scores"]["rare_wanted"])
        self.ended = np.array(kept["ended"], dtype=float)

    @cached_property
    def alone(self) -> dict[str, np.ndarray]:
        return score_alone(self.texts)

    @cached_property
    def words(self) -> list[list[str]]:
        return [words(text) for text in self.texts]

    @cached_property
    def types(self) -> dict[int, Types]:
        return {n: Types(self.words, n) for n in (1, 2, 3)}

    def word_pairs(self) -> int:
        return sum(max(0, len(text) - 1) for text in self.words)

    def scores(self, m: np.ndarray, pairs: int, vocabulary: int) -> dict[str, np.ndarray]:
        """Every measure, (R,) each. `vocabulary` is the number of word types that could have been drawn."""
        kept, alone = self.kept, self.alone
        return {
            "own_rouge_l": mean(kept["rouge_l"] - kept["rouge_l_others"], m),
            "rouge_l": mean(kept["rouge_l"], m),
            "chrf": mean(kept["chrf"], m),
            "cut_chrf": mean(kept["cut_chrf"], m),
            "cut_rouge_l": mean(kept["cut_rouge_l"], m),
            "rare_precision": precision(kept["rare_hits"], kept["rare_predicted"], m),
            "rare_recall": recall(kept["rare_hits"], self.wanted, m),
            "rare_f1": f1(kept["rare_hits"], kept["rare_predicted"], self.wanted, m),
            "cut_rare_f1": f1(kept["cut_rare_hits"], kept["cut_rare_predicted"], self.wanted, m),
            "distinct_1": self.types[1].distinct(m),
            "distinct_2": self.types[2].distinct(m),
            "distinct_3": self.types[3].distinct(m),
            "diversity": self.types[2].rarefied(pairs, m),
            "expectation_adjusted": self.types[1].expectation_adjusted(vocabulary, m),
            "unique_words": self.types[1].unique(m),
            "zipf_slope": self.types[1].zipf_slope(m, ranks=100),
            "self_bleu": mean_of_finite(alone["self_bleu"], m),
            "repetition": mean(alone["repetition"], m),
            "words": mean(alone["words"].astype(float), m),
            "ended": mean(self.ended, m),
            "in_source": ratio_of_sums(kept["content_found"], kept["content"], m),
        }


@dataclass
class TaskEvidence:
    """One task: its description, its records by arm and seed, and the series made from them."""

    document: dict[str, Any]
    runs: dict[tuple[str, int], dict[str, Any]]
    seeds: list[int]
    resamples: Resamples
    pairs: int = 0  # word pairs that diversity is measured on
    _scores: dict[tuple[Reading, str], dict[str, np.ndarray]] = field(default_factory=dict)
    _texts: dict[tuple[Reading, str, int], TextSet] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.document["task"]

    @property
    def faithful(self) -> bool:
        return TASKS[self.name].faithful

    @property
    def arms(self) -> list[str]:
        return [arm for arm in ARMS if any(arm == found for found, _ in self.runs)]

    def seeds_of(self, arm: str) -> list[int]:
        """All seeds; the untouched model has one, which stands for each."""
        if ARMS[arm].trained:
            return self.seeds
        (only,) = [seed for found, seed in self.runs if found == arm]
        return [only] * len(self.seeds)

    def has_texts(self, reading: Reading, mode: str) -> bool:
        return f"{reading.variant} {mode}" in self.runs[reading.arm, self.seeds_of(reading.arm)[0]]["texts"]

    def nll(self, reading: Reading, bucket: str | None = None) -> np.ndarray:
        """The unweighted NLL of the references' tokens, in nats a token."""
        return self._by_bucket("nll", reading, bucket) / 1000

    def accuracy(self, reading: Reading, bucket: str | None = None) -> np.ndarray:
        return self._by_bucket("correct", reading, bucket)

    def _by_bucket(self, what: str, reading: Reading, bucket: str | None) -> np.ndarray:
        columns = slice(None) if bucket is None else [BUCKETS.index(bucket)]
        values = []
        for seed in self.seeds_of(reading.arm):
            run = self.runs[reading.arm, seed]
            sums = np.array(run[what][reading.variant], dtype=float)[:, columns].sum(1)
            tokens = np.array(run["tokens"])[:, columns].sum(1)
            values.append(ratio_of_sums(sums, tokens, self.resamples.prompts))
        return combine(np.stack(values), self.resamples)

    def series(self, reading: Reading, mode: str, measure: str) -> np.ndarray:
        return self.scores(reading, mode)[measure]

    def scores(self, reading: Reading, mode: str) -> dict[str, np.ndarray]:
        """Every measure of the texts of one mode, "greedy" or "sampled"."""
        key = (reading, mode)
        if key not in self._scores:
            by_seed: list[dict[str, np.ndarray]] = []
            for place, seed in enumerate(self.seeds_of(reading.arm)):
                if place and not ARMS[reading.arm].trained:
                    by_seed.append(by_seed[0])
                    continue
                texts = self.text_set(reading, mode, seed)
                by_seed.append(texts.scores(self.resamples.prompts, self.pairs, self.document["vocab_size"]))
            self._scores[key] = {
                measure: combine(np.stack([scores[measure] for scores in by_seed]), self.resamples)
                for measure in by_seed[0]
            }
        return self._scores[key]

    def of_references(self) -> dict[str, float]:
        """What the references themselves are like."""
        kept = self.document["references"]
        scores = {name: np.array(values) for name, values in kept["scores"].items()}
        lengths = np.array(kept["words"])
        return {
            "diversity": rarefied(np.array(kept["word_pairs"]), np.maximum(lengths - 1, 0), self.pairs),
            "words": float(np.mean(lengths)),
            "in_source": float(scores["content_found"].sum() / scores["content"].sum()),
        }

    def text_set(self, reading: Reading, mode: str, seed: int) -> TextSet:
        key = (reading, mode, seed)
        if key not in self._texts:
            kept = self.runs[reading.arm, seed]["texts"][f"{reading.variant} {mode}"]
            self._texts[key] = TextSet(kept, self.document["references"])
        return self._texts[key]


def rarefied(texts_with: np.ndarray, ngrams: np.ndarray, size: int) -> float:
    """`Types.rarefied` of texts that are not at hand: in how many each type is (types,), and their n-grams (texts,)."""
    texts = np.array([len(ngrams)])
    missed = missed_by_draws(texts, size * texts / ngrams.sum())[:, 0]
    return float((1 - missed[texts_with]).sum() / size)


def load_task(folder: Path, task: str, resamples: int = RESAMPLES) -> TaskEvidence | None:
    """A task's records; None where there is nothing to compare with yet.

    Seeds that one of the main arms lacks are left out, and so is another arm until it has all of the others.
    """
    path = records.task_path(folder, task)
    if not path.exists():
        return None
    document = records.read(path)
    runs = {}
    for arm in ARMS:
        for seed in range(document["settings"]["seeds"]):
            file = records.record_path(folder, task, arm, seed)
            if file.exists():
                runs[arm, seed] = read_run(file, document)
    main = {arm for arm, _ in runs if ARMS[arm].trained and arm in MAIN_ARMS}
    seeds = [seed for seed in range(document["settings"]["seeds"]) if all((arm, seed) in runs for arm in main)]
    if CROSS_ENTROPY.name not in main or not seeds:
        return None
    whole = {arm for arm in ARMS if not ARMS[arm].trained or all((arm, seed) in runs for seed in seeds)}
    runs = {key: run for key, run in runs.items() if key[0] in whole}
    evidence = TaskEvidence(document, runs, seeds, draw(document["held_out_groups"], len(seeds), resamples))
    fewest = min(
        evidence.text_set(reading, mode, seed).word_pairs()
        for reading in readings(evidence.arms)
        for mode in ("greedy", "sampled")
        if evidence.has_texts(reading, mode)
        for seed in set(evidence.seeds_of(reading.arm))
    )
    share = int(PAIRS_SHARE * fewest)
    evidence.pairs = share // PAIRS_STEP * PAIRS_STEP or share
    return evidence


def read_run(path: Path, task: dict[str, Any]) -> dict[str, Any]:
    run = records.read(path)
    if run["settings"] != task["settings"] or run["held_out_digest"] != task["held_out_digest"]:
        raise UserError(f"{path} was made with other settings or pairs than {task['task']}/task.json.xz says")
    return run
