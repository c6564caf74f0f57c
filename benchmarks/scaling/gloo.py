"""Holds the formulas against what processes really hand to torch.distributed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.environment import ROOT
from benchmarks.scaling.ranks import CHUNK_SIZE, COLUMNS, HIDDEN_SIZE, TOKENS
from benchmarks.scaling.schemes import Case, Cost, liger, loss_parallel, ours, ours_linear

GROUPS = (2, 4)
TIMEOUT = 120  # seconds


class Compared(NamedTuple):
    """One call on one rank: what was counted, and what the formula says."""

    what: str
    counted: list[tuple[str, int]]  # kind, bytes handed over
    expected: list[tuple[str, int]]

    @property
    def agrees(self) -> bool:
        return self.counted == self.expected


def check() -> int:
    """0 if all formulas agree; prints every comparison."""
    found = list(comparisons())
    for compared in found:
        verdict = "agrees" if compared.agrees else f"the formula says {compared.expected}"
        print(f"{compared.what}: {compared.counted or 'nothing'}: {verdict}")
    return 0 if all(compared.agrees for compared in found) else 1


def comparisons() -> Iterator[Compared]:
    """What the ranks of groups of gloo processes send, loss by loss."""
    for ranks, said in run_ranks(GROUPS).items():
        for rank, calls in enumerate(said):
            for call in calls:
                yield from _compared(call, rank, ranks)


def _compared(call: dict[str, Any], rank: int, ranks: int) -> Iterator[Compared]:
    features = call.get("features", {})
    what = ", ".join([f"rank {rank} of {ranks}", call["loss"], *(name for name, on in features.items() if on)])
    cost = _expected(call["loss"], ranks, features)
    yield Compared(
        f"{what}, forward", _pairs(call["forward"]), [(sent.kind, sent.payload) for sent in cost.collectives]
    )
    yield Compared(f"{what}, backward", _pairs(call["backward"]), [])
    if "moved" in call:
        moved = cost.moved // Case(TOKENS, COLUMNS * ranks, ranks).local_logits
        yield Compared(f"{what}, moved for each logit", [("bytes", call["moved"])], [("bytes", moved)])


def _expected(loss: str, ranks: int, features: dict[str, bool]) -> Cost:
    case = Case(TOKENS, COLUMNS * ranks, ranks, HIDDEN_SIZE)
    if loss == "pdl_cross_entropy":
        return ours(case, **features)
    if loss == "pdl_linear_cross_entropy":
        return ours_linear(case, chunk_size=CHUNK_SIZE, **features)
    return {"Liger-Kernel": liger, "torch loss_parallel": loss_parallel}[loss](case)


def _pairs(sent: list[list[Any]]) -> list[tuple[str, int]]:
    return [(kind, payload) for kind, payload in sent]


def run_ranks(groups: Sequence[int]) -> dict[int, list[list[dict[str, Any]]]]:
    """What each rank of each group says; RuntimeError with their words where one fails."""
    variables = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "benchmarks.scaling.ranks", name, *map(str, groups)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **variables}, text=True, timeout=TIMEOUT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"a rank failed:\n{done.stdout[-3000:]}")
        return {
            ranks: [json.loads((Path(name) / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
            for ranks in groups
        }
