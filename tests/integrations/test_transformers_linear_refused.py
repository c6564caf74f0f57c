"""Models, arguments and batches that `use_pdl_linear_loss` refuses, and leaves as they were."""

import inspect

import pytest
import torch
import torch.distributed as dist
from helpers.trainer_models import DECODER, V, sharp_model, transformers
from helpers.transformers_hooks import W, assert_same, draw_token_weights
from helpers.transformers_linear import ATTENTION, expected_of, patched, step, with_adapters
from torch import nn

from pdl_kernels.integrations.transformers import pdl_loss_function, use_pdl_linear_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")


class Other(nn.Linear):
    """An output layer of another kind, as quantisers make it."""


def sharded(weight):
    """A parameter that is a DTensor, of one process."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return nn.Parameter(dist.tensor.distribute_tensor(weight.detach(), mesh, [dist.tensor.Shard(0)]))


def with_other_layer(model):
    model.lm_head = Other(16, V, bias=False)
    return model


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def with_integers(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    return model


REFUSED = [
    (with_other_layer, "test_transformers_linear_refused.Other .*accepted is a plain torch.nn.Linear"),
    (quantised, "quantized.*Linear.*accepted is a plain torch.nn.Linear"),
    (with_integers, "torch.int8, quantised or of another kind"),
    (lambda model: model.to("meta"), "on the meta device"),
]


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize(("change", "words"), REFUSED, ids=["subclass", "dynamic quantisation", "int8", "meta"])
def test_output_layers_that_are_refused(change, words):
    model = change(sharp_model("llama"))
    with pytest.raises(ValueError, match=words):
        use_pdl_linear_loss(model, W)
    assert "forward" not in model.__dict__


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sharded_output_layer_is_refused(when, batch):
    model = sharp_model("llama")
    if when == "after":
        use_pdl_linear_loss(model, W)
    model.lm_head.weight = sharded(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"the output layer is sharded \(its weight is a DTensor.*tensor parallelism"):
        _ = model(**batch) if when == "after" else use_pdl_linear_loss(model, W)


class Strange(transformers.LlamaForCausalLM):
    """Does to its logits what nobody has named."""

    def forward(self, *arguments, **named):
        outputs = super().forward(*arguments, **named)
        outputs.logits = self.change(outputs.logits)
        return outputs


CHANGES = {
    "scale": lambda logits: 1.1 * logits,
    "scale near 1": lambda logits: 1.01 * logits,
    "small bias": lambda logits: logits + torch.linspace(-1, 1, V),
    "clamp": lambda logits: logits.clamp(-50, 50),
    "bias": lambda logits: logits + torch.linspace(0, 5, V),
    "log_softmax": lambda logits: logits.log_softmax(-1),
    "order": lambda logits: logits.roll(1, -1),
    "masked classes": lambda logits: logits.index_fill(-1, torch.tensor([V - 1]), -1e4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_unknown_change_of_the_logits_is_refused(change, dtype):
    model = Strange(transformers.LlamaConfig(**DECODER)).to(dtype)
    model.change = change
    with pytest.raises(ValueError, match="Strange does something to its logits that is not known here"):
        use_pdl_linear_loss(model, W)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("options", [{}, {"weighted_evaluation": True}], ids=["", "weighted"])
def test_after_a_loss_function(options, batch):
    """Another loss of ours that the model had before, of whatever weights, does not matter."""
    model = sharp_model("llama")
    model.loss_function = pdl_loss_function(W.flip(0), **options)
    use_pdl_linear_loss(model, W)
    assert_same(step(model, batch), expected_of("llama", batch))


def test_twice_is_refused(batch):
    model = patched("llama")
    with pytest.raises(ValueError, match="trains without logits already; accepted is one after"):
        use_pdl_linear_loss(model, W)
    assert_same(step(model, batch), expected_of("llama", batch))


WRAPPED = {
    "torch module": lambda model: nn.Sequential(model),
    "adapters": lambda model: with_adapters(model, **ATTENTION),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_are_refused(wrap):
    with pytest.raises(TypeError, match="accepted is a PreTrainedModel: call use_pdl_linear_loss before"):
        use_pdl_linear_loss(wrap(sharp_model("llama")), W)


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(ValueError, match="no output layer"):
        use_pdl_linear_loss(transformers.LlamaModel(transformers.LlamaConfig(**DECODER)), W)


@pytest.mark.parametrize(
    ("weights", "options", "error", "words"),
    [
        (W[1:], {}, ValueError, r"weights have shape \(63,\); accepted is \(64,\)"),
        (-W, {}, ValueError, "weights"),
        (W, {"softcap": 3.0}, ValueError, "softcap is given"),
        (W, {"logit_scale": 3.0}, ValueError, "logit_scale is given"),
        (W, {"reduction": "sum"}, ValueError, "reduction is given"),
        (W, {"normalizer": 1.0}, ValueError, "normalizer is given"),
        (W, {"return_stats": True}, ValueError, "return_stats is given"),
        (W, {"inplace": True}, TypeError, "inplace"),
        (W, {"chunk_sise": 1}, TypeError, "chunk_sise"),
        (W, {"chunk_size": 0}, ValueError, "chunk_size is 0"),
    ],
)
def test_arguments_that_are_refused(weights, options, error, words):
    model = sharp_model("llama")
    with pytest.raises(error, match=words):
        use_pdl_linear_loss(model, weights, **options)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_labels_by_position_are_refused(name, batch):
    model = patched(name)
    position = list(inspect.signature(model.forward).parameters).index("labels")
    with pytest.raises(TypeError, match="labels are given by position"):
        model(batch["input_ids"], *[None] * (position - 1), batch["labels"])


def test_an_output_layer_that_was_replaced(batch):
    model = patched("llama")
    model.resize_token_embeddings(V + 8)
    with pytest.raises(RuntimeError, match="did not call the output layer that use_pdl_linear_loss prepared"):
        model(**batch)


def test_labels_of_another_shape(batch):
    batch["labels"] = batch["labels"][:, 1:]
    with pytest.raises(ValueError, match="targets have shape"):
        patched("llama")(**batch)


def test_a_failed_call_leaves_the_model_usable(batch):
    model = patched("llama")
    with pytest.raises(IndexError):
        model(**{**batch, "labels": torch.full_like(batch["labels"], V)})
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**inputs).logits.shape == (*batch["labels"].shape, V)
    assert_same(step(model, batch), expected_of("llama", batch))


def test_shifted_token_weights_need_shifted_labels(batch):
    """They are neither dropped nor taken for those of the labels."""
    with pytest.raises(ValueError, match="shift_token_weights"):
        patched("llama")(**batch, shift_token_weights=draw_token_weights(batch["labels"]))
