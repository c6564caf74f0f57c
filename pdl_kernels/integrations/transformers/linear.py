"""Training without logits: the loss takes the place of the model's output layer while a model trains."""

from __future__ import annotations

import functools
import inspect
import math
import os
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdl_kernels.integrations.training_loss import TrainingLoss
from pdl_kernels.integrations.versions import warn_if_untested

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


class LinearLoss(TrainingLoss):
    """What `use_pdl_linear_loss` makes: the model trains without logits until `undo`."""

    def __init__(self, model: PreTrainedModel, weights: Any, evaluation_logits: bool, options: dict[str, Any]) -> None:
        for name in ("softcap", "logit_scale"):
            if name in options:
                raise ValueError(f"{name} is given; accepted is what the model does to its logits, which is found out")
        super().__init__(weights, linear=True, **options)
        self.evaluation_logits = evaluation_logits
        self.head = _output_layer(model)
        self.model = model
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        if self.table is not None and len(self.table) != len(self.head.weight):
            raise ValueError(
                f"weights have shape {tuple(self.table.shape)}; accepted is ({len(self.head.weight)},), one per row of "
                "the model's output layer, which may be longer than the tokenizer"
            )
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self._before = {module: module.__dict__.get("forward") for module in (model, self.head)}
        self.transform, self.shift = self._find_transform()
        _replace_forward(
            model, lambda module, *arguments, **named: module.pdl_linear_loss._of_model(*arguments, **named)
        )
        _replace_forward(self.head, _HeadForward(self._before[self.head]))
        model.pdl_linear_loss = self
        self._took_counts = model.__dict__.get("accepts_loss_kwargs")
        model.accepts_loss_kwargs = True  # the Trainer gives the number of targets to models that say so

    def undo(self) -> PreTrainedModel:
        """Put the model back as it was; returns it."""
        if getattr(self.model, "pdl_linear_loss", None) is not self:
            raise RuntimeError("the model does not train with this loss: it was undone before")
        for module, forward in self._before.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        del self.model.pdl_linear_loss, self.model.accepts_loss_kwargs
        if self._took_counts is not None:
            self.model.accepts_loss_kwargs = self._took_counts
        return self.model

    def problem_of(self, arguments: Any, model: Any) -> str | None:
        if arguments.n_gpu <= 1:
            return None
        return (
            "several GPUs are visible to one process, and the Trainer would use nn.DataParallel, whose replicas would "
            "all run the first one's layers; accepted is one process per GPU (torchrun, accelerate launch)"
        )

    def why_not_called(self, model: Any) -> str:
        return (
            ".undo() was called, the model's forward or output layer was replaced, or labels do not reach the model: "
            "compute_loss_func keeps them, and TRL's trainers score tokens in a head of their own "
            "(pdl_kernels.integrations.trl)"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # One call of the model

    def _of_model(
        self,
        *arguments: Any,
        labels: Tensor | None = None,  # (B, L)
        shift_labels: Tensor | None = None,  # (B, L)
        num_items_in_batch: Tensor | float | None = None,
        token_weights: Tensor | None = None,  # (B, L)
        shift_token_weights: Tensor | None = None,  # (B, L)
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        **named: Any,
    ) -> Any:
        model = self.model
        if "labels" in self._parameters[: len(arguments)]:
            raise TypeError("labels are given by position; accepted is labels=...")
        given = dict(zip(self._parameters, arguments, strict=False)) | named
        if return_dict is None:
            return_dict = getattr(model.config, "return_dict", True)
        if labels is None and shift_labels is None:
            return self._stock(*arguments, return_dict=return_dict, **named)
        targets, factors = self.targets(labels, shift_labels, token_weights, shift_token_weights, shift=self.shift)
        if self.encoder_decoder and all(given.get(f"decoder_input{end}") is None for end in ("_ids", "s_embeds")):
            arguments, named = (), given  # a None by position would be in the way
            named["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        keep = given.get("logits_to_keep", 0)
        targets = _keep(targets, keep)
        factors = None if factors is None else _keep(factors, keep)
        if "use_cache" in self._parameters and "use_cache" not in given:
            named["use_cache"] = False

        if torch.is_grad_enabled() or skip_logits or not self.evaluation_logits:
            outputs, loss = self._fused(arguments, named, targets, factors, num_items_in_batch)
            logits = None
        else:
            outputs = self._stock(*arguments, return_dict=True, **named)
            logits = outputs.logits
            loss = self.of_logits(logits, targets, factors, num_items_in_batch)
        if outputs.get("aux_loss") is not None:  # of a mixture of experts, as the models themselves add it
            loss = loss + model.router_aux_loss_coef * outputs.aux_loss.to(loss.device)
        outputs = type(outputs)(**{**outputs, "loss": loss, "logits": logits})
        return outputs if return_dict else outputs.to_tuple()

    def _fused(
        self,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        targets: Tensor,
        factors: Tensor | None,
        count: Tensor | float | None,
    ) -> tuple[Any, Tensor]:
        """The outputs, whose logits have no rows, and the loss."""
        head = self.model.get_output_embeddings()
        if hasattr(head, "base_layer"):
            raise ValueError(f"the output layer has an adapter ({_name(head)}); {ADAPTER_REMEDY}")
        call = _Call(self, targets, factors, count)
        UNDER_WAY.calls.append(call)
        try:
            outputs = self._stock(*arguments, return_dict=True, **named)
        finally:
            UNDER_WAY.calls.pop()
        if call.loss is None:
            raise RuntimeError(
                f"{type(self.model).__name__} did not call the output layer that use_pdl_linear_loss prepared: it was "
                "replaced afterwards; call .undo(), and use_pdl_linear_loss again"
            )
        # The empty logits add 0; they tell FSDP, which watches what leaves a layer, that its backward begins.
        return outputs, call.loss + outputs.logits.sum().to(call.loss.dtype)

    def take_from(self, head: nn.Linear, hidden: Tensor, call: _Call) -> None:
        """The loss of this call, where the model runs its output layer on (..., L, H) hidden states."""
        if hasattr(head.weight, "device_mesh"):
            raise ValueError(
                "the output layer is sharded (its weight is a DTensor); accepted is one that is whole when it runs: "
                "keep it out of tensor parallelism, and shard it with FSDP after use_pdl_linear_loss"
            )
        bias = head.bias
        if self.transform.bias:
            more = self.model.final_logits_bias[0].to(head.weight.device, head.weight.dtype)
            bias = more if bias is None else bias + more
        call.loss = self.of_hidden(
            hidden,
            head.weight,
            call.targets,
            call.factors,
            call.count,
            bias=bias,
            softcap=self.transform.softcap,
            logit_scale=self.transform.scale,
        )

    def _stock(self, *arguments: Any, **named: Any) -> Any:
        """What the model did before."""
        forward = self._before[self.model]
        if forward is None:
            return type(self.model).forward(self.model, *arguments, **named)
        return forward(*arguments, **named)

    # -----------------------------------------------------------------------------------------------------------------
    # What the model does to the products of its output layer

    @torch.no_grad()
    def _find_transform(self) -> tuple[Transform, bool]:
        """Feed the model products of its output layer that are known: what logits come of them, and which labels count.

        Returns the transform, and whether position i predicts label i + 1.
        """
        model, head = self.model, self.head
        if head.weight.device.type == "meta":
            raise ValueError("the model is on the meta device; accepted is one with its weights loaded")
        products = torch.linspace(-100, 100, len(head.weight), device=head.weight.device, dtype=head.weight.dtype)
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if self.encoder_decoder else {})
        with _evaluating(model), _forward_of(head, lambda hidden: products.expand(*hidden.shape[:-1], -1)):
            logits = model(**inputs, return_dict=True).logits[0, -1].float()  # (V,)
            labels = torch.tensor([[0, len(products) - 1]], device=model.device)
            loss = model(**inputs, labels=labels, return_dict=True).loss
        bias = getattr(model, "final_logits_bias", None)  # (1, V) of BART and its kind
        eps = max(torch.finfo(products.dtype).eps, torch.finfo(torch.float32).eps)
        for transform in self._candidates(has_bias=bias is not None):
            expected = transform(products.float(), None if bias is None else bias[0].float())
            unchanged = transform == Transform()
            if (logits - expected).abs().max() <= (0 if unchanged else 2 * eps * expected.abs().max()):
                return transform, self._shifts(loss, logits)
        raise ValueError(
            f"{type(model).__name__} does something to its logits that is not known here; accepted are a scale, a "
            "softcap and final_logits_bias, as the configuration names them: use pdl_loss_function for this model"
        )

    def _shifts(self, loss: Tensor | None, logits: Tensor) -> bool:
        """Whether the model's loss of the labels 0 and V - 1 at two equal rows of logits is that of V - 1 alone."""
        first, last = (
            F.cross_entropy(logits, torch.tensor(label, device=logits.device)) for label in (0, -1 % len(logits))
        )
        for shift, expected in ((True, last), (False, (first + last) / 2)):
            if loss is not None and (loss - expected).abs() <= 0.1 * (first - last).abs():
                return shift
        raise ValueError(
            f"{type(self.model).__name__} has a loss that is neither that of a causal model nor of an encoder-decoder; "
            "accepted are language models"
        )

    def _candidates(self, has_bias: bool) -> Iterator[Transform]:
        text = self.model.config.get_text_config()
        scales = [float(value) for name in SCALES if isinstance(value := getattr(text, name, None), (int, float))]
        scales = [scale for scale in scales if scale > 0 and math.isfinite(scale)]
        for scale in dict.fromkeys([1.0, *scales, *(1 / scale for scale in scales)]):
            for softcap in dict.fromkeys([None, getattr(text, "final_logit_softcapping", None)]):
                yield Transform(scale, softcap, has_bias)


class _Call:
    """A training call that is under way."""

    def __init__(self, owner: LinearLoss, targets: Tensor, factors: Tensor | None, count: Any) -> None:
        self.owner, self.targets, self.factors, self.count = owner, targets, factors, count
        self.loss: Tensor | None = None


class _UnderWay(threading.local):
    """Where the output layer finds its call, and not in an object of its own: PEFT copies output layers."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


UNDER_WAY = _UnderWay()


class _HeadForward:
    """(..., L, H) -> (..., L, V); where the loss is taken instead, (..., 0, V)."""

    def __init__(self, before: Any) -> None:
        self.before = before  # the layer's own forward, where another library replaced it
        self.bound = isinstance(before, types.MethodType)  # then a copy of the layer can call it as its own

    def __call__(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        if UNDER_WAY.calls:
            call = UNDER_WAY.calls[-1]
            call.owner.take_from(head, hidden, call)
            return F.linear(hidden[..., :0, :], head.weight, head.bias)
        if self.before is None:
            return type(head).forward(head, hidden)
        own: Tensor = self.before.__func__(head, hidden) if self.bound else self.before(hidden)
        return own


ADAPTER_REMEDY = (
    "its share would get no gradient; accepted is an output layer without one: leave it out of target_modules, or name "
    "it in modules_to_save"
)


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    """The output layer, where the loss can take its place. ValueError that names what it is otherwise."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {_name(model)}; accepted is a PreTrainedModel: call use_pdl_linear_loss before "
            "get_peft_model, DistributedDataParallel and the like"
        )
    if getattr(model, "pdl_linear_loss", None) is not None:
        raise ValueError("model trains without logits already; accepted is one after .undo()")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model is a {_name(model)}, which has no output layer; accepted are language models")
    if hasattr(head, "base_layer"):
        raise ValueError(f"the output layer has an adapter ({_name(head)}); {ADAPTER_REMEDY}")
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the output layer is a {_name(head)} (quantised, or of another kind); accepted is a plain torch.nn.Linear"
        )
    if hasattr(head.weight, "device_mesh"):
        raise ValueError(
            "the output layer is sharded (its weight is a DTensor); accepted is a whole one: keep it out of tensor "
            "parallelism, and call use_pdl_linear_loss before fully_shard"
        )
    if type(head.weight) is not nn.Parameter or not head.weight.is_floating_point():
        raise ValueError(
            f"the output layer has a weight of type {type(head.weight).__name__}, {head.weight.dtype}, quantised or of "
            "another kind; accepted is a plain floating parameter"
        )
    return head


def _name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _replace_forward(module: nn.Module, forward: Any) -> None:
    """Have `forward(module, ...)` called, with the signature that Trainer, PEFT and generate look at."""
    stock = type(module).forward

    @functools.wraps(stock)
    def replaced(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        return forward(self, *arguments, **named)

    # accelerate takes wrappers off as long as there is something under them, and would take this one off, too.
    del replaced.__wrapped__
    replaced.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]

    module.forward = types.MethodType(replaced, module)


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
    """In evaluation mode for a while, so that no random number is drawn."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _keep(values: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, L) -> what transformers keeps of it: the last k, these positions, or (n,) by a (B, L) mask."""
    if not isinstance(logits_to_keep, Tensor):
        return values[:, -logits_to_keep:] if logits_to_keep else values
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return values[logits_to_keep]
    return values.gather(1, logits_to_keep) if logits_to_keep.dim() == 2 else values[:, logits_to_keep]


def use_pdl_linear_loss(
    model: PreTrainedModel,
    weights: Tensor | str | os.PathLike[str] | None,
    *,
    evaluation_logits: bool = True,
    weighted_evaluation: bool = False,
    **options: Any,
) -> LinearLoss:
    """Have a causal language model, or an encoder-decoder such as T5 or BART, train with PDL and without logits.

        L = sum_i w(y_i) u_i ce_i / n

    From now on `model(..., labels=...)` returns this loss. Where gradients are on, the output layer is not run: the
    loss is taken from its input by `pdl_linear_cross_entropy`, and `outputs.logits` is None. A scale, a softcap or
    a bias that the model applies to its logits are found out by a call of the model with two tokens, and applied.
    Calls without labels, `generate` among them, are as before. Where gradients are off, the loss is plain cross
    entropy. The numbers are those of `pdl_loss_function` up to rounding.

    `shift_labels`, `num_items_in_batch`, `logits_to_keep`, `token_weights` and `shift_token_weights` are honoured, and
    so are autocast, tied embeddings, gradient checkpointing, adapters elsewhere in the model.

    Call it before `get_peft_model`, `DistributedDataParallel`, `fully_shard` and before the Trainer is made.

    Args:
        model: of `transformers`, with a plain `torch.nn.Linear` on top.
        weights: as in `pdl_loss_function`.
        evaluation_logits: make logits where gradients are off, which metrics need. False saves their memory.
        weighted_evaluation: use the weights where gradients are off, too.
        options: of `pdl_linear_cross_entropy`, such as `chunk_size`, `label_smoothing`, `accumulate_dtype`.

    Returns:
        The loss, for `PDLCallback(loss)`; `loss.undo()` puts the model back.

    Raises:
        TypeError: a model that is wrapped already.
        ValueError: an output layer with an adapter, quantised or sharded; weights of another length than it has rows;
            a model that does something unknown to its logits.

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """
    warn_if_untested("transformers")
    return LinearLoss(model, weights, evaluation_logits, {"weighted_evaluation": weighted_evaluation, **options})
