"""The suite's quick cases for pytest-benchmark, for those who compare runs with it.

    pytest benchmarks/ --benchmark-json results.json
    pytest benchmarks/ --benchmark-compare

Plain `pytest` does not collect this file (see testpaths). Samples of one contender follow each other here, where
`python -m benchmarks` interleaves all of them.
"""

import functools

import pytest
import torch

from benchmarks import peers
from benchmarks.correctness import check
from benchmarks.inputs import Case, Inputs, make_inputs
from benchmarks.operations import OPERATIONS, Run, make_run
from benchmarks.shapes import default_cases, default_dtypes, misfit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = default_cases(DEVICE, default_dtypes(DEVICE, quick=True), quick=True)
ROUNDS = 7


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> Inputs:
    return make_inputs(case, DEVICE)


@functools.lru_cache(maxsize=1)
def checked_run(case: Case, name: str) -> tuple[Run, dict]:
    run = make_run(peers.CONTENDERS[name], inputs_of(case))
    return run, check(run, list(OPERATIONS.values()))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
@pytest.mark.parametrize("name", peers.CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed(benchmark, case, name, operation):
    contender = peers.CONTENDERS[name]
    if contender.linear != case.linear:
        pytest.skip("takes other inputs")
    reason = contender.problem(DEVICE) or misfit(case, DEVICE)
    if reason:
        pytest.skip(f"{name}: {reason}")
    run, verdicts = checked_run(case, name)
    assert verdicts[operation.name].problem is None, "a wrong one is not timed"

    def call(prepared):
        prepared()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case}, {operation.name}"
    benchmark.extra_info.update(rows=case.rows, vocab_size=case.vocab_size, dtype=case.dtype, contender=name)
    benchmark.pedantic(call, setup=lambda: ((run.prepare(operation),), {}), rounds=ROUNDS, warmup_rounds=1)
