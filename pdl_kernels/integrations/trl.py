"""TRL's SFTTrainer with PDL, through its own fused output layer."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from pdl_kernels.data.batches import RowName
from pdl_kernels.data.chats import ChatTemplate
from pdl_kernels.data.token_weights import has_message_weights, holds_factors, join, message_factors
from pdl_kernels.integrations.token_weights import split_batch
from pdl_kernels.integrations.training_loss import TrainingLoss
from pdl_kernels.integrations.transformers.callback import PDLCallback
from pdl_kernels.integrations.versions import warn_if_untested
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.schedule import WeightSchedule
from pdl_kernels.weights.weighting import Weighting

MESSAGES = "messages"  # the value of `token_weights` that means the `weight` of chat messages
LOOKED_AT = 100  # rows, for weights that nobody uses, and for those that are in the labels already
COMPARED_LOSSES = 3  # of training, and as many of evaluation: TRL's sum is compared with what it has to be


class FusedHeadLoss(TrainingLoss):
    """PDL on the log-probabilities that TRL's fused output layer finds."""

    needs_token_weights = False  # every batch has them
    width = 0  # of the output layer; 0: not known

    def why_not_called(self, model: Any) -> str:
        return "the model's forward was replaced, or TRL does not call it with fused_lm_head=True any more"

    def weigh(self, outputs: Any, labels: Tensor | None, shift_labels: Tensor | None, factors: Tensor | None) -> Any:
        """Multiply the log-probability of each target by its weight; -log_probs is what TRL sums up."""
        targets = labels[:, 1:] if shift_labels is None and labels is not None else shift_labels  # (B, L)
        log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
        if (
            not isinstance(log_probs, Tensor)
            or not isinstance(mask, Tensor)
            or targets is None
            or not log_probs.shape == mask.shape == targets.shape
        ):
            raise RuntimeError(
                "TRL's fused output layer returned no log_probs and label_mask of its targets' shape; accepted is what "
                "TRL 1.16 returns: install that version, or report this"
            )
        if factors is not None and shift_labels is not None:
            raise ValueError("token_weights are given beside shift_labels, which are shifted already; accepted is one")
        if factors is not None and factors[:, 1:].shape != log_probs.shape:
            raise ValueError(
                f"token_weights have shape {tuple(factors.shape)} where the model has {log_probs.shape[1] + 1} tokens "
                "in a row; accepted are models that add none, as prompt tuning does"
            )
        if factors is None and self.needs_token_weights:
            raise RuntimeError(
                "the batches have token weights that did not reach the loss; accepted is the data_collator that the "
                "trainer made, whose token_weights go to the model"
            )
        training = torch.is_grad_enabled()
        if not training and not self.weighted_evaluation:
            return outputs
        targets = torch.where(mask, targets.to(log_probs.device), self.ignore_index)
        if factors is not None:
            factors = factors.to(log_probs.device)[:, 1:]  # (B, L)
        table = self.weights_on(log_probs.device)
        factor_of = log_probs.new_ones(1).expand(self.width) if table is None and self.width else table  # (V,)
        weighted = log_probs
        if factor_of is not None:
            weighted = weighted * factor_of[torch.where(mask, targets, 0)]  # IndexError where a label is no class
        if factors is not None:
            weighted = weighted * factors
        if training:
            counted = mask if factors is None else mask & factors.ne(0)
            number = counted.sum().clamp(min=1)
            nll = -torch.where(counted, log_probs.detach(), 0).sum() / number
            accuracy = torch.where(counted, outputs.is_top1, 0).sum() / number
            self.record(targets, table, factors, nll, accuracy)
            self.watch(weighted)
        outputs.log_probs = weighted
        outputs.loss = None  # the unweighted one, which nothing may take for ours
        return outputs


class PDLSFTMixin:
    """PDL for a trainer that derives from `SFTTrainer`: `class MyTrainer(PDLSFTMixin, MySFTTrainer)`.

        L = -sum_i w(y_i) u_i log p(y_i) / n

    TRL's fused output layer, which makes no logits, its metrics (entropy, mean_token_accuracy), masking, packing and
    padding-free batches stay what they are. Only the log-probabilities that it sums up are weighted. A `PDLCallback` is
    attached. Evaluation is unweighted.

    Args:
        weights: (V,), a file, a checkpoint or None, as in `pdl_loss_function`.
        counts, weighting, schedule: as in `PDLCallback`. `pdl-kernels count` and `TokenCounts.from_chats` count exactly
            what this trainer trains on.
        token_weights: factors u_i, of any sign: the name of a column with a number per example, or a list of one number
            per token of `input_ids`; "messages" for the `weight` of the assistant's messages in chats. They are masked,
            truncated and packed with the labels. Evaluation data may lack them.
        weighted_evaluation: use all weights in evaluation, too.

    Everything else goes to the trainer.

    Raises:
        ValueError: `loss_type` other than "nll", `compute_loss_func`, `label_smoothing_factor`, sequence parallelism of
            DeepSpeed, none of which sums up these log-probabilities; weights that do not fit; missing columns.
        RuntimeError: TRL works otherwise inside than the version that was tested.

    Attributes:
        pdl_loss, pdl_callback: the loss and the callback.
    """

    def __init__(
        self,
        *arguments: Any,
        weights: Tensor | str | os.PathLike[str] | None,
        counts: TokenCounts | None = None,
        weighting: Weighting | None = None,
        schedule: WeightSchedule | None = None,
        token_weights: str | None = None,
        weighted_evaluation: bool = False,
        **named: Any,
    ) -> None:
        warn_if_untested("trl")
        self.pdl_loss = FusedHeadLoss(weights, weighted_evaluation=weighted_evaluation)
        self._token_weights = token_weights
        self._weighted_sum: Tensor | None = None  # of the log-probabilities of the call under way
        self._compared = {True: 0, False: 0}  # losses of training and of evaluation
        super().__init__(*arguments, **named)
        self._check_arguments()
        self._weigh_the_fused_head()
        if token_weights is not None:
            if self._skip_prepare_dataset:  # type: ignore[attr-defined]
                raise ValueError(
                    "token_weights are given for data that the trainer does not prepare (images, or "
                    "skip_prepare_dataset); accepted is None"
                )
            collator: Callable[[list[Any]], Any] = self.data_collator  # type: ignore[has-type]
            self.data_collator = _SplittingCollator(collator)
            self.pdl_loss.needs_token_weights = True
        callback = PDLCallback(self.pdl_loss, counts=counts, weighting=weighting, schedule=schedule)
        self.pdl_callback = callback.attach(self)

    def _check_arguments(self) -> None:
        args: Any = self.args  # type: ignore[attr-defined]
        if self.compute_loss_func is not None:  # type: ignore[attr-defined]
            raise ValueError("compute_loss_func is given, which would take the place of PDL; accepted is None")
        if args.loss_type != "nll":
            raise ValueError(f"loss_type is {args.loss_type!r}; accepted is 'nll', whose log-probabilities PDL weighs")
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}; accepted is 0: TRL smooths labels in a loss "
                "of its own"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)  # type: ignore[attr-defined]
        if getattr(parallelism, "sp_enabled", False):
            raise ValueError("sequence parallelism of DeepSpeed takes the model's own loss; accepted is none of it")
        table, model = self.pdl_loss.table, self.model  # type: ignore[attr-defined]
        width = self.pdl_loss.width = len(model.get_output_embeddings().weight)
        if table is not None and width not in (len(table), 0):  # 0: ZeRO keeps it elsewhere
            raise ValueError(
                f"weights have shape {tuple(table.shape)}; accepted is ({width},), one per row of the model's output "
                "layer, which may be longer than the tokenizer"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # The loss

    def _weigh_the_fused_head(self) -> None:
        model: Any = self.model  # type: ignore[attr-defined]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        fused = base.__dict__.get("forward")
        if fused is None:
            raise RuntimeError(
                "SFTTrainer did not give the model a fused output layer; accepted is TRL as of 1.16: install that "
                "version, or report this"
            )

        @functools.wraps(fused)
        def forward(*arguments: Any, token_weights: Tensor | None = None, **named: Any) -> Any:
            outputs = fused(*arguments, **named)
            if not named.get("fused_lm_head"):
                return outputs
            outputs = self.pdl_loss.weigh(outputs, named.get("labels"), named.get("shift_labels"), token_weights)
            self._weighted_sum = outputs.log_probs.detach().sum()
            return outputs

        base.forward = forward

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        self._weighted_sum = None
        args: Any = self.args  # type: ignore[attr-defined]
        cut = args.gradient_accumulation_steps > 1 or args.world_size > 1
        if torch.is_grad_enabled() and cut and num_items_in_batch is None:
            raise RuntimeError(
                "num_items_in_batch is None, and a step has several micro-batches or processes; accepted is the number "
                "of targets of the whole step, as SFTTrainer counts it for batches with labels"
            )
        compute: Callable[..., Any] = super().compute_loss  # type: ignore[misc]
        found = compute(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        loss = found[0] if return_outputs else found
        if self._weighted_sum is None:
            raise RuntimeError(
                "TRL computed a loss without its fused output layer; accepted is TRL as of 1.16: install that version, "
                "or report this"
            )
        training = torch.is_grad_enabled()
        if self._compared[training] < COMPARED_LOSSES and not self.aux_loss_enabled:
            self._compared[training] += 1
            self._compare(loss.detach(), inputs, num_items_in_batch)
        return found

    def _compare(self, loss: Tensor, inputs: Any, count: Tensor | None) -> None:
        """RuntimeError where the loss is not the sum of the weighted log-probabilities, divided as it has to be."""
        assert self._weighted_sum is not None
        processes = 1
        if count is None:
            labels = inputs["shift_labels"] if inputs.get("shift_labels") is not None else inputs["labels"][:, 1:]
            count = labels.ne(-100).sum()
        elif self.args.average_tokens_across_devices:  # type: ignore[attr-defined]
            processes = self.accelerator.num_processes // self.get_tp_size()  # type: ignore[attr-defined]
        expected = -self._weighted_sum * processes / torch.as_tensor(count, device=loss.device).clamp(min=1)
        if not torch.allclose(loss.float(), expected.float(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise RuntimeError(
                f"TRL's loss is {loss.item():g}, and the weighted log-probabilities give {expected.item():g}: TRL "
                "works otherwise inside than as of 1.16: install that version, or report this"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Token weights

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        prepare: Callable[..., Any] = super()._prepare_dataset  # type: ignore[misc]
        prepared_before = _holds_factors(dataset)
        if self._token_weights is None:
            if prepared_before:
                raise ValueError(
                    f"the labels of the {dataset_name} data have token weights inside, from a trainer with "
                    "token_weights; accepted are data that were not prepared, or token_weights here, too"
                )
            if dataset_name == "train" and any(map(has_message_weights, islice(dataset, LOOKED_AT))):
                warnings.warn(
                    "messages have a weight, which is not used; accepted is token_weights='messages', or none of them",
                    stacklevel=2,
                )
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if prepared_before:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # First the labels of whole rows; then, with their weights inside, what cuts, packs and shuffles them.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        labelled = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        joined = labelled.map(self._joiner(labelled, processing_class, dataset_name))
        return prepare(joined, processing_class, args, packing, None, dataset_name)

    def _joiner(self, dataset: Any, tokenizer: Any, name: str) -> Callable[[Any], dict[str, Any]]:
        """A function of a row with `input_ids` and `labels`: its labels with the weights inside."""
        column: Any = self._token_weights
        if column == MESSAGES:
            template = ChatTemplate(tokenizer, None, assistant_only=True, roles=None)
            return functools.partial(_join_messages, template=template, name=name)
        columns: Any = next(iter(dataset), {})
        if column in columns:
            return lambda row: {"labels": join(row["labels"], row.get(column), f"{column} of a row of {name}").tolist()}
        if name == "train" and columns:
            raise ValueError(
                f"token_weights is {column!r}, which is no column of the data; accepted are {', '.join(columns)}, and "
                f"{MESSAGES!r} for the weight of chat messages"
            )
        return functools.partial(_join_ones, column=column, name=name)


def _join_ones(row: Any, column: str, name: str) -> dict[str, Any]:
    if column in row:
        raise ValueError(f"{column} of a row of {name} is {row[column]!r}, and the first row has none; accepted is one")
    return {"labels": join(row["labels"], 1.0, "").tolist()}


def _holds_factors(dataset: Any) -> bool:
    """Whether token weights are in the labels already."""
    rows = (row.get("labels") for row in islice(dataset, LOOKED_AT))
    return any(holds_factors(labels) for labels in rows if labels is not None)


def _join_messages(row: Any, template: ChatTemplate, name: str) -> dict[str, Any]:
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    where = RowName(lambda _: f"a row of {name}", 0)
    ids, factors = message_factors(row, messages, template, where)
    if list(ids) != list(row["input_ids"]):
        raise ValueError(
            f"{where}: the template with generation markers makes other ids than the trainer's; accepted is a "
            "template with {% generation %} markers, or assistant_only_loss=True"
        )
    return {"labels": join(row["labels"], factors, f"weights of the messages of {where}").tolist()}


class _SplittingCollator:
    """The trainer's collator, whose labels have weights inside."""

    makes_token_weights = True

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        return split_batch(self.collator(examples), examples, self.collator)


class PDLSFTTrainer(PDLSFTMixin, SFTTrainer):
    """`SFTTrainer` with PDL: see `PDLSFTMixin`.

    `PDLSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, weights="weights.safetensors")`
    """
