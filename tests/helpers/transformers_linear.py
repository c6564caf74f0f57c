"""Models that train without logits, by use_pdl_linear_loss, and the numbers of the same models with logits."""

import pytest
import torch

from helpers.trainer_models import CAUSAL, ENCODER_DECODER, MORE_CAUSAL, next_labels, sharp_model, take_gradients
from helpers.transformers_hooks import W, reference
from pdl_kernels.integrations.transformers import use_pdl_linear_loss

TRANSFORMS = {  # scale, softcap, bias; as the configurations of these models say
    "gemma2": (1.0, 2.0, False),
    "granite": (0.25, None, False),
    "cohere": (0.25, None, False),
    "bart": (1.0, None, True),
}
each_model = pytest.mark.parametrize("name", CAUSAL | ENCODER_DECODER | MORE_CAUSAL)


def patched(name, weights=W, changes=None, **options):
    model = sharp_model(name, **changes or {})
    use_pdl_linear_loss(model, weights, **options)
    return model


def targets_of(name, labels):
    return labels if name in ENCODER_DECODER else next_labels(labels)


def step(model, batch, **more):
    """Loss and gradients of one training step without logits."""
    outputs = model(**batch, **more)
    assert outputs.logits is None
    outputs.loss.backward()
    return outputs.loss.item(), take_gradients(model)


def expected_of(name, batch, model=None, **options):
    """Loss and gradients of a model with logits."""
    model = sharp_model(name) if model is None else model
    loss = reference(model(**batch).logits.float(), targets_of(name, batch["labels"]), **options)
    loss.backward()
    return loss.item(), take_gradients(model)


def with_adapters(model, seed=0, **options):
    """A PEFT model whose second matrices, which begin at 0, are random."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    options = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return wrapped


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
