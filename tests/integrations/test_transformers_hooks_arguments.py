"""The weights that `pdl_loss_function` and `pdl_compute_loss` take, and the options and batches that they refuse."""

import pytest
import torch
from helpers.trainer_models import V, collate, make_model, make_rows, make_weights, next_labels, take_gradients
from helpers.transformers_hooks import (
    W,
    assert_same,
    both,
    by_compute_loss,
    by_loss_function,
    collate_seq2seq,
    draw_token_weights,
    expected_of,
    inputs_of,
    loss_and_gradients,
)

from pdl_kernels.integrations.transformers import pdl_compute_loss, pdl_loss_function
from pdl_kernels.weights.saved import save_weights

# ---------------------------------------------------------------------------------------------------------------------
# Weights


@both
@pytest.mark.parametrize("place", ["file", "file as text", "checkpoint"])
def test_weights_from_a_file(route, place, model, batch, tmp_path):
    file = tmp_path / ("pdl_weights.safetensors" if place == "checkpoint" else "weights.safetensors")
    save_weights(file, W)
    where = {"file": file, "file as text": str(file), "checkpoint": tmp_path}[place]
    assert_same(loss_and_gradients(model, route(model, batch, where)), expected_of(model, batch))


def test_the_tensor_that_was_given_is_copied(model, batch):
    weights = W.clone()
    expected = expected_of(model, batch)
    model.loss_function = pdl_loss_function(weights)
    weights.zero_()  # before the first call, and between two
    assert_same(loss_and_gradients(model, model(**batch).loss), expected)
    assert_same(loss_and_gradients(model, model(**batch).loss), expected)
    model.loss_function = pdl_loss_function(weights.copy_(W))
    assert_same(loss_and_gradients(model, model(**batch).loss), expected)
    model.loss_function.set_weights(W.flip(0))
    assert torch.equal(weights, W)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_dtype(dtype, model, batch):
    expected = expected_of(model, batch, weights=W.to(dtype).float())
    assert_same(loss_and_gradients(model, by_loss_function(model, batch, W.to(dtype))), expected)


def test_weights_that_require_a_gradient_get_none(model, batch):
    weights = W.clone().requires_grad_()
    by_loss_function(model, batch, weights).backward()
    assert weights.grad is None


def test_weights_may_be_replaced(model, batch):
    loss = pdl_loss_function(W)
    model.loss_function = loss
    model(**batch).loss.backward()
    take_gradients(model)
    other = make_weights(1)
    loss.set_weights(other)
    assert_same(loss_and_gradients(model, model(**batch).loss), expected_of(model, batch, weights=other))
    with pytest.raises(ValueError, match=r"shape \(63,\) where there were 64"):
        loss.set_weights(other[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@both
@pytest.mark.parametrize("length", [V - 1, V + 1])
def test_weights_of_another_length(route, length, model, batch):
    with pytest.raises(ValueError, match=rf"weights have shape \({length},\); accepted is \({V},\)"):
        route(model, batch, torch.ones(length))


@pytest.mark.parametrize("make", [pdl_loss_function, pdl_compute_loss])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"label_smothing": 0.1}, TypeError, "label_smothing"),
        ({"chunk_size": 4}, TypeError, "chunk_size"),  # of the loss without logits
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing is 2.0"),
        ({"reduction": "sum"}, ValueError, "reduction is given"),
        ({"reduction": "mean"}, ValueError, "reduction is given"),
        ({"normalizer": 3.0}, ValueError, "normalizer is given"),
        ({"return_stats": True}, ValueError, "return_stats is given"),
    ],
)
def test_options_that_are_refused(make, options, error, words):
    with pytest.raises(error, match=words):
        make(W, **options)


@pytest.mark.parametrize("make", [pdl_loss_function, pdl_compute_loss])
@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (-W, ValueError),
        (W * torch.nan, ValueError),
        (torch.ones(V, dtype=torch.int64), (TypeError, ValueError)),
        (torch.ones(V, 1), ValueError),
        (W.tolist(), TypeError),
        ("no such file", FileNotFoundError),
    ],
    ids=["negative", "nan", "integers", "2-d", "list", "no file"],
)
def test_weights_that_are_refused(make, weights, error):
    with pytest.raises(error):
        make(weights)


def test_an_ignored_label_other_than_the_models(model, batch):
    model.loss_function = pdl_loss_function(W, ignore_index=-1)
    with pytest.raises(ValueError, match="ignore_index -100; accepted is -1"):
        model(**batch, ignore_index=-100)


@pytest.mark.parametrize("keep", [1, "mask"])
def test_logits_that_were_left_out(keep, model, batch):
    keep = next_labels(batch["labels"]).ne(-100) if keep == "mask" else keep
    model.loss_function = pdl_loss_function(W)
    with pytest.raises(ValueError, match="logits_to_keep, which leaves logits out, is for use_pdl_linear_loss"):
        model(**batch, logits_to_keep=keep)


@both
def test_labels_of_another_shape(route, model, batch):
    batch["labels"] = batch["labels"][:, 1:]
    with pytest.raises(ValueError, match="accepted are"):
        route(model, batch)


@pytest.mark.parametrize(("name", "said"), [("t5", False), ("llama", True)])
def test_the_outputs_are_of_another_kind(name, said):
    model = make_model(name)
    batch = collate_seq2seq(model) if name == "t5" else collate(make_rows())
    with pytest.raises(ValueError, match=f"encoder_decoder is {said}, and the outputs are of"):
        by_compute_loss(model, batch, encoder_decoder=said)


def test_labels_are_missing(model, batch):
    outputs = model(**inputs_of(batch))
    with pytest.raises(ValueError, match="labels are missing in the batch"):
        pdl_compute_loss(W)(outputs, None)
    with pytest.raises(ValueError, match="labels are missing; accepted are labels or shift_labels"):
        pdl_loss_function(W)(outputs.logits)


def test_token_weights_that_do_not_fit(model, batch):
    labels = batch["labels"]
    model.loss_function = pdl_loss_function(W)
    with pytest.raises(ValueError, match=r"token_weights have shape .*; accepted is .*, that of labels"):
        model(**batch, token_weights=torch.ones(labels.shape[0], labels.shape[1] + 1))
    with pytest.raises(ValueError, match="token_weights are given beside shift_labels"):
        model(**batch, shift_labels=next_labels(labels), token_weights=torch.ones(labels.shape))


def test_shifted_token_weights_need_shifted_labels(model, batch):
    """They are neither dropped nor taken for those of the labels."""
    model.loss_function = pdl_loss_function(W)
    with pytest.raises(ValueError, match="shift_token_weights"):
        model(**batch, shift_token_weights=draw_token_weights(batch["labels"]))


@both
def test_outputs_as_a_tuple(route, model, batch):
    expected = expected_of(model, batch)
    if route is by_loss_function:
        model.loss_function = pdl_loss_function(W)
        loss = model(**batch, return_dict=False)[0]
    else:
        loss = pdl_compute_loss(W)(model(**inputs_of(batch), return_dict=False), batch["labels"])
    assert_same(loss_and_gradients(model, loss), expected)
