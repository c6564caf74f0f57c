"""Lightning: a mixin that trains a LightningModule with PDL, exact over micro-batches and processes."""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_kernels.integrations.training_loss import TrainingLoss
from pdl_kernels.integrations.versions import warn_if_untested

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
else:
    LightningModule = object  # lightning is imported when a model is made

CHECKPOINT_KEY = "pdl_weights"


class PDLLightningMixin(LightningModule):
    """Trains a LightningModule with PDL: `class Model(PDLLightningMixin, lightning.LightningModule)`.

        L = sum_i w(y_i) u_i ce_i / n          n: the number of targets of the whole optimizer step

    n is counted over all processes and all micro-batches of `Trainer(accumulate_grad_batches=...)`, few as they may be
    at the end of an epoch: how a step is cut changes nothing but rounding. Each micro-batch adds the gradient of its
    sum. When Lightning is about to clip gradients and to step, they are divided by n. Accumulation, clipping,
    schedulers and precision are Lightning's own:

        class Model(PDLLightningMixin, lightning.LightningModule):
            def __init__(self, network, weights):
                super().__init__()
                self.network = network
                self.configure_pdl(weights)

            def logits_of(self, batch):
                return self.network(batch["input_ids"])  # (B, L, V)

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-4)

    A batch is a mapping with `labels` (B, L), -100 where there is no target, and perhaps `token_weights` (B, L), one
    factor u for each label, any sign: override `targets_of` for others, and `loss_of` for other ways to a loss. A
    transformers model that trains without logits, `self.configure_pdl(use_pdl_linear_loss(self.network, weights))`,
    needs no `logits_of`.

    Logged are "train_loss" of each step, and every `log_every_n_steps` steps, over all their targets, "train_nll"
    (unweighted, in nats), "train_perplexity", "train_accuracy", "train_mean_weight" and "train_effective_sample_share",
    as in `PDLCallback`. "val_loss" is the unweighted mean over all targets
    of all processes; rows that a DistributedSampler repeats, to give each process as many, count again. Checkpoints
    keep the weights. Hooks that a model overrides have to call `super()`.

    Cost: one multiplication of the gradients, and one reduction of two numbers over the processes, for each step.

    Raises, in training:
        RuntimeError: `configure_pdl` was not called; a hook of the mixin was overridden without `super()`.
        ValueError: manual optimization; a strategy that accumulates gradients by itself (DeepSpeed); processes with
            different numbers of batches, as far as loaders know them; a checkpoint of other weights.

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """

    pdl_loss: TrainingLoss | None = None
    _pdl_shift = True
    _pdl_unit = 0.0  # stands for n until it is known: a power of two, which rounds nothing
    _pdl_micro_batches = 0  # of this step
    _pdl_step: Tensor | None = None  # (2,) sum of the losses and number of targets of this step, in this process
    _pdl_validation: Tensor  # (loaders, 2) the same of this validation

    def configure_pdl(
        self, weights: Tensor | str | os.PathLike[str] | TrainingLoss | None, *, shift: bool = True, **options: Any
    ) -> None:
        """Say which loss trains the model; to be called in `__init__`.

        Args:
            weights: (V,) floating, one weight per column of the logits; a file of `pdl-kernels weights`; None for plain
                cross entropy; what `use_pdl_linear_loss` returned, which knows the rest.
            shift: position i predicts label i + 1, as in causal models; False: labels are targets already.
            options: of `pdl_cross_entropy`, such as `label_smoothing`, and `weighted_evaluation`; no `reduction`,
                `normalizer`, `return_stats`.

        Raises:
            TypeError: a class that does not name the mixin before LightningModule.
            TypeError, ValueError: weights and options that are not accepted.
        """
        from lightning.pytorch import LightningModule

        warn_if_untested("lightning")
        bases = type(self).__mro__
        if LightningModule not in bases or bases.index(LightningModule) < bases.index(PDLLightningMixin):
            raise TypeError(
                f"{type(self).__name__} has the bases {type(self).__bases__}; accepted is the mixin before Lightning's "
                "class: class Model(PDLLightningMixin, lightning.LightningModule)"
            )
        self._pdl_shift = shift
        if not isinstance(weights, TrainingLoss):
            self.pdl_loss = TrainingLoss(weights, **options)
            return
        if options or not shift:
            given = ", ".join([*options, *["shift"] * (not shift)])
            raise ValueError(f"{given} given beside a finished loss; accepted are arguments of use_pdl_linear_loss")
        self.pdl_loss = weights
        self._pdl_shift = not getattr(weights, "encoder_decoder", False)

    def logits_of(self, batch: Any) -> Tensor:
        """(B, L, V) logits of a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no logits_of; accepted is one that returns (B, L, V)")

    def targets_of(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """(B, L) targets and token weights of a batch, position by position of the logits."""
        names = ("labels", "shift_labels", "token_weights", "shift_token_weights")
        return self._loss().targets(*(batch.get(name) for name in names), shift=self._pdl_shift)

    def loss_of(self, batch: Any, count: float) -> Tensor:
        """The sum of the losses of a batch's targets, divided by `count`: 0-d.

        Override it, for instance, to train a model of your own without logits:

            targets, token_weights = self.targets_of(batch)
            return self.pdl_loss.of_hidden(self.hidden_of(batch), self.head.weight, targets, token_weights, count)
        """
        loss: Any = self._loss()
        if hasattr(loss, "model"):  # of use_pdl_linear_loss: the model calls it
            outputs = loss.model(**batch, num_items_in_batch=count, skip_logits=True)
            if outputs.get("aux_loss") is not None:
                raise ValueError(
                    f"{type(loss.model).__name__} adds a router loss, which is no sum over targets; accepted is "
                    "output_router_logits=False"
                )
            mean: Tensor = outputs.loss
        else:
            mean = loss.of_logits(self.logits_of(batch), *self.targets_of(batch), count)
        return mean

    def on_train_start(self) -> None:
        super().on_train_start()
        trainer, loss = self.trainer, self._loss()
        if not self.automatic_optimization:
            raise ValueError("automatic_optimization is False; accepted is True: the mixin has Lightning step")
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"the strategy is {type(trainer.strategy).__name__}, which accumulates gradients by itself; accepted "
                "are those that leave it to Lightning, such as 'ddp'"
            )
        batches = self.all_gather(torch.tensor(float(trainer.num_training_batches))).flatten().tolist()
        if len(set(batches)) > 1:
            raise ValueError(
                f"the processes have {batches} batches of training data, and would wait for each other for ever; "
                "accepted are as many for each, as a DistributedSampler gives them"
            )
        self._pdl_unit = 0.0
        self._pdl_step = self._sums(2)
        self._pdl_micro_batches = 0
        loss.keep_record()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        trainer, loss = self.trainer, self._loss()
        if self._pdl_step is None or self._pdl_micro_batches >= trainer.accumulate_grad_batches:
            raise RuntimeError(
                "on_train_start or on_before_optimizer_step did not reach the mixin, which divides the gradients by "
                "the number of targets; accepted are overrides that call super()"
            )
        count = self.targets_of(batch)[0].ne(loss.ignore_index).sum()
        if not self._pdl_unit:
            targets = float(_over_processes(count)) * trainer.accumulate_grad_batches
            self._pdl_unit = 2.0 ** round(math.log2(max(targets, 1)))
        mean = self.loss_of(batch, self._pdl_unit)
        self._pdl_step += _pair(mean.detach() * self._pdl_unit, count, self._pdl_step)
        self._pdl_micro_batches += 1
        # Lightning divides by the number of micro-batches, and the average over processes by theirs.
        return mean * (trainer.accumulate_grad_batches * trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients, which are sums over targets, by n. Callbacks' hooks come before it, clipping after."""
        assert self._pdl_step is not None
        total, targets = _over_processes(self._pdl_step)
        targets = targets.clamp(min=1)
        scale = self._pdl_unit / targets
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale.to(parameter.grad.device))
        self._pdl_step = self._sums(2)
        self._pdl_micro_batches = 0
        self.log("train_loss", total / targets, prog_bar=True)
        every = self.trainer.log_every_n_steps
        if every and (self.trainer.global_step + 1) % every == 0:  # reading a record waits for the device
            numbers = self._loss().take_record().statistics()
            self.log_dict({f"train_{name}": number for name, number in numbers.items()})
        super().on_before_optimizer_step(optimizer)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._pdl_validation = self._sums(len(self.trainer.num_val_batches), 2)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        count = self.targets_of(batch)[0].ne(self._loss().ignore_index).sum()
        self._pdl_validation[dataloader_idx] += _pair(self.loss_of(batch, 1.0), count, self._pdl_validation)

    def on_validation_epoch_end(self) -> None:
        loaders = _over_processes(self._pdl_validation)
        for number, (total, targets) in enumerate(loaders):
            name = "val_loss" if len(loaders) == 1 else f"val_loss/dataloader_idx_{number}"
            self.log(name, total / targets, prog_bar=True, sync_dist=True, add_dataloader_idx=False)
        super().on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] = self._loss().table

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self.trainer.state.fn != "fit":  # validation takes no weights
            return
        table = self._loss().table
        if CHECKPOINT_KEY not in checkpoint:
            warnings.warn("whether training began with these weights, the checkpoint does not say", stacklevel=2)
            return
        saved = checkpoint[CHECKPOINT_KEY]
        if saved is not table and (saved is None or table is None or not torch.equal(saved.cpu(), table)):
            raise ValueError(
                f"training goes on with {_described(table)}, and the checkpoint was made with {_described(saved)}; "
                "accepted are the same, which are in the checkpoint as 'pdl_weights'"
            )

    def _loss(self) -> TrainingLoss:
        if self.pdl_loss is None:
            raise RuntimeError("no loss is configured: call self.configure_pdl(weights) in __init__")
        return self.pdl_loss

    def _sums(self, *shape: int) -> Tensor:
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(shape, device=self.device, dtype=exact)


def _pair(total: Tensor, count: Tensor, like: Tensor) -> Tensor:
    """(2,) of two 0-d tensors."""
    return torch.stack([total.detach().to(like), count.to(like)])


def _over_processes(numbers: Tensor) -> Tensor:
    """Their sums over all processes, which every process has to ask for at once."""
    numbers = numbers.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def _described(table: Tensor | None) -> str:
    return "no weights" if table is None else f"{len(table)} weights of mean {float(table.mean()):g}"
