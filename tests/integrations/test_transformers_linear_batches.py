"""What a batch may hold for a model that trains without logits: the loss is that of the same batch with logits."""

import pytest
import torch
import torch.nn.functional as F
from helpers.trainer_models import next_labels, sharp_model, take_gradients, transformers
from helpers.transformers_hooks import W, assert_same, draw_token_weights, reference
from helpers.transformers_linear import expected_of, patched, step, targets_of

from pdl_kernels.integrations.transformers import use_pdl_linear_loss


def test_shifted_labels_win(batch):
    targets = batch["labels"].roll(3, dims=1)  # which no shift of the labels is
    model = sharp_model("llama")
    loss = reference(model(**batch).logits, targets)
    loss.backward()
    expected = loss.item(), take_gradients(model)
    use_pdl_linear_loss(model, W)
    assert_same(step(model, batch, shift_labels=targets), expected)
    del batch["labels"]
    assert_same(step(model, batch, shift_labels=targets), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_token_weights(name, batch):
    """They belong to the labels: a causal model shifts both."""
    u = draw_token_weights(batch["labels"])
    moved = u if name == "t5" else F.pad(u, (0, 1))[:, 1:]
    model = sharp_model(name).double()
    loss = reference(model(**batch).logits, targets_of(name, batch["labels"]), token_weights=moved)
    loss.backward()
    expected = loss.item(), take_gradients(model)
    use_pdl_linear_loss(model, W)
    assert_same(step(model, batch, token_weights=u), expected, 1e-9)
    if name == "llama":
        more = {"shift_labels": next_labels(batch["labels"]), "shift_token_weights": moved}
        assert_same(step(model, batch, **more), expected, 1e-9)


def keep_last(targets):
    return 5


def keep_positions(targets):
    return torch.tensor([2, 9, 4])


def keep_positions_of_each_row(targets):
    return torch.arange(4)[None] + torch.arange(len(targets))[:, None]


def keep_targets(targets):
    return targets != -100


def keep_columns(targets):
    return (targets != -100).any(0) & (torch.arange(targets.shape[1]) % 2 == 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("with_token_weights", [False, True], ids=["", "token weights"])
@pytest.mark.parametrize("keep", [keep_last, keep_positions, keep_positions_of_each_row, keep_targets, keep_columns])
def test_logits_to_keep(name, keep, with_token_weights, batch):
    """An int, 1-d and 2-d positions, 2-d and 1-d masks: the loss over what is kept."""
    targets = next_labels(batch["labels"])
    kept = keep(targets)
    positions = torch.arange(targets.numel()).view(targets.shape)
    if isinstance(kept, int):
        positions = positions[:, -kept:]
    elif kept.dim() == 1:
        positions = positions[:, kept]
    else:
        positions = positions[kept] if kept.dtype == torch.bool else positions.gather(1, kept)
    u = draw_token_weights(batch["labels"])
    shifted = F.pad(u, (0, 1))[:, 1:].flatten()[positions] if with_token_weights else None
    model = sharp_model(name).double()
    logits = model(**batch).logits.flatten(0, 1)[positions]
    loss = reference(logits, targets.flatten()[positions], token_weights=shifted)
    loss.backward()
    expected = loss.item(), take_gradients(model)
    use_pdl_linear_loss(model, W)
    more = {"logits_to_keep": kept} | ({"token_weights": u} if with_token_weights else {})
    assert_same(step(model, batch, **more), expected, 1e-9)
    with torch.no_grad():
        outputs = model(**batch, **more)
        assert torch.equal(outputs.logits, logits) or torch.allclose(outputs.logits, logits, rtol=1e-9)
        plain = reference(logits, targets.flatten()[positions], None)
        assert outputs.loss.item() == pytest.approx(plain.item(), rel=1e-9)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "None"])
def test_decoder_inputs_of_the_batch(given, name, batch):
    """Those of the batch count, even where they are not the labels moved by one, and None is none."""
    decoder_input_ids = batch["labels"].clamp(min=3).roll(2, dims=1) if given else None
    expected = expected_of(name, {**batch, "decoder_input_ids": decoder_input_ids})
    assert_same(step(patched(name), batch, decoder_input_ids=decoder_input_ids), expected)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoder_inputs_by_position(name, batch):
    given = batch["labels"].clamp(min=3).roll(2, dims=1)
    expected = expected_of(name, {**batch, "decoder_input_ids": given})
    model = patched(name)
    outputs = model(batch["input_ids"], batch["attention_mask"], given, labels=batch["labels"])
    outputs.loss.backward()
    assert_same((outputs.loss.item(), take_gradients(model)), expected)


class Passing(transformers.LlamaForCausalLM):
    """A user's subclass, whose signature names nothing."""

    def forward(self, *arguments, **named):
        return super().forward(*arguments, **named)


@pytest.mark.parametrize("kind", [transformers.LlamaForCausalLM, Passing])
def test_inputs_by_position(kind, batch):
    model = sharp_model("llama")
    model.__class__ = kind
    use_pdl_linear_loss(model, W)
    outputs = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    outputs.loss.backward()
    assert_same((outputs.loss.item(), take_gradients(model)), expected_of("llama", batch))


def test_embeddings_in_place_of_ids(batch):
    expected = expected_of("llama", batch)
    model = patched("llama")
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    assert_same(step(model, batch, inputs_embeds=embeddings), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_outputs_as_a_tuple(name, batch):
    model = patched(name)
    expected = step(model, batch)
    outputs = model(**batch, return_dict=False)
    assert isinstance(outputs, tuple)
    outputs[0].backward()
    assert_same((outputs[0].item(), take_gradients(model)), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_keys_and_values_are_not_cached(name, batch):
    """Nobody reads them while a model trains, unless they are asked for."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    kept = sharp_model(name)(**inputs).keys() - patched(name)(**batch).keys()
    assert kept - {"logits"}, "the model caches nothing by itself"
    assert kept - {"logits"} <= patched(name)(**batch, use_cache=True).keys()


def test_hidden_states_and_attentions_are_there(batch):
    model = patched("llama", changes={"attn_implementation": "eager"})
    found = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 3
    assert len(found.attentions) == 2
