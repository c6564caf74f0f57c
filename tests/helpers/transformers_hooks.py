"""What the tests of transformers' hooks compare with: torch's weighted cross entropy; and the two hooks on logits."""

import pytest
import torch
import torch.nn.functional as F

from helpers.trainer_models import (
    collate,
    make_rows,
    make_weights,
    next_labels,
    relative_error,
    take_gradients,
    transformers,
)
from pdl_kernels.integrations.transformers import pdl_compute_loss, pdl_loss_function

W = make_weights()


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def reference(logits, targets, weights=W, token_weights=None, count=None, z_loss=0.0, **options):
    """sum_i w(y_i) u_i ce_i / n, by torch's cross entropy."""
    logits, targets = logits.flatten(0, -2), targets.flatten()
    weights = None if weights is None else weights.to(logits.dtype)
    per_token = F.cross_entropy(logits, targets, weight=weights, reduction="none", **options)
    per_token = per_token + z_loss * torch.where(targets == -100, 0, logits.logsumexp(-1).square())
    if token_weights is not None:
        per_token = per_token * token_weights.flatten()
    return per_token.sum() / (targets.ne(-100).sum() if count is None else count)


def loss_and_gradients(model, loss):
    loss.backward()
    return loss.item(), take_gradients(model)


def expected_of(model, batch, shift=True, **options):
    """Loss and gradients of the reference."""
    targets = next_labels(batch["labels"]) if shift else batch["labels"]
    return loss_and_gradients(model, reference(model(**inputs_of(batch)).logits, targets, **options))


def assert_same(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert relative_error(found[1], expected[1]) < tolerance


def draw_token_weights(labels):
    """(B, L) numbers of both signs, among them zeros."""
    u = torch.randn(labels.shape, generator=torch.Generator().manual_seed(3))
    u[:, ::3] = 0
    return u


def collate_seq2seq(model):
    """A batch whose sources and targets have other lengths, as DataCollatorForSeq2Seq makes it."""

    class Tokenizer:
        padding_side = "right"

        def pad(self, features, **_):
            return inputs_of(collate([{**row, "labels": row["input_ids"]} for row in features]))

    rows = [{"input_ids": row["input_ids"], "labels": row["labels"][2:]} for row in make_rows()]
    made = transformers.DataCollatorForSeq2Seq(Tokenizer(), model=model)(rows)
    assert made["decoder_input_ids"].shape == made["labels"].shape
    return dict(made)


# ---------------------------------------------------------------------------------------------------------------------
# The hooks on logits


def by_loss_function(model, batch, weights=W, more=None, **options):
    model.loss_function = pdl_loss_function(weights, **options)
    return model(**batch, **more or {}).loss


def by_compute_loss(model, batch, weights=W, more=None, **options):
    return pdl_compute_loss(weights, **options)(model(**inputs_of(batch)), batch["labels"], **more or {})


both = pytest.mark.parametrize("route", [by_loss_function, by_compute_loss])
