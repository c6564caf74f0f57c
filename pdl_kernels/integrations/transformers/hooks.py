"""Losses on finished logits: what `model.loss_function` and `Trainer(compute_loss_func=...)` take."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from pdl_kernels.integrations.training_loss import TrainingLoss
from pdl_kernels.integrations.versions import warn_if_untested


class LossFunction(TrainingLoss):
    """What `pdl_loss_function` makes; `model.loss_function = ...` takes it."""

    def __init__(self, weights: Any, encoder_decoder: bool, options: dict[str, Any]) -> None:
        super().__init__(weights, **options)
        self.encoder_decoder = encoder_decoder

    def __call__(
        self,
        logits: Tensor,  # (B, L, V)
        labels: Tensor | None = None,  # (B, L)
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int | None = None,
        shift_labels: Tensor | None = None,  # (B, L)
        token_weights: Tensor | None = None,  # (B, L), as labels
        shift_token_weights: Tensor | None = None,  # (B, L), as shift_labels
        **unused: Any,  # models pass on everything that they were called with
    ) -> Tensor:
        if ignore_index is not None and ignore_index != self.ignore_index:
            raise ValueError(
                f"the model calls its loss with ignore_index {ignore_index}; accepted is {self.ignore_index}, which "
                "pdl_loss_function was given"
            )
        targets, factors = self.targets(
            labels, shift_labels, token_weights, shift_token_weights, shift=not self.encoder_decoder
        )
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels have shape {tuple(targets.shape)} and logits {tuple(logits.shape)}; accepted are labels of "
                f"shape {tuple(logits.shape[:-1])}: logits_to_keep, which leaves logits out, is for "
                "use_pdl_linear_loss"
            )
        return self.of_logits(logits, targets, factors, num_items_in_batch)

    def problem_of(self, arguments: Any, model: Any) -> str | None:
        problem = super().problem_of(arguments, model) or (None if self.encoder_decoder else _masked_problem(model))
        if problem is not None:
            return problem
        cut = arguments.gradient_accumulation_steps > 1 or arguments.world_size > 1
        if cut and getattr(model, "accepts_loss_kwargs", True) is False:
            return (
                f"{type(model).__name__} says accepts_loss_kwargs = False: the Trainer does not give it the number of "
                "targets of a step, and averages micro-batches and processes; accepted are use_pdl_linear_loss and "
                "pdl_compute_loss for such a model, or one micro-batch and one process"
            )
        if self.encoder_decoder or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return None
        return (
            "the model is an encoder-decoder, and the loss shifts labels as for a causal model; accepted are "
            "use_pdl_linear_loss, pdl_compute_loss, and pdl_loss_function(..., encoder_decoder=True) for models that "
            "call it"
        )

    def why_not_called(self, model: Any) -> str:
        if hasattr(model, "get_base_model") and "loss_function" in vars(model):
            return "it is the loss_function of the adapter; accepted is model.get_base_model().loss_function = ..."
        if getattr(model, "loss_function", self) is not self:
            return "model.loss_function is another one by now"
        return (
            "the model does not call its loss_function: T5, BART and their kind compute their loss themselves "
            "(use_pdl_linear_loss and pdl_compute_loss are for them), TRL's trainers score tokens in a head of their "
            "own (pdl_kernels.integrations.trl), and compute_loss_func keeps labels from the model"
        )


class ComputeLoss(TrainingLoss):
    """What `pdl_compute_loss` makes; `Trainer(compute_loss_func=...)` takes it."""

    def __init__(self, weights: Any, encoder_decoder: bool | None, options: dict[str, Any]) -> None:
        super().__init__(weights, **options)
        self.encoder_decoder = encoder_decoder

    def __call__(
        self,
        outputs: Any,  # of the model, with logits (B, L, V)
        labels: Tensor | None,  # (B, L)
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        if labels is None:
            raise ValueError("labels are missing in the batch; accepted are batches with labels, (B, L) class indices")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        found = "encoder_last_hidden_state" in outputs if isinstance(outputs, dict) else self.encoder_decoder
        encoder_decoder = found if self.encoder_decoder is None else self.encoder_decoder
        if found is not None and encoder_decoder != found:
            kind = "an encoder-decoder model" if found else "a causal model"
            raise ValueError(f"encoder_decoder is {encoder_decoder}, and the outputs are of {kind}; leave it out")
        targets, _ = self.targets(labels, None, None, None, shift=not encoder_decoder)
        return self.of_logits(logits, targets, None, num_items_in_batch)

    def problem_of(self, arguments: Any, model: Any) -> str | None:
        return super().problem_of(arguments, model) or _masked_problem(model)

    def why_not_called(self, model: Any) -> str:
        return "it is not the Trainer's compute_loss_func, or a subclass overrides compute_loss"


def _masked_problem(model: Any) -> str | None:
    if getattr(model, "loss_type", None) != "ForMaskedLM":
        return None
    return (
        f"{type(model).__name__} predicts masked tokens, whose labels are not shifted as a causal model's are; "
        "accepted are use_pdl_linear_loss, and pdl_loss_function(..., encoder_decoder=True) for models that call it"
    )


def pdl_loss_function(
    weights: Tensor | str | os.PathLike[str] | None,
    *,
    encoder_decoder: bool = False,
    weighted_evaluation: bool = False,
    **options: Any,
) -> LossFunction:
    """PDL for `model.loss_function = pdl_loss_function(weights)`: Llama, Qwen, Gemma, Mistral, GPT-2 and their kind.

        L = sum_i w(y_i) u_i ce_i / n

    n is `num_items_in_batch`, which the Trainer counts over all micro-batches and processes of a step, or else the
    number of targets of the call. It runs on the logits as the model made them, softcap and scale included, in their
    dtype. Where gradients are off it is plain cross entropy.

    T5, BART and their kind compute their loss themselves and never call this: `pdl_compute_loss` and
    `use_pdl_linear_loss` are for them. TRL never calls it either: see `pdl_kernels.integrations.trl`. `PDLCallback`
    finds out that a hook is not called.

    Args:
        weights: (V,) floating, V the width of the logits; a file of `pdl-kernels weights`; a checkpoint of
            `PDLCallback`; None for plain cross entropy.
        encoder_decoder: labels are targets already (T5Gemma, and models of masked tokens); otherwise position i
            predicts label i + 1.
        weighted_evaluation: use the weights where gradients are off, too.
        options: of `pdl_cross_entropy`, such as `label_smoothing`, `z_loss`, `inplace`; no `reduction`, `normalizer`,
            `return_stats`.

    A batch may hold `token_weights` (B, L), one factor for each label, any sign: see `TokenWeightsCollator`.

    Raises:
        ValueError, TypeError: options and weights that are not accepted; at the first call, weights of another length
            than the logits' width.

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """
    warn_if_untested("transformers")
    return LossFunction(weights, encoder_decoder, {"weighted_evaluation": weighted_evaluation, **options})


def pdl_compute_loss(
    weights: Tensor | str | os.PathLike[str] | None,
    *,
    encoder_decoder: bool | None = None,
    weighted_evaluation: bool = False,
    **options: Any,
) -> ComputeLoss:
    """PDL for `Trainer(compute_loss_func=pdl_compute_loss(weights))`, for causal and for encoder-decoder models.

    The formula, the denominator and the arguments are those of `pdl_loss_function`. Under mixed precision the Trainer
    hands it float32 copies of the logits: where `pdl_loss_function` or `use_pdl_linear_loss` work, they take less
    memory. An encoder-decoder model needs `DataCollatorForSeq2Seq(tokenizer, model=model)`, which makes
    `decoder_input_ids`: the labels do not reach the model.

    Args:
        encoder_decoder: whether labels are targets already, as for T5 and BART; None: what the model's outputs say.

    Raises:
        As `pdl_loss_function`; ValueError: a batch without labels; `encoder_decoder` other than the outputs say.

    Token weights do not come this way: the Trainer passes labels alone.
    """
    warn_if_untested("transformers")
    return ComputeLoss(weights, encoder_decoder, {"weighted_evaluation": weighted_evaluation, **options})
