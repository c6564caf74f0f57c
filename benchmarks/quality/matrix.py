"""The experiment, one trained model after the other. Every stage is kept, so that a killed program loses minutes."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import environment
from benchmarks.quality import records
from benchmarks.quality.arms import ARMS, MAIN_ARMS, NATURAL, Arm, Variant, variants_of
from benchmarks.quality.cache import Cache
from benchmarks.quality.decoding import Answer, decode
from benchmarks.quality.errors import UserError
from benchmarks.quality.intervals import cut_to_shorter
from benchmarks.quality.language_model import LanguageModel
from benchmarks.quality.metrics.per_text import rouge_l_of_others, score_texts
from benchmarks.quality.metrics.words import ngrams, words
from benchmarks.quality.prepare import Prepared, is_prepared, prepare
from benchmarks.quality.products import multiplied_by
from benchmarks.quality.scoring import BUCKETS, find_targets, score
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.pairs import Pair
from benchmarks.quality.training import draw_batches, train, validate

PACKAGES = ("torch", "transformers", "sacrebleu", "rouge-score")
FURTHER_RATES = 3  # at most, where the best learning rate is the largest or the smallest of those tried
SAMPLES = 3  # prompts shown side by side: the first of the held-out part, which is in random order
CUT_SCORES = ("rouge_l", "chrf", "rare_predicted", "rare_hits")  # also of texts cut to their reference's length
KEPT_SCORES = (
    "rouge_l",
    "rouge_l_others",
    "chrf",
    "rare_predicted",
    "rare_wanted",
    "rare_hits",
    "content",
    "content_found",
)


@dataclass(frozen=True)
class Run:
    task: str
    arm: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.task}, {self.arm}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Its place in the cache."""
        return f"{self.task}/{self.arm}-seed{self.seed}"


def plan(tasks: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The most telling runs first: the main arms with one seed in every task, then their other seeds, then the rest."""
    main = [arm for arm in arms if arm in MAIN_ARMS]
    others = [arm for arm in arms if arm not in MAIN_ARMS]
    phases = [(main, seeds[:1]), (main, seeds[1:]), (others, seeds[:1]), (others, seeds[1:])]
    return [
        Run(task, arm, seed if ARMS[arm].trained else 0)
        for chosen, some_seeds in phases
        for task in tasks
        for seed in some_seeds
        for arm in chosen
        if ARMS[arm].trained or seed == seeds[0]  # a model that is not trained is run once, whatever the seeds
    ]


class Experiment:
    """The model, and the task at hand, which stays in memory until another's turn."""

    def __init__(self, model: LanguageModel, settings: Settings, cache: Cache, folder: Path):
        self.model, self.settings, self.cache, self.folder = model, settings, cache, folder
        self.commit = environment.commit()  # of the code that runs, whatever is committed meanwhile
        self._prepared: Prepared | None = None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def prepared(self, task: str) -> Prepared:
        if self._prepared is None or self._prepared.task.name != task:
            self._prepared = None  # its memory is needed
            self._prepared = prepare(TASKS[task], self.model, self.settings, self.cache)
            path = records.task_path(self.folder, task)
            if path.exists():
                require_same(path, self.settings, self._prepared)
            else:
                records.write(path, self.describe(self._prepared))
        return self._prepared

    def describe(self, prepared: Prepared) -> dict[str, Any]:
        """What a reader of the records needs to know of a task; the texts themselves stay with their packages."""
        document = self.cache.load(f"{prepared.task.name}/pairs.json")
        counts = prepared.counts.counts
        held_out = prepared.pairs["held_out"]
        return {
            "task": prepared.task.name,
            "settings": self.settings.facts(),
            "environment": self.environment(),
            **document["made from"],
            "fitting_pairs": document["fitting"],
            "pairs": {part: len(pairs) for part, pairs in prepared.pairs.items()},
            "groups": {part: len({pair.group for pair in pairs}) for part, pairs in prepared.pairs.items()},
            "training_targets": int(counts.sum()),
            "types": int((counts > 0).sum()),
            "vocab_size": prepared.model.vocab_size,
            "mean_prompt_tokens": mean(len(one.prompt) for one in prepared.states["held_out"].encoded),
            "mean_reference_tokens": mean(len(one.targets) for one in prepared.states["held_out"].encoded),
            "held_out_digest": prepared.digest(),
            "common_words": sorted(prepared.common_words),
            "references": describe_references(held_out, prepared.common_words),
            "held_out_groups": numbered([pair.group for pair in held_out]),
            "samples": [{"prompt": list(pair.turns), "reference": pair.reference} for pair in held_out[:SAMPLES]],
            "seconds": self.cache.load(f"{prepared.task.name}/seconds.json"),
        }

    def environment(self) -> dict[str, Any]:
        device = self.model.device
        return {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "commit": self.commit,
            "device": environment.device_name(device),
            "threads": torch.get_num_threads(),
            "model": self.model.name,
            "compute_dtype": str(self.model.compute_dtype).removeprefix("torch."),
            "products": multiplied_by(device, self.model.compute_dtype),
            "packages": {package: environment.version(package) for package in PACKAGES},
        }

    def run(self, run: Run) -> None:
        """Train, measure, write, score; the record is written at the end, the parts are kept until then."""
        self.seconds = {}
        arm, prepared = ARMS[run.arm], self.prepared(run.task)
        weights = arm.table(prepared.counts)
        weights = None if weights is None else weights.to(self.model.device)
        partial = self.cache.load(f"{run.name}.json") or {"texts": {}, "seconds": {}}
        self.seconds = partial["seconds"]
        self.model.restore()  # an arm that is not trained is the model as it came, whatever ran before
        search = self.choose_learning_rate(run, arm, weights, prepared) if arm.trained else None
        losses = self.train(run, arm, weights, prepared, search["chosen"]) if search else []
        self.cache.save(f"{run.name}.json", partial)  # its seconds
        transforms = {
            variant.name: variant.transform(prepared.counts, weights).to(self.model.device)
            for variant in variants_of(arm)
        }
        with self.stage("scoring"):
            targets = find_targets(self.model, prepared.states["held_out"])
            prompts = len(prepared.pairs["held_out"])
            scores, tokens = score(self.model, targets, transforms, prepared.bucket_of, prompts)
        for variant in variants_of(arm):
            for mode in [mode for mode in ("greedy", "sampled") if getattr(variant, mode)]:
                key = f"{variant.name} {mode}"
                if key not in partial["texts"]:
                    partial["texts"][key] = self.write_texts(run, variant, mode, transforms[variant.name], prepared)
                    partial["seconds"] = self.seconds
                    self.cache.save(f"{run.name}.json", partial)
        document = {
            "task": run.task,
            "arm": run.arm,
            "seed": run.seed,
            "settings": self.settings.facts(),
            "environment": self.environment(),
            "held_out_digest": prepared.digest(),
            "learning_rate": search,
            "losses": [round(loss, 4) for loss in losses],
            "buckets": list(BUCKETS),
            "tokens": tokens.tolist(),
            "nll": {name: (one.nll * 1000).round().astype(int).tolist() for name, one in scores.items()},
            "correct": {name: one.correct.tolist() for name, one in scores.items()},
            "texts": partial["texts"],
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }
        records.write(records.record_path(self.folder, run.task, run.arm, run.seed), document)
        self.cache.remove(f"{run.name}.json")
        self.cache.remove(f"{run.name}.pt")

    def choose_learning_rate(self, run: Run, arm: Arm, weights: Tensor | None, prepared: Prepared) -> dict[str, Any]:
        """By the calibrated model's NLL in validation, after a short run with the first seed; once for all seeds."""
        name = f"{run.task}/{run.arm}-learning-rate"
        with self.cache.claim(name):
            found = self.cache.load(f"{name}.json") or self.recorded_learning_rate(run)
            if found is not None:
                return found
            states = prepared.states["training"]
            batches = draw_batches([len(one.inputs) for one in states.encoded], self.settings.batch_size, seed=0)
            batches = batches[: self.settings.search_steps]
            tried: dict[str, dict[str, float]] = {}
            with self.stage("learning rate"):
                rates = list(self.settings.learning_rates)
                while rates:
                    rate = rates.pop(0)
                    train(self.model, arm, weights, states, batches, rate, f"{run.label}: learning rate {rate:g}")
                    targets = find_targets(self.model, prepared.states["validation"])
                    tried[f"{rate:g}"] = asdict(validate(self.model, arm, weights, targets, prepared.counts))
                    if not rates and 1 < len(tried) < len(self.settings.learning_rates) + FURTHER_RATES:
                        rates = next_rates(tried)
            best = {by: best_rate(tried, by) for by in ("calibrated_nll", "own_loss")}
            found = {"tried": tried, "chosen": float(best["calibrated_nll"]), "by_own_loss": float(best["own_loss"])}
            self.cache.save(f"{name}.json", found)
            return found

    def recorded_learning_rate(self, run: Run) -> dict[str, Any] | None:
        """That of another seed's record, where the cache is gone."""
        for seed in range(self.settings.seeds):
            path = records.record_path(self.folder, run.task, run.arm, seed)
            if path.exists():
                return records.read(path)["learning_rate"]
        return None

    def train(
        self, run: Run, arm: Arm, weights: Tensor | None, prepared: Prepared, learning_rate: float
    ) -> list[float]:
        kept = self.cache.load(f"{run.name}.pt")
        if kept is not None:
            self.model.restore(kept["parameters"])
            return kept["losses"].tolist()
        states = prepared.states["training"]
        batches = draw_batches([len(one.inputs) for one in states.encoded], self.settings.batch_size, seed=run.seed)
        with self.stage("training"):
            losses = train(self.model, arm, weights, states, batches, learning_rate, f"{run.label}: training")
        self.cache.save(f"{run.name}.pt", {"parameters": self.model.snapshot(), "losses": torch.tensor(losses)})
        return losses

    def write_texts(self, run: Run, variant: Variant, mode: str, transform: Any, prepared: Prepared) -> dict[str, Any]:
        """Texts for the held-out prompts, with the scores that need references."""
        pairs = prepared.pairs["held_out"]
        label = run.label if variant.name == NATURAL else f"{run.label}, {variant.name}"
        uniforms = None
        if mode == "sampled":  # the same numbers for every arm
            generator = torch.Generator().manual_seed(run.seed)
            uniforms = torch.rand(len(pairs), prepared.task.new_tokens, generator=generator)
        with self.stage("writing"):
            upper = self.model.upper_for_decoding()
            answers = decode(
                self.model, upper, prepared.prompts, transform, prepared.task.new_tokens, uniforms, f"{label}: {mode}"
            )
        give_memory_back()
        with self.stage("text scores"):
            return self.scored(answers, prepared)

    def scored(self, answers: list[Answer], prepared: Prepared) -> dict[str, Any]:
        pairs = prepared.pairs["held_out"]
        texts = [self.model.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in answers]
        return {
            "texts": texts,
            "ended": [int(one.ended) for one in answers],
            "tokens": [len(one.tokens) for one in answers],
            "scores": scores_against_references(texts, pairs, prepared.common_words),
        }


def best_rate(tried: dict[str, dict[str, float]], by: str) -> str:
    """The learning rate with the smallest number; one that diverged is never the best."""
    finite = {rate: numbers[by] for rate, numbers in tried.items() if math.isfinite(numbers[by])}
    if not finite:
        raise UserError(f"every learning rate diverged ({', '.join(tried)}): there is nothing to compare")
    return min(finite, key=lambda rate: finite[rate])


def next_rates(tried: dict[str, dict[str, float]]) -> list[float]:
    """Three times more, or less, where the best so far is the largest, or the smallest; else none."""
    best, rates = float(best_rate(tried, "calibrated_nll")), [float(rate) for rate in tried]
    if best == max(rates):
        return [float(f"{best * 3:.1g}")]
    if best == min(rates):
        return [float(f"{best / 3:.1g}")]
    return []


def require_same(path: Path, settings: Settings, prepared: Prepared | None = None) -> None:
    """Refuse to add to records that were made in another way, or from other pairs."""
    document = records.read(path)
    made, facts = document["settings"], records.as_json(settings.facts())
    different = [
        f"{name} {made.get(name)} there, {value} here" for name, value in facts.items() if made.get(name) != value
    ]
    if prepared is not None and document["held_out_digest"] != prepared.digest():
        different.append(f"held-out pairs of {document['versions']} there")
    if different:
        raise UserError(f"{path} was made in another way ({'; '.join(different)}): give another folder with --out")


def scores_against_references(
    texts: list[str], pairs: Sequence[Pair], common_words: frozenset[str]
) -> dict[str, list[int]]:
    """The scores that need the data, which are not kept; those of texts alone are computed by whoever reads them."""
    references, sources = [pair.reference for pair in pairs], [pair.source for pair in pairs]
    whole = score_texts(texts, references, sources, common_words)
    whole["rouge_l_others"] = rouge_l_of_others(texts, references, [pair.group for pair in pairs])
    cut = score_texts(cut_to_shorter(texts, references)[0], references, sources, common_words)
    return records.compact(
        {name: whole[name] for name in KEPT_SCORES} | {f"cut_{name}": cut[name] for name in CUT_SCORES}
    )


def give_memory_back() -> None:
    """What malloc keeps of the caches of all layers grows to gigabytes; another process needs it."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # glibc has it


def describe_references(held_out: Sequence[Pair], common_words: frozenset[str]) -> dict[str, Any]:
    """The references scored as if they had been written, and what else the report needs of them."""
    references = [pair.reference for pair in held_out]
    return {
        "scores": scores_against_references(references, held_out, common_words),
        "words": [len(words(reference)) for reference in references],
        "word_pairs": texts_with(references),
    }


def texts_with(texts: Sequence[str]) -> list[int]:
    """In how many texts each pair of neighbouring words occurs: what measures of diversity need, without words."""
    counts = Counter(pair for text in texts for pair in set(ngrams(words(text), 2)))
    return sorted(counts.values(), reverse=True)


def numbered(groups: Sequence[object]) -> list[int]:
    """The same number for the same group, from 0 in the order of their first appearance."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


def mean(values: Iterator[int]) -> float:
    numbers = list(values)
    return round(sum(numbers) / len(numbers), 1)


def run_all(experiment: Experiment, runs: Sequence[Run]) -> None:
    """Every run that has no record yet and that no other process is at; two processes share the work."""
    for task in dict.fromkeys(run.task for run in runs):
        if (path := records.task_path(experiment.folder, task)).exists():
            require_same(path, experiment.settings)
    pending = [run for run in runs if not is_done(experiment.folder, run)]
    for task in dict.fromkeys(run.task for run in pending):
        if not is_prepared(TASKS[task], experiment.cache):  # each process takes another task first
            prepare(TASKS[task], experiment.model, experiment.settings, experiment.cache, wait=False)
    with tqdm(
        total=len(runs), initial=len(runs) - len(pending), desc="all", unit="run", dynamic_ncols=True
    ) as progress:
        for run in pending:
            with experiment.cache.claim(run.name, wait=False) as mine:
                if mine and not is_done(experiment.folder, run):
                    progress.set_postfix_str(run.label)
                    experiment.run(run)
            progress.update()


def is_done(folder: Path, run: Run) -> bool:
    return records.record_path(folder, run.task, run.arm, run.seed).exists()
