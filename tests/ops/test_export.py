"""torch.export: dynamic batches, programs that are trained, decomposed, saved and loaded."""

import io

import pytest
import torch
from helpers.tracing import (
    OURS,
    QUIET,
    Model,
    all_losses,
    assert_close,
    make_inputs,
    operators_in,
    trained,
)

pytestmark = QUIET


MODEL_OPTIONS = {
    "torch": ("torch", {}),
    "logits": ("logits", {}),
    "logits, none": ("logits", {"reduction": "none"}),
    "logits, normalizer": ("logits", {"normalizer": 7, "inplace": True, "expected_upstream": 0.25}),
    "linear": ("linear", {}),
    "linear, none": ("linear", {"reduction": "none"}),
    "linear, row sampling": ("linear", {"row_sampling": 0.5, "seed": 3}),
    "linear, normalizer": ("linear", {"normalizer": 7, "expected_upstream": 0.25, "chunk_size": 3}),
}


@pytest.mark.parametrize(
    ("name", "strict"), [(name, False) for name in MODEL_OPTIONS] + [(loss, True) for loss in ("torch", *OURS)]
)
def test_export_with_a_dynamic_batch(name, strict):
    loss, options = MODEL_OPTIONS[name]
    model = Model(loss, **options)
    hidden, _, _, targets, *_ = make_inputs(3, 5, grad=False)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (hidden, targets), dynamic_shapes=(batch, batch), strict=strict)
    for rows in (3, 6):
        other, _, _, other_targets, *_ = make_inputs(rows, 5, grad=False, seed=rows)
        expected = trained(model, other, other_targets)
        assert_close(trained(program.module(), other, other_targets), expected)
    assert len(operators_in(program.graph_module)) == (loss != "torch")


@all_losses
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_without_grad_it_can_still_be_trained(loss, strict):
    model = Model(loss)
    hidden, _, _, targets, *_ = make_inputs(grad=False)
    with torch.no_grad():
        program = torch.export.export(model, (hidden, targets), strict=strict)
    assert_close(trained(program.module(), hidden, targets), trained(model, hidden, targets))


@all_losses
def test_an_exported_program_decomposed_saved_and_loaded(loss):
    model = Model(loss)
    hidden, _, _, targets, *_ = make_inputs(grad=False)
    program = torch.export.export(model, (hidden, targets)).run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other, _, _, other_targets, *_ = make_inputs(grad=False, seed=1)
    torch.testing.assert_close(loaded(other, other_targets), model(other, other_targets))
