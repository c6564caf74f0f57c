"""The output layer of a model: whether the loss can take its place, and what the model does to its products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

# Where configurations keep a factor of the logits, or what they are divided by.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class Transform(NamedTuple):
    """From the output layer's products z to logits: softcap * tanh(scale * z / softcap) + bias."""

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False  # the model's `final_logits_bias` is added

    def __call__(self, products: Tensor, bias: Tensor | None) -> Tensor:
        logits = self.scale * products
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if bias is None else logits + bias


ADAPTER_REMEDY = (
    "its share would get no gradient; accepted is an output layer without one: leave it out of target_modules, or name "
    "it in modules_to_save"
)


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The output layer, where the loss can take its place. ValueError that names what it is otherwise."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {name_of(model)}; accepted is a PreTrainedModel: call use_pdl_linear_loss before "
            "get_peft_model, DistributedDataParallel and the like, or with what they wrap (model.get_base_model())"
        )
    if getattr(model, "pdl_linear_loss", None) is not None:
        raise ValueError("model trains without logits already; accepted is one after .undo()")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model is a {name_of(model)}, which has no output layer; accepted are language models")
    if hasattr(head, "base_layer"):
        raise ValueError(f"the output layer has an adapter ({name_of(head)}); {ADAPTER_REMEDY}")
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the output layer is a {name_of(head)} (quantised, or of another kind); accepted is a plain "
            "torch.nn.Linear"
        )
    if hasattr(head.weight, "device_mesh"):
        raise ValueError(
            "the output layer is sharded (its weight is a DTensor); accepted is a whole one: keep it out of tensor "
            "parallelism, and call use_pdl_linear_loss before fully_shard"
        )
    if head.weight.numel() == 0:
        raise ValueError(
            "the output layer has an empty weight, as ZeRO-3 leaves one that it keeps elsewhere; accepted is a whole "
            "one"
        )
    if type(head.weight) is not nn.Parameter or not head.weight.is_floating_point():
        raise ValueError(
            f"the output layer has a weight of type {type(head.weight).__name__}, {head.weight.dtype}, quantised or of "
            "another kind; accepted is a plain floating parameter"
        )
    return head


def name_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@torch.no_grad()
def find_transform(model: PreTrainedModel, head: nn.Linear) -> tuple[Transform, bool]:
    """Feed the model products of its output layer that are known: what logits come of them, and which labels count.

    Returns the transform, and whether position i predicts label i + 1.
    """
    if head.weight.device.type == "meta":
        raise ValueError("the model is on the meta device; accepted is one with its weights loaded")
    products = torch.linspace(-100, 100, len(head.weight), device=head.weight.device, dtype=head.weight.dtype)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    labels = torch.tensor([[0, len(products) - 1]], device=model.device)
    shapes = []

    def known(hidden: Tensor) -> Tensor:
        shapes.append(hidden.shape[:-1])
        return products.expand(*hidden.shape[:-1], -1)

    with _evaluating(model), _forward_of(head, known):
        try:
            logits = model(**inputs, return_dict=True).logits[0, -1].float()  # (V,)
            outputs = model(**inputs, labels=labels, return_dict=True)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} does not run with two tokens and nothing else ({error}); accepted are models "
                "whose inputs are input_ids: use pdl_loss_function or pdl_compute_loss for this model"
            ) from error
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"{type(model).__name__} predicts more than one token at each position; accepted are models that "
            "predict one"
        )
    loss, of_routers = outputs.loss, router_loss(model, outputs)
    if of_routers is not None:
        loss = loss - of_routers.to(loss.device)
    bias = getattr(model, "final_logits_bias", None)  # (1, V) of BART and its kind
    eps = max(torch.finfo(products.dtype).eps, torch.finfo(torch.float32).eps)
    for transform in _candidates(model, has_bias=bias is not None):
        expected = transform(products.float(), None if bias is None else bias[0].float())
        unchanged = transform == Transform()
        if (logits - expected).abs().max() <= (0 if unchanged else 2 * eps * expected.abs().max()):
            return transform, _shifts(model, loss, logits)
    raise ValueError(
        f"{type(model).__name__} does something to its logits that is not known here; accepted are a scale, a "
        "softcap and final_logits_bias, as the configuration names them: use pdl_loss_function for this model"
    )


def router_loss(model: PreTrainedModel, outputs: Any) -> Tensor | None:
    """What a mixture of experts adds to its loss, 0-d, or None."""
    if model.config.is_encoder_decoder and any(
        value is not None for name, value in outputs.items() if name.endswith("router_logits")
    ):
        raise ValueError(
            f"{type(model).__name__} adds losses of its routers to its own; accepted is output_router_logits=False, or "
            "pdl_loss_function and pdl_compute_loss, which leave them out"
        )
    found: Tensor | None = outputs.get("aux_loss")
    if found is None:
        return None
    for owner in (model, model.config, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(coefficient := getattr(owner, name, None), (int, float)):
                return coefficient * found
    raise ValueError(
        f"{type(model).__name__} has a router loss, and no router_aux_loss_coef; accepted is output_router_logits=False"
    )


def _shifts(model: PreTrainedModel, loss: Tensor | None, logits: Tensor) -> bool:
    """Whether the model's loss of the labels 0 and V - 1 at two equal rows of logits is that of V - 1 alone."""
    first, last = (
        F.cross_entropy(logits, torch.tensor(label, device=logits.device)) for label in (0, -1 % len(logits))
    )
    for shift, expected in ((True, last), (False, (first + last) / 2)):
        if loss is not None and (loss - expected).abs() <= 0.1 * (first - last).abs():
            return shift
    raise ValueError(
        f"{type(model).__name__} has a loss that is neither that of a causal model nor of an encoder-decoder, or adds "
        "something of its own; accepted is the cross entropy of its logits, and a router loss"
    )


def _candidates(model: PreTrainedModel, has_bias: bool) -> Iterator[Transform]:
    text = model.config.get_text_config()
    scales = [float(value) for name in SCALES if isinstance(value := getattr(text, name, None), (int, float))]
    scales = [scale for scale in scales if scale > 0 and math.isfinite(scale)]
    for scale in dict.fromkeys([1.0, *scales, *(1 / scale for scale in scales)]):
        for softcap in dict.fromkeys([None, getattr(text, "final_logit_softcapping", None)]):
            yield Transform(scale, softcap, has_bias)


@contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace a module's forward for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while, so that no random number is drawn; numbers that modules keep stay as they are."""
    kept = {
        module: {name: value for name, value in vars(module).items() if isinstance(value, (int, float))}
        for module in model.modules()
    }
    model.eval()
    try:
        yield
    finally:
        for module, numbers in kept.items():
            vars(module).update(numbers)
