"""How wide the intervals are beside what they estimate: python -m benchmarks.quality.check_intervals (half a minute)

On the recorded texts: the held-out prompts are cut into random halves, and how differences in distinct pairs deviate
between two halves is held against what resamples of single halves claim, by `intervals.draw` and by a bootstrap of
groups. On made-up scores: how often intervals contain the truth. Writes benchmarks/results/quality/interval_check.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import environment
from benchmarks.quality.intervals import SHARE_OF_DEVIATION, combine, draw, estimate
from benchmarks.quality.metrics.corpus import mean
from benchmarks.quality.report.evidence import Reading, TaskEvidence, load_task
from benchmarks.quality.report.page import FOLDER, ROOT
from pdl_kernels.weights.files import replace_file

RESULT = ROOT / "benchmarks" / "results" / "quality" / "interval_check.json"
HALVES, CLAIMS, RESAMPLES, REPETITIONS = 150, 6, 150, 1500
CROSS_ENTROPY = Reading("cross-entropy")
DIFFERENCES = [
    (Reading("pdl-0.25"), CROSS_ENTROPY, "greedy"),
    (Reading("pdl-0.4"), Reading("cross-entropy", "adjusted-0.4"), "greedy"),
    (Reading("pdl-0.25"), CROSS_ENTROPY, "sampled"),
]


def main(
    tasks: tuple[str, ...] = ("dialogue", "style", "summarisation"), folder: Path = FOLDER, result: Path = RESULT
) -> None:
    evidences = [evidence for task in tasks if (evidence := load_task(folder, task, resamples=1)) is not None]
    asked = [(evidence, *difference) for evidence in evidences for difference in DIFFERENCES]
    found = {
        "device": environment.cpu_name(),
        "commit": environment.commit(),
        "differences in distinct pairs": [deviations(*one) for one in tqdm(asked, desc="halves")],
        "share of intervals that contain the truth": {
            "everything depends on three seeds": coverage(lambda r: np.repeat(r.normal(size=(3, 1)), 40, axis=1)),
            "100 prompts and chance vary ten times as much as three seeds": coverage(
                lambda r: r.normal(0, 0.1, (3, 1)) + r.normal(size=(1, 100)) + r.normal(size=(3, 100))
            ),
            "the same with 500 prompts": coverage(
                lambda r: r.normal(0, 0.1, (3, 1)) + r.normal(size=(1, 500)) + r.normal(size=(3, 500))
            ),
        },
    }
    replace_file(result, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


def deviations(evidence: TaskEvidence, a: Reading, b: Reading, mode: str) -> dict[str, object]:
    """The true standard deviation between halves, and the mean share of it that resamples of a half claim."""
    groups = np.array(evidence.document["held_out_groups"])
    number = groups.max() + 1
    random = np.random.default_rng(0)
    pairs = evidence.pairs // 2  # as many as a half has

    def change(of_groups: np.ndarray) -> np.ndarray:  # (R, groups) -> (R,)
        m = of_groups[:, groups]
        sets = ([evidence.text_set(one, mode, seed).types[2] for seed in evidence.seeds] for one in (a, b))
        ours, theirs = (np.mean([types.rarefied(pairs, m) for types in one], axis=0) for one in sets)
        return ours - theirs

    first = np.array([random.permutation(number) < number // 2 for _ in range(HALVES)]).astype(np.int64)
    between = change(first) - change(1 - first)
    true = np.nanstd(between) / np.sqrt(2)
    claimed: dict[str, list[float]] = {"jackknife": [], "bootstrap": []}
    for half in first[:CLAIMS]:
        kept = np.flatnonzero(half)
        jackknife, bootstrap = (np.zeros((RESAMPLES, number), dtype=np.int64) for _ in range(2))
        jackknife[:, kept] = draw(range(len(kept)), 1, RESAMPLES, seed=int(random.integers(1 << 30))).prompts[1:]
        bootstrap[:, kept] = random.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=RESAMPLES)
        claimed["jackknife"].append(float(np.nanstd(change(jackknife)) / SHARE_OF_DEVIATION))
        claimed["bootstrap"].append(float(np.nanstd(change(bootstrap))))
    shares = {method: round(float(np.mean(values) / true), 2) for method, values in claimed.items()}
    return {"task": evidence.name, "mode": mode, "difference": f"{a.title}, less {b.title}", **shares}


def coverage(make: Callable[[np.random.Generator], np.ndarray]) -> float:
    """The share of intervals around the mean of made-up scores (seeds, prompts) that contain 0."""
    inside = 0
    for repetition in tqdm(range(REPETITIONS), desc="made-up scores", leave=False):
        values = make(np.random.default_rng(repetition))
        resamples = draw(range(values.shape[1]), len(values), 200, seed=repetition)
        got = estimate(combine(np.array([mean(row, resamples.prompts) for row in values]), resamples))
        inside += got.low <= 0 <= got.high
    return round(inside / REPETITIONS, 3)


if __name__ == "__main__":
    main()
