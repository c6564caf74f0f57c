"""Training without logits: the loss takes the place of the model's output layer while a model trains."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdl_kernels.integrations.training_loss import TrainingLoss
from pdl_kernels.integrations.transformers.output_layer import (
    ADAPTER_REMEDY,
    find_transform,
    name_of,
    output_layer,
    router_loss,
)
from pdl_kernels.integrations.versions import warn_if_untested


class LinearLoss(TrainingLoss):
    """What `use_pdl_linear_loss` makes: the model trains without logits until `undo`."""

    def __init__(self, model: PreTrainedModel, weights: Any, evaluation_logits: bool, options: dict[str, Any]) -> None:
        for name in ("softcap", "logit_scale"):
            if name in options:
                raise ValueError(f"{name} is given; accepted is what the model does to its logits, which is found out")
        super().__init__(weights, linear=True, **options)
        self.evaluation_logits = evaluation_logits
        self.head = output_layer(model)
        self.model = model
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        if self.table is not None and len(self.table) != len(self.head.weight):
            raise ValueError(
                f"weights have shape {tuple(self.table.shape)}; accepted is ({len(self.head.weight)},), one per row of "
                "the model's output layer, which may be longer than the tokenizer"
            )
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self._before = {module: module.__dict__.get("forward") for module in (model, self.head)}
        self.transform, self.shift = find_transform(model, self.head)
        for module, forward in ((model, _model_forward), (self.head, _HeadForward(self._before[self.head]))):
            module.forward = _Replaced(module, forward)  # type: ignore[method-assign]
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
            return super().problem_of(arguments, model)
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
            named["decoder_input_ids"] = self._decoder_inputs(labels)
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
        of_routers = router_loss(model, outputs)
        if of_routers is not None:
            loss = loss + of_routers.to(loss.device)
        outputs = type(outputs)(**{**outputs, "loss": loss, "logits": logits})
        return outputs if return_dict else outputs.to_tuple()

    def _decoder_inputs(self, labels: Tensor | None) -> Tensor:
        """(B, L) what the model itself makes of labels where decoder_input_ids are missing."""
        model: Any = self.model
        made: Tensor
        if labels is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
            made = model.prepare_decoder_input_ids_from_labels(labels=labels)
            return made
        modules = (sys.modules[owner.__module__] for owner in type(model).__mro__)
        shift = next((module.shift_tokens_right for module in modules if hasattr(module, "shift_tokens_right")), None)
        if labels is None or shift is None:
            raise ValueError("decoder_input_ids are missing; accepted are batches with them, or with labels")
        made = shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)
        return made

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
            raise ValueError(f"the output layer has an adapter ({name_of(head)}); {ADAPTER_REMEDY}")
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


def _model_forward(model: Any, *arguments: Any, **named: Any) -> Any:
    return model.pdl_linear_loss._of_model(*arguments, **named)


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


class _Replaced:
    """In the place of a module's `forward`, with the signature that Trainer, PEFT and generate look at.

    A method would do but for pickle, which looks methods up in the class and would find the model's own.
    """

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.module, self.forward = module, forward

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.forward(self.module, *arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __func__(self) -> Any:
        """What accelerate binds to the model anew, inside a wrapper of its own."""
        return self.forward


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
