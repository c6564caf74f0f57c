"""`use_pdl_linear_loss`: the loss and the gradients of a model with logits, and no logits."""

import pytest
import torch
from helpers.traffic_counters import Allocations
from helpers.trainer_models import (
    DECODER,
    ENCODER_DECODER,
    SIZES,
    V,
    relative_error,
    sharp_model,
    take_gradients,
    transformers,
)
from helpers.transformers_hooks import W, assert_same, reference
from helpers.transformers_linear import TRANSFORMS, each_model, expected_of, patched, step, targets_of

from pdl_kernels.integrations.transformers import pdl_loss_function, use_pdl_linear_loss

# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@each_model
def test_loss_and_gradients(name, batch):
    expected = expected_of(name, batch)
    assert relative_error(expected_of(name, batch, weights=None)[1], expected[1]) > 1e-2, "the weights would not show"
    changes = {"output_router_logits": False} if name == "mixtral" else {}
    assert_same(step(patched(name, changes=changes), batch), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "t5", "bart", "phi"])
def test_loss_and_gradients_in_float64(name, batch):
    model = sharp_model(name).double()
    loss = reference(model(**batch).logits, targets_of(name, batch["labels"]))
    loss.backward()
    expected = loss.item(), take_gradients(model)
    assert_same(step(patched(name).double(), batch), expected, 1e-10)


@each_model
def test_without_weights_it_is_the_stock_loss(name, batch):
    """With what a mixture of experts adds to it."""
    model = sharp_model(name)
    stock = model(**batch)
    stock.loss.backward()
    expected = stock.loss.item(), take_gradients(model)
    model = patched(name, None)
    assert_same(step(model, batch), expected)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(expected[0], rel=1e-6)


def test_the_experts_aux_loss(batch):
    """By the configuration or by the call; it is there to be read, too."""
    model = sharp_model("mixtral")
    stock = model(**batch)
    assert stock.aux_loss > 0.1
    found = patched("mixtral", None)(**batch)
    assert found.aux_loss.item() == pytest.approx(stock.aux_loss.item())
    without = patched("mixtral", None)(**batch, output_router_logits=False)
    assert without.aux_loss is None
    assert found.loss.item() == pytest.approx(without.loss.item() + 0.5 * stock.aux_loss.item(), rel=1e-6)


@each_model
def test_what_is_done_to_the_logits_is_found_out(name):
    model = sharp_model(name)
    assert tuple(use_pdl_linear_loss(model, W).transform) == TRANSFORMS.get(name, (1.0, None, False))


BERT = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS_ARE_TARGETS = {
    "masked": ("BertForMaskedLM", "BertConfig", BERT | NO_DROPOUT),
    "BART's decoder alone": ("BartForCausalLM", "BartConfig", ENCODER_DECODER["bart"][2]),
}


@pytest.mark.parametrize("kind", LABELS_ARE_TARGETS)
def test_models_that_do_not_shift_their_labels(kind, batch):
    """Though they are no encoder-decoders: they train with the loss they had, or are refused."""
    made, config, options = LABELS_ARE_TARGETS[kind]
    model = getattr(transformers, made)(getattr(transformers, config)(**options)).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    stock = model(**batch).loss
    stock.backward()
    expected = stock.item(), take_gradients(model)
    refused = ""
    try:
        use_pdl_linear_loss(model, None)
    except ValueError as error:
        refused = str(error)
    if made not in refused:
        assert_same(step(model, batch), expected)


ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
SEEING = {
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": DECODER | {"rope_parameters": ROPE}, "vision_config": VISION},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": DECODER,
            "vision_config": SIZES | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
}


@pytest.mark.parametrize("name", SEEING)
def test_models_that_see(name, batch):
    """Their configuration of the text is one of several; here they read."""
    made, config, options = SEEING[name]
    torch.manual_seed(0)
    model = getattr(transformers, made)(getattr(transformers, config)(**options)).train()
    if name == "gemma3":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    expected = expected_of(name, batch, model)
    use_pdl_linear_loss(model, W)
    assert_same(step(model, batch), expected)


def test_a_scale_other_than_one_and_a_softcap(batch):
    """No configuration here has both."""
    changes = {"final_logit_softcapping": 3.0, "logit_scale": 0.5}
    model = sharp_model("cohere", **changes)
    found = use_pdl_linear_loss(model, W)
    assert tuple(found.transform) == (0.5, None, False), "a softcap that the model does not apply is not applied"
    assert_same(step(model, batch), expected_of("cohere", batch, sharp_model("cohere", **changes)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_final_logits_bias(when, batch):
    """BART adds a buffer, whose numbers of the time of the call count."""
    expected_model = sharp_model("bart")
    expected_model.final_logits_bias.copy_(torch.linspace(3, -3, V))
    expected = expected_of("bart", batch, expected_model)
    model = sharp_model("bart")
    if when == "before":
        model.final_logits_bias.copy_(torch.linspace(3, -3, V))
    use_pdl_linear_loss(model, W)
    model.final_logits_bias.copy_(torch.linspace(3, -3, V))
    assert_same(step(model, batch), expected)


def test_the_gradient_of_a_bias(batch):
    model = patched("phi")
    model(**batch).loss.backward()
    assert model.lm_head.bias.grad.abs().max() > 1e-3


def test_a_frozen_output_layer(batch):
    model = patched("llama")
    model.lm_head.requires_grad_(False)
    expected = expected_of("llama", batch)
    loss, gradients = step(model, batch)
    expected[1].pop("lm_head.weight")
    assert_same((loss, gradients), expected)


CHANGE_NUMBERS = {"label_smoothing": 0.2, "z_loss": 0.02}
CHANGE_NONE = {"chunk_size": 4, "compact": False, "accumulate_dtype": torch.float32}


@pytest.mark.parametrize(("option", "value"), (CHANGE_NUMBERS | CHANGE_NONE).items(), ids=CHANGE_NUMBERS | CHANGE_NONE)
def test_options(option, value, batch):
    numbers = {option: value} if option in CHANGE_NUMBERS else {}
    expected = expected_of("llama", batch, **numbers)
    assert (relative_error(expected_of("llama", batch)[1], expected[1]) > 1e-2) == bool(numbers)
    assert_same(step(patched("llama", **{option: value}), batch), expected)


@pytest.mark.parametrize("count", [17, 17.0, torch.tensor(17.0), torch.tensor(17), torch.full((2, 1), 17.0)], ids=repr)
def test_number_of_targets(count, batch):
    found = step(patched("llama"), batch, num_items_in_batch=count)
    assert_same(found, expected_of("llama", batch, count=17))


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bart"])
def test_a_batch_without_targets_has_a_gradient_of_zero(name, batch):
    model = patched(name)
    loss, gradients = step(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert loss == 0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_labels_may_end_before_the_last_class_of_a_padded_layer(batch):
    """A layer that is longer than the tokenizer: the weights are as many as its rows."""
    model = sharp_model("llama", vocab_size=V + 8)
    weights = torch.cat([W, torch.ones(8)])
    expected = expected_of("llama", batch, model, weights=weights)
    use_pdl_linear_loss(model, weights)
    assert_same(step(model, batch), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_no_logits_of_all_tokens(batch):
    """In forward and backward of a training step; with the hook on logits there are some."""
    size = batch["input_ids"].numel() * V

    def large(model):
        with Allocations() as allocated:
            model(**batch).loss.backward()
        return [tuple(tensor.shape) for tensor in allocated.large(size)]

    with_logits = sharp_model("llama")
    with_logits.loss_function = pdl_loss_function(W)
    assert large(with_logits)
    assert large(patched("llama", chunk_size=16)) == []
    assert large(patched("gemma2", chunk_size=16)) == []


@pytest.mark.parametrize("evaluation_logits", [True, False])
def test_no_logits_of_all_tokens_in_evaluation(evaluation_logits, batch):
    model = patched("llama", chunk_size=16, evaluation_logits=evaluation_logits)
    with Allocations() as allocated, torch.no_grad():
        model(**batch)
    assert bool(allocated.large(batch["input_ids"].numel() * V)) == evaluation_logits
