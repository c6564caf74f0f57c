"""use_pdl_linear_loss with experts, encoder-decoders that shift labels themselves, and kinds that it refuses."""

from functools import partial

import pytest
import torch
from helpers.model_kinds import (
    granite,
    jetmoe,
    masked,
    mixtral,
    nllb,
    prophet,
    qwen,
    seeing_encoder,
    seeing_qwen,
    switch,
    translator,
    whisper,
)
from helpers.trainer_models import V, next_labels, sharp_model, take_gradients
from helpers.transformers_hooks import W, assert_same, inputs_of, reference

from pdl_kernels.integrations.transformers import use_pdl_linear_loss

pytestmark = pytest.mark.usefixtures("quick")
EAGER = {"backend": "eager"}  # pytest has the kernels interpreted, which takes long
ROUTED = {"output_router_logits": True}


@pytest.fixture
def batch(batch):
    """Without the ids that a seeing model takes for images."""
    return {name: torch.where(value >= V - 4, 7, value) for name, value in batch.items()}


def sharpened(model):
    """Its logits differ by some units."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def step(model, batch, **more):
    outputs = model(**batch, **more)
    outputs.loss.backward()
    return outputs.loss.item(), take_gradients(model)


def assert_as_stock(make, batch, shift, **more):
    """Without weights, loss and gradients are those of the model before; returns what the two agree on."""
    model = sharpened(make())
    expected = step(model, batch, **more)
    loss = use_pdl_linear_loss(model, None, **EAGER)
    assert loss.shift is shift
    assert_same(step(model, batch, **more), expected)
    return expected


# ---------------------------------------------------------------------------------------------------------------------
# Experts


EXPERTS = {"on the model": qwen, "in its config": jetmoe, "in text_config": seeing_qwen}
each_place = pytest.mark.parametrize("make", EXPERTS.values(), ids=EXPERTS)


@each_place
def test_the_coefficient_of_the_router_loss(make, batch):
    """Wherever the model has it. Without its share the loss would be another."""
    (with_it, _), (without, _) = (
        assert_as_stock(partial(make, coefficient), batch, True, **ROUTED) for coefficient in (0.5, 0.0)
    )
    assert with_it - without > 0.5


@each_place
def test_no_router_loss_unless_it_is_asked_for(make, batch):
    loss, _ = assert_as_stock(lambda: make(0.5), batch, True)
    targets = next_labels(batch["labels"])
    expected = reference(sharpened(make(0.5))(**inputs_of(batch)).logits, targets, weights=None)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_models_own_coefficient_wins_over_that_of_its_configuration(batch):
    """As in the stock model."""

    def make():
        model = qwen(0.5)
        model.config.router_aux_loss_coef = 9.0
        return model

    assert_as_stock(make, batch, True, **ROUTED)


LARGE = {
    "mixtral, coefficient 10": (lambda: mixtral(**ROUTED, router_aux_loss_coef=10.0), 1.0, 10.0),
    "mixtral, coefficient 50": (lambda: mixtral(**ROUTED, router_aux_loss_coef=50.0), 1.0, 50.0),
    "granite, scaled by 64": (lambda: granite(**ROUTED, router_aux_loss_coef=0.8, logits_scaling=64.0), 1 / 64, 0.8),
}


@pytest.mark.parametrize(("make", "scale", "coefficient"), LARGE.values(), ids=LARGE)
def test_a_router_loss_that_is_large_beside_the_models(make, scale, coefficient, batch):
    """It is not taken for a share of the cross entropy when the model is looked at."""
    assert_as_stock(make, batch, True)
    model = sharpened(make())
    outputs = model(**inputs_of(batch))
    total = reference(outputs.logits, next_labels(batch["labels"])) + coefficient * outputs.aux_loss
    total.backward()
    expected = total.item(), take_gradients(model)
    loss = use_pdl_linear_loss(model, W, **EAGER)
    assert loss.shift is True
    assert loss.transform.scale == pytest.approx(scale)
    assert_same(step(model, batch), expected)


def test_a_router_loss_without_a_coefficient(batch, monkeypatch):
    model = qwen(0.5)
    use_pdl_linear_loss(model, None, **EAGER)
    for owner in (model, model.config, type(model.config)):
        monkeypatch.delattr(owner, "router_aux_loss_coef")
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM has a router loss, and no router_aux_loss_coef"):
        model(**batch, **ROUTED)


@pytest.mark.parametrize("make", [switch, nllb], ids=["switch", "nllb"])
def test_encoder_decoders_with_losses_of_their_routers(make, batch):
    """They add several losses up, and are refused by name."""
    model = make()
    name = type(model).__name__
    loss = use_pdl_linear_loss(model, W, **EAGER)
    with pytest.raises(ValueError, match=f"{name} adds losses of its routers to its own; accepted is output_router"):
        model(**batch, **ROUTED)
    loss.undo()
    assert "forward" not in model.__dict__


def test_switch_without_losses_of_its_routers(batch):
    assert_as_stock(switch, batch, False)


def test_nllb_without_losses_of_its_routers(batch):
    """It keeps the capacity of its last evaluation."""
    assert_as_stock(nllb, batch, False)


# ---------------------------------------------------------------------------------------------------------------------
# Encoder-decoders, and models of masked tokens


TRANSLATORS = [
    "M2M100ForConditionalGeneration",  # these two have no prepare_decoder_input_ids_from_labels
    "BlenderbotForConditionalGeneration",
    "MBartForConditionalGeneration",
    "MarianMTModel",
]


@pytest.mark.parametrize("name", TRANSLATORS)
def test_decoder_inputs_are_made_of_the_labels(name, batch):
    """By the model's own function; at the wrong inputs the loss is another."""
    loss, _ = assert_as_stock(lambda: translator(name), batch, False)
    model = sharpened(translator(name))
    other = model(**batch, decoder_input_ids=batch["input_ids"]).loss.item()
    assert abs(other / loss - 1) > 1e-3


@pytest.mark.parametrize("name", TRANSLATORS)
def test_decoder_inputs_that_are_given(name, batch):
    given = {"decoder_input_ids": batch["input_ids"].flip(1)}
    assert_as_stock(lambda: translator(name), batch, False, **given)


@pytest.mark.parametrize("name", TRANSLATORS[:2])
def test_weights_of_an_encoder_decoder(name, batch):
    """Its own logits, at the decoder inputs that it makes."""
    model = sharpened(translator(name))
    total = reference(model(**batch).logits, batch["labels"])
    total.backward()
    expected = total.item(), take_gradients(model)
    use_pdl_linear_loss(model, W, **EAGER)
    assert_same(step(model, batch), expected)


@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_models_of_masked_tokens(name, batch):
    """Labels are targets already, which is found out."""
    assert_as_stock(lambda: masked(name), batch, False)
    model = sharpened(masked(name))
    total = reference(model(**inputs_of(batch)).logits, batch["labels"])
    total.backward()
    expected = total.item(), take_gradients(model)
    use_pdl_linear_loss(model, W, **EAGER)
    assert_same(step(model, batch), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


REFUSED = {
    whisper: "WhisperForConditionalGeneration does not run with two tokens and nothing else",
    seeing_encoder: "VisionEncoderDecoderModel does not run with two tokens and nothing else",
    prophet: "ProphetNetForConditionalGeneration predicts more than one token at each position",
}


@pytest.mark.parametrize(("make", "words"), REFUSED.items())
def test_kinds_that_are_refused(make, words):
    """By name, and left as they were."""
    model = make()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=words):
        use_pdl_linear_loss(model, None)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not hasattr(model, "pdl_linear_loss")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("weights", [W, None], ids=["weights", "none"])
def test_an_output_layer_with_an_empty_weight(weights):
    """As ZeRO-3 leaves one that it keeps elsewhere."""
    model = sharp_model("llama")
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="the output layer has an empty weight, as ZeRO-3 leaves one"):
        use_pdl_linear_loss(model, weights)
    assert "forward" not in model.__dict__
