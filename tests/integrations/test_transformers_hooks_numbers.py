"""The hooks on logits, `pdl_loss_function` and `pdl_compute_loss`: the numbers of torch's weighted cross entropy."""

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
    make_rows,
    next_labels,
    relative_error,
    sharp_model,
    transformers,
)
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
    reference,
)

from pdl_kernels.integrations.transformers import pdl_loss_function

each_causal = pytest.mark.parametrize("name", CAUSAL)
each_encoder_decoder = pytest.mark.parametrize("name", ENCODER_DECODER)


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
# The rows


def test_the_padding_is_no_target():
    """What the rows of these tests hold, so that they show what they are meant to."""
    batch = collate(make_rows())
    targets = next_labels(batch["labels"])
    assert not targets.eq(PADDING).any()
    assert len({int(row.ne(-100).sum()) for row in targets}) > 3
