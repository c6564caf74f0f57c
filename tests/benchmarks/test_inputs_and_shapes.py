"""What the suite measures on."""

import pytest
import torch

from benchmarks import shapes
from benchmarks.inputs import IGNORE_INDEX, VOCABULARIES, Case, make_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 16, 600])
def test_inputs_are_like_a_trained_models(rows):
    inputs = make_inputs(Case(rows, 5000, "float32"), CPU)
    counted = inputs.targets != IGNORE_INDEX
    assert counted.sum() == inputs.case.counted >= 0.8 * rows
    p_y = inputs.logits.softmax(-1).gather(1, inputs.targets.clamp(min=0)[:, None])[:, 0]
    confident = torch.arange(rows) % 4 == 0
    assert (p_y[confident & counted] > 0.99).all()
    assert (p_y[~confident & counted] < 0.3).all()
    assert inputs.weights[0] < inputs.weights[-1], "frequent tokens weigh less"
    if rows > 1:
        assert (inputs.targets[counted] < 500).float().mean() > 0.5, "targets follow Zipf's law"


def test_default_shapes():
    for device in (CPU, torch.device("cuda")):
        for quick in (False, True):
            dtypes = shapes.default_dtypes(device, quick=quick)
            cases = shapes.default_cases(device, dtypes, quick=quick)
            assert len(set(cases)) == len(cases)
            assert quick or {case.vocab_size for case in cases} == set(VOCABULARIES)
    rows = {case.rows for case in shapes.default_cases(torch.device("cuda"), ["bfloat16"], quick=False)}
    assert min(rows) == 1
    assert max(rows) == 16384
