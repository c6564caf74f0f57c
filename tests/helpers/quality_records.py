"""Records of a made-up experiment: what `benchmarks.quality.report` reads, without any model."""

import random
from dataclasses import asdict

from benchmarks.quality import records
from benchmarks.quality.arms import ARMS, variants_of
from benchmarks.quality.matrix import texts_with
from benchmarks.quality.metrics.words import words
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import OFFLINE

SETTINGS = Settings(held_out_pairs=60)
VOCABULARY = [f"word{number}" for number in range(400)]
ENVIRONMENT = {
    "date": "2026-11-29T00:00:00",
    "commit": "0123456789",
    "device": "a made-up processor",
    "threads": 1,
    "model": "a made-up model",
    "compute_dtype": "float32",
    "packages": {"torch": "0"},
}


def made_up_text(generator, spread):
    """Six to fourteen words; `spread` of 0 to 1 is how far into the vocabulary they reach."""
    reach = max(8, int(spread * len(VOCABULARY)))
    return " ".join(VOCABULARY[int(reach * generator.random() ** 2)] for _ in range(generator.randint(6, 14)))


def scores_of(texts, references):
    """Shares of common word types stand for every score against a reference."""
    found = []
    for text, reference in zip(texts, references, strict=True):
        a, b = set(words(text)), set(words(reference))
        found.append((len(a), len(b), len(a & b)))
    hits = [one[2] for one in found]
    rouge = [1000 * one[2] // max(1, one[0]) for one in found]
    predicted = [one[0] for one in found]
    return {
        "rouge_l": rouge,
        "rouge_l_others": [value // 3 for value in rouge],
        "chrf": [100 * value for value in rouge],
        "rare_predicted": predicted,
        "rare_wanted": [one[1] for one in found],
        "rare_hits": hits,
        "content": predicted,
        "content_found": hits,
        "cut_rouge_l": rouge,
        "cut_chrf": [100 * value for value in rouge],
        "cut_rare_predicted": predicted,
        "cut_rare_hits": hits,
    }


def write_records(folder, tasks=OFFLINE, arms=tuple(ARMS), seeds=(0, 1, 2)):
    """A record of every arm and seed; arms differ in how far into the vocabulary their texts reach."""
    settings = records.as_json(SETTINGS.facts())
    for task in tasks:
        generator = random.Random(task)
        references = [made_up_text(generator, 0.8) for _ in range(SETTINGS.held_out_pairs)]
        records.write(
            records.task_path(folder, task),
            {
                "task": task,
                "settings": settings,
                "environment": ENVIRONMENT,
                "versions": {"a package": "1"},
                "instruction": "answer",
                "fitting_pairs": 1000,
                "pairs": {"training": 100, "validation": 60, "held_out": 60},
                "groups": {"training": 50, "validation": 30, "held_out": 30},
                "training_targets": 1000,
                "types": 300,
                "vocab_size": 1000,
                "mean_prompt_tokens": 10.0,
                "mean_reference_tokens": 10.0,
                "held_out_digest": task,
                "common_words": [],
                "references": {
                    "scores": scores_of(references, references),
                    "words": [len(words(text)) for text in references],
                    "word_pairs": texts_with(references),
                },
                "held_out_groups": [place // 2 for place in range(SETTINGS.held_out_pairs)],
                "samples": [{"prompt": ["hello *there*"], "reference": text} for text in references[:3]],
                "seconds": 1.0,
            },
        )
        for place, arm in enumerate(ARMS[name] for name in arms):
            for seed in seeds if arm.trained else seeds[:1]:
                records.write(
                    records.record_path(folder, task, arm.name, seed),
                    run_record(generator, task, arm, seed, references, 0.3 + 0.08 * place),
                )


def run_record(generator, task, arm, seed, references, spread):
    variants = variants_of(arm)
    texts = {}
    for step, variant in enumerate(variants):
        for mode in [mode for mode in ("greedy", "sampled") if getattr(variant, mode)]:
            written = [made_up_text(generator, min(1.0, spread + 0.1 * step)) for _ in references]
            texts[f"{variant.name} {mode}"] = {
                "texts": written,
                "ended": [1] * len(written),
                "tokens": [len(text) for text in written],
                "scores": scores_of(written, references),
            }
    tokens = [[generator.randint(3, 9) for _ in range(3)] for _ in references]
    nll = {
        variant.name: [
            [int(1000 * n * (2 + bucket + generator.random())) for bucket, n in enumerate(row)] for row in tokens
        ]
        for variant in variants
    }
    return {
        "task": task,
        "arm": arm.name,
        "seed": seed,
        "settings": records.as_json(asdict(SETTINGS)),
        "environment": ENVIRONMENT,
        "held_out_digest": task,
        "learning_rate": {
            "tried": {rate: {} for rate in ("0.0005", "0.001", "0.002")},
            "chosen": 0.001,
            "by_own_loss": 0.002,
        }
        if arm.trained
        else None,
        "losses": [3.0, 2.0],
        "buckets": ["frequent", "medium", "rare"],
        "tokens": tokens,
        "nll": nll,
        "correct": {name: [[n // 2 for n in row] for row in tokens] for name in nll},
        "texts": texts,
        "seconds": {"training": 1.0, "writing": 2.0},
    }
