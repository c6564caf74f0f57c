"""`model.loss_function = pdl_loss_function(...)` and `pdl_compute_loss`: the numbers of torch's weighted cross entropy.

Tiny models begin with logits near 0, where a forgotten softcap or weight hardly shows: their output layer is enlarged.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_compiler
from helpers.trainer_models import (
    CAUSAL,
    DECODER,
    ENCODER_DECODER,
    PADDING,
    V,
    collate,
    make_model,
    make_rows,
    make_weights,
    next_labels,
    relative_error,
    take_gradients,
    transformers,
)

from pdl_kernels.integrations.transformers import pdl_compute_loss, pdl_loss_function
from pdl_kernels.weights.saved import save_weights

W = make_weights()
each_causal = pytest.mark.parametrize("name", CAUSAL)
each_encoder_decoder = pytest.mark.parametrize("name", ENCODER_DECODER)


def sharp_model(name, **changes):
    """A model whose logits differ by some units."""
    model = make_model(name, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


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


def by_loss_function(model, batch, weights=W, more=None, **options):
    model.loss_function = pdl_loss_function(weights, **options)
    return model(**batch, **more or {}).loss


def by_compute_loss(model, batch, weights=W, more=None, **options):
    return pdl_compute_loss(weights, **options)(model(**inputs_of(batch)), batch["labels"], **more or {})


both = pytest.mark.parametrize("route", [by_loss_function, by_compute_loss])


@pytest.fixture
def batch():
    return collate(make_rows())


@pytest.fixture
def model():
    return sharp_model("llama")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@both
@each_causal
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_loss_and_gradients(route, name, dtype, tolerance, batch):
    model = sharp_model(name).to(dtype)
    expected = expected_of(model, batch)
    plain = expected_of(model, batch, weights=None)
    assert relative_error(plain[1], expected[1]) > 1e-2, "the weights would not show"
    assert_same(loss_and_gradients(model, route(model, batch)), expected, tolerance)


@both
@each_causal
def test_without_weights_it_is_the_stock_loss(route, name, batch):
    model = sharp_model(name)
    stock = loss_and_gradients(model, model(**batch).loss)
    assert_same(loss_and_gradients(model, route(model, batch, None)), stock)


@each_encoder_decoder
@pytest.mark.parametrize("encoder_decoder", [None, True], ids=["found out", "said"])
def test_an_encoder_decoder_does_not_shift(name, encoder_decoder, batch):
    model = sharp_model(name)
    seq2seq = collate_seq2seq(model)
    found = loss_and_gradients(model, by_compute_loss(model, seq2seq, encoder_decoder=encoder_decoder))
    assert_same(found, expected_of(model, seq2seq, shift=False))
    stock = loss_and_gradients(model, model(**seq2seq).loss)
    assert_same(loss_and_gradients(model, by_compute_loss(model, seq2seq, None)), stock)


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


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_loss_function_whose_labels_are_targets(name):
    model = sharp_model(name)
    batch = collate_seq2seq(model) if name == "t5" else collate(make_rows())
    targets = batch["labels"]
    logits = model(**inputs_of(batch)).logits
    found = pdl_loss_function(W, encoder_decoder=True)(logits, targets, V)
    assert found.item() == pytest.approx(reference(logits, targets).item(), rel=1e-6)


def test_shifted_labels_win(model, batch):
    targets = batch["labels"].roll(3, dims=1)  # which no shift of the labels is
    expected = loss_and_gradients(model, reference(model(**inputs_of(batch)).logits, targets))
    more = {"shift_labels": targets}
    assert_same(loss_and_gradients(model, by_loss_function(model, batch, more=more)), expected)


COUNTS = {
    "int": 17,
    "float": 17.0,
    "0-d float32": torch.tensor(17.0),
    "0-d int64": torch.tensor(17),
    "one per replica": torch.full((2, 1), 17.0),
    "one per replica, int64": torch.full((3, 1), 17),
}


@both
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_number_of_targets(route, count, model, batch):
    found = loss_and_gradients(model, route(model, batch, more={"num_items_in_batch": count}))
    assert_same(found, expected_of(model, batch, count=17))


@both
def test_a_batch_without_targets_has_a_gradient_of_zero(route, model, batch):
    batch["labels"].fill_(-100)
    loss, gradients = loss_and_gradients(model, route(model, batch))
    assert loss == 0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())


OPTIONS = {
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "both": {"label_smoothing": 0.2, "z_loss": 0.02},
}


@both
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(route, options, model, batch):
    expected = expected_of(model, batch, **options)
    assert relative_error(expected_of(model, batch)[1], expected[1]) > 1e-2, "the options would not show"
    assert_same(loss_and_gradients(model, route(model, batch, **options)), expected)


@both
def test_the_gradient_in_place_of_the_logits(route, model, batch):
    expected = expected_of(model, batch)
    assert_same(loss_and_gradients(model, route(model, batch, inplace=True)), expected)


@both
def test_another_ignored_label(route, model, batch):
    targets = next_labels(batch["labels"])
    expected = expected_of(model, batch)
    batch["labels"][batch["labels"] == -100] = 3
    targets = torch.where(targets == 3, -100, targets)
    expected = loss_and_gradients(model, reference(model(**inputs_of(batch)).logits, targets))
    assert_same(loss_and_gradients(model, route(model, batch, ignore_index=3)), expected)


@pytest.mark.parametrize("recorded", [False, True])
def test_experts_add_to_the_loss(recorded, batch):
    """A mixture of experts adds its own loss to ours, in place."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, **experts)).train()
    outputs = model(**inputs_of(batch))
    loss = reference(outputs.logits, next_labels(batch["labels"])) + 0.5 * outputs.aux_loss
    expected = loss_and_gradients(model, loss)
    model.loss_function = pdl_loss_function(W)
    if recorded:
        model.loss_function.keep_record()
    assert_same(loss_and_gradients(model, model(**batch).loss), expected)
    assert model.loss_function.backwards == int(recorded)


# ---------------------------------------------------------------------------------------------------------------------
# Token weights


def draw_token_weights(labels):
    """(B, L) numbers of both signs, among them zeros."""
    u = torch.randn(labels.shape, generator=torch.Generator().manual_seed(3))
    u[:, ::3] = 0
    return u


def test_token_weights_shift_with_their_labels(model, batch):
    model.double()
    u = draw_token_weights(batch["labels"])
    shifted = F.pad(u, (0, 1))[:, 1:]
    expected = expected_of(model, batch, token_weights=shifted)
    found = loss_and_gradients(model, by_loss_function(model, batch, more={"token_weights": u}))
    assert_same(found, expected, 1e-8)
    more = {"shift_labels": next_labels(batch["labels"]), "shift_token_weights": shifted}
    assert_same(loss_and_gradients(model, by_loss_function(model, batch, more=more)), expected, 1e-8)


def test_token_weights_do_not_change_the_denominator(model, batch):
    u = torch.zeros(batch["labels"].shape)
    u[:, -4:] = 1.0
    expected = expected_of(model, batch, token_weights=F.pad(u, (0, 1))[:, 1:])
    assert_same(loss_and_gradients(model, by_loss_function(model, batch, more={"token_weights": u})), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@both
@pytest.mark.parametrize("count", [None, 17])
def test_evaluation_is_plain_cross_entropy(route, count, model, batch):
    more = {} if count is None else {"num_items_in_batch": count}
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits
        expected = reference(logits, next_labels(batch["labels"]), None, count=count)
        options = {"label_smoothing": 0.1, "z_loss": 0.1}
        if route is by_loss_function:
            more["token_weights"] = draw_token_weights(batch["labels"])
        found = route(model, batch, more=more, **options)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@both
def test_weighted_evaluation(route, model, batch):
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    targets = next_labels(batch["labels"])
    with torch.no_grad():
        u = draw_token_weights(batch["labels"]) if route is by_loss_function else None
        shifted = None if u is None else F.pad(u, (0, 1))[:, 1:]
        if u is not None:
            options.pop("z_loss")  # which goes with |u|
        expected = reference(model(**inputs_of(batch)).logits, targets, token_weights=shifted, **options)
        more = None if u is None else {"token_weights": u}
        found = route(model, batch, more=more, weighted_evaluation=True, **options)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_in_inference_mode_comes_first(model, batch):
    """As Lightning begins: what was made there serves training, and new weights, too."""
    loss = model.loss_function = pdl_loss_function(W, weighted_evaluation=True)
    with torch.inference_mode():
        model(**batch)
    assert_same(loss_and_gradients(model, model(**batch).loss), expected_of(model, batch))
    loss.set_weights(W.flip(0))
    assert_same(loss_and_gradients(model, model(**batch).loss), expected_of(model, batch, weights=W.flip(0)))


def test_evaluation_leaves_the_logits(model, batch):
    model.loss_function = pdl_loss_function(W, inplace=True)
    with torch.no_grad():
        expected = model(**inputs_of(batch)).logits
        assert torch.equal(model(**batch).logits, expected)


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
# Dtypes


@both
def test_bfloat16_autocast(route, model, batch):
    targets = next_labels(batch["labels"])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs_of(batch)).logits
    assert logits.dtype == torch.bfloat16
    expected = loss_and_gradients(model, reference(logits.float(), targets))
    with torch.autocast("cpu", torch.bfloat16):
        loss = route(model, batch)
    assert loss.dtype == torch.float32
    assert_same(loss_and_gradients(model, loss), expected, 1e-3)


def test_a_bfloat16_model(batch):
    model = sharp_model("llama").bfloat16()
    expected = loss_and_gradients(
        model, reference(model(**inputs_of(batch)).logits.float(), next_labels(batch["labels"]))
    )
    assert_same(loss_and_gradients(model, by_loss_function(model, batch)), expected, 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@needs_compiler
@pytest.mark.trainers
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model(backend, batch):
    """It trains as without the compiler. The second step finds the table copied and compiles again, no later one."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    losses, graphs = {False: [], True: []}, []
    for compiled, found in losses.items():
        model = sharp_model("llama")
        loss_function = model.loss_function = pdl_loss_function(W)
        run = torch.compile(model, backend=backend) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for count, weights in ((17.0, W), (18.0, W), (19.0, W.flip(0))):
            loss_function.set_weights(weights)
            loss = run(**batch, num_items_in_batch=torch.tensor(count)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert graphs[-1] == graphs[-2] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


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


def test_the_padding_is_no_target():
    """What the rows of these tests hold, so that they show what they are meant to."""
    batch = collate(make_rows())
    targets = next_labels(batch["labels"])
    assert not targets.eq(PADDING).any()
    assert len({int(row.ne(-100).sum()) for row in targets}) > 3
