"""What watches over a training run: that PDL trains the model, what it does, and what a checkpoint has to hold."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pdl_kernels.integrations.training_loss import WEIGHTS_FILE, Record, TrainingLoss
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.saved import save_weights
from pdl_kernels.weights.schedule import WeightSchedule
from pdl_kernels.weights.weighting import Weighting

COUNTS_FILE = "pdl_counts.safetensors"
REMEMBERED = "pdl_weights"  # under this name the state of the Trainer, which is in each checkpoint, knows the weights
FIRST_STEPS = 3  # each of them is checked
CHECK_EVERY = 5  # steps, from then on
MANY_NEVER_COUNTED = 0.1  # share of the targets: a rule of thumb, not the result of a measurement


class PDLCallback(TrainerCallback):
    """Checks that PDL trains the model, logs what it does, applies a schedule, and keeps weights with the checkpoints.

    `Trainer(..., callbacks=[PDLCallback(loss)])`, or, for TensorBoard, Weights & Biases and other reporters to get its
    numbers, too, `PDLCallback(loss).attach(trainer)`: a callback in the list comes after them.

    * After each of the first three steps, every fifth one, those that are logged and the last one it raises
      `RuntimeError` where the loss was not called for every micro-batch, was computed and dropped, was not given the
      number of targets of the whole step, lost token weights on the way, or has other weights than it was given.
    * It logs, with the Trainer's "loss" and over the same steps and all processes: "nll" (unweighted, in nats per
      target) and "perplexity", "accuracy", "mean_weight" of a target, and "effective_sample_share",
      (sum w)^2 / (n sum w^2): what share of the targets would carry as much information if all weighed the same.
    * It writes pdl_weights.safetensors, with the recipe, and pdl_counts.safetensors into every checkpoint. Training
      that is resumed with other weights is an error.

    Args:
        loss: what `pdl_loss_function`, `pdl_compute_loss` or `use_pdl_linear_loss` returned, or `trainer.pdl_loss`.
        counts: of the training targets, to be kept with the checkpoints and held against what is trained on.
        weighting: the recipe of the weights; None: the one in their file.
        schedule: weights that grow during training. The loss starts from `schedule.weights_at(0)`.

    Raises:
        ValueError: when training starts, arguments of the Trainer that would take the loss's place, weights that do not
            fit the model or the counts, another schedule than the loss's weights, a checkpoint with other weights.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        *,
        counts: TokenCounts | None = None,
        weighting: Weighting | None = None,
        schedule: WeightSchedule | None = None,
    ) -> None:
        if not isinstance(loss, TrainingLoss):
            raise TypeError(
                f"loss is a {type(loss).__name__}; accepted is what pdl_loss_function, pdl_compute_loss or "
                "use_pdl_linear_loss returned"
            )
        self.loss = loss
        self.counts = counts
        self.weighting = weighting
        if weighting is None and loss.saved is not None:
            self.weighting = loss.saved.weighting
        self.schedule = schedule
        if schedule is not None and (loss.table is None or schedule.table.shape != loss.table.shape):
            raise ValueError("schedule is given for a loss with other weights; accepted is one of the loss's own table")
        # The table of the end, which checkpoints keep.
        final = loss.table if schedule is None else schedule.table
        self.table = None if final is None else final.detach().float().cpu().clone()
        if counts is not None and self.table is not None and counts.vocab_size > len(self.table):
            raise ValueError(f"counts are of {counts.vocab_size} classes and the weights of {len(self.table)}")
        self._first_step = 0
        self._checked = (0.0, 0, 0)  # calls, forwards and backwards at the last check
        self._micro_batches = 0  # since then
        self._uncounted = 0  # of the loss, when training began
        self._warned = False
        self._attached = False

    def attach(self, trainer: Trainer) -> PDLCallback:
        """Join the callbacks of this Trainer in front of those that report its logs; returns self."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        trainer.add_callback(self)
        callbacks.insert(1, callbacks.pop())  # the first one decides whether a step is logged
        self._attached = True
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # Before the first step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, tokenizer = kwargs.get("model"), kwargs.get("processing_class")
        self._check_arguments(args, model)
        self._check_tokenizer(tokenizer)
        reporters = [name for name in args.report_to or () if name != "none"]
        if reporters and not self._attached:
            warnings.warn(
                f"{', '.join(reporters)} report before this callback and miss its numbers: leave it out of "
                "callbacks=[...] and call PDLCallback(...).attach(trainer)",
                stacklevel=2,
            )
        if state.global_step > 0:
            self._check_checkpoint(state)
        state.stateful_callbacks[REMEMBERED] = {"sha256": _digest(self.table)}
        self._first_step = state.global_step
        self._apply_schedule(state.global_step)
        seen = None
        if self.counts is not None and self.table is not None:
            seen = torch.zeros(len(self.table), dtype=torch.bool)
            seen[: self.counts.vocab_size] = self.counts.counts > 0
        self.loss.keep_record(seen)
        self._checked = (0.0, self.loss.forwards, self.loss.backwards)
        self._micro_batches = 0
        self._uncounted = self.loss.uncounted

    def _check_arguments(self, args: TrainingArguments, model: Any) -> None:
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor} in the training arguments, where it has the "
                "Trainer smooth labels in a loss of its own, or is ignored; accepted is 0: give label_smoothing to "
                f"the PDL loss ({type(self.loss).__name__}) instead"
            )
        problem = self.loss.problem_of(args, model)
        if problem is not None:
            raise ValueError(problem)
        config = getattr(model, "config", None)
        width = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
        if self.table is not None and isinstance(width, int) and width != len(self.table):
            raise ValueError(
                f"weights have shape {tuple(self.table.shape)} and the model has {width} classes; accepted are as many "
                "weights as the output layer has rows, which may be more than the tokenizer has entries"
            )

    def _check_tokenizer(self, tokenizer: Any) -> None:
        if self.table is None or tokenizer is None or not hasattr(tokenizer, "__len__"):
            return
        if len(tokenizer) > len(self.table):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} entries and there are {len(self.table)} weights; accepted are "
                "weights made from counts of this tokenizer's ids"
            )
        facts = {} if self.loss.saved is None else self.loss.saved.facts
        counted = facts.get("tokenizer") if self.counts is None else self.counts.tokenizer
        name = getattr(tokenizer, "name_or_path", None)
        if counted and name and Path(counted).name != Path(name).name:
            warnings.warn(
                f"the counts are of the tokenizer {counted!r}, and training uses {name!r}: weights of other ids are "
                "weights of other words",
                stacklevel=2,
            )

    def _check_checkpoint(self, state: TrainerState) -> None:
        """Hold the weights against what the checkpoint remembers of its own."""
        remembered = state.stateful_callbacks.get(REMEMBERED)
        step = state.global_step
        if remembered is None:
            warnings.warn(
                f"training goes on at step {step}, and its checkpoint was not written with PDLCallback: whether it "
                "began with these weights cannot be told",
                stacklevel=2,
            )
        elif remembered["sha256"] != _digest(self.table):
            raise ValueError(
                f"training goes on at step {step} with other weights than its checkpoint-{step} was written with; "
                "accepted are the same, which the checkpoint holds: pass its folder as weights; or start anew"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._apply_schedule(state.global_step)

    def _apply_schedule(self, step: int) -> None:
        if self.schedule is not None:
            self.loss.set_weights(self.schedule.weights_at(step))

    def _expected(self, step: int) -> Tensor | None:
        """The weights of this step."""
        return self.table if self.schedule is None else self.schedule.weights_at(step).cpu()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batches += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._micro_batches += 1
        steps = state.global_step - self._first_step  # that this process has trained
        if steps <= FIRST_STEPS or steps % CHECK_EVERY == 0:
            self._check(args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(args, state, **kwargs)

    def _check(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """RuntimeError where PDL did not train the model since the last check."""
        if not self._micro_batches:
            return
        record = self.loss.read_record()
        calls, forwards, backwards = self._checked
        micro_batches, self._micro_batches = self._micro_batches, 0
        self._checked = (record.calls, self.loss.forwards, self.loss.backwards)
        if record.calls == calls:
            why = self.loss.why_not_called(kwargs.get("model"))
            raise RuntimeError(f"PDL did not train the model in step {state.global_step}: {why}")
        if record.calls - calls < micro_batches:
            raise RuntimeError(
                f"PDL trained {record.calls - calls:.0f} of {micro_batches} micro-batches up to step "
                f"{state.global_step}: another loss trains the others"
            )
        if self.loss.uncounted > self._uncounted and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
            raise RuntimeError(
                "the loss was not given the number of targets of the whole step, and the gradient is not that of one "
                "big batch; accepted are batches with labels, which the Trainer counts (shift_labels alone are none), "
                "and, in an overridden compute_loss, model(**inputs, num_items_in_batch=num_items_in_batch)"
            )
        came_back = self.loss.backwards - backwards
        if self.loss.forwards > forwards and came_back < micro_batches:
            raise RuntimeError(
                f"PDL was computed up to step {state.global_step}, and for {micro_batches - came_back} of "
                f"{micro_batches} micro-batches its gradient never came back: another loss trains the model; look for "
                "an overridden compute_loss or training_step"
            )
        if not self.loss.uses(self._expected(state.global_step - 1)):
            raise RuntimeError(
                f"the loss had other weights in step {state.global_step} than it was given: something called "
                "set_weights, or wrote to its table"
            )
        collator = getattr(kwargs.get("train_dataloader"), "collate_fn", None)
        collator = getattr(collator, "data_collator", collator)  # the Trainer wraps it to drop columns
        if getattr(collator, "makes_token_weights", False) and record.with_token_weights < record.calls:
            raise RuntimeError(
                "the batches have token weights that did not reach the loss; accepted are pdl_loss_function and "
                "use_pdl_linear_loss, whose models pass them on: compute_loss_func gets labels alone"
            )
        self._warn_of_targets_never_counted(record)

    def _warn_of_targets_never_counted(self, record: Record) -> None:
        if record.targets and record.never_counted > MANY_NEVER_COUNTED * record.targets and not self._warned:
            self._warned = True
            warnings.warn(
                f"{record.never_counted / record.targets:.0%} of the targets are of types that the counts do not hold: "
                "they are counts of another tokenizer, other data, or other masking",
                stacklevel=2,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        self._check(args, state, **kwargs)  # the record begins anew
        numbers = self.loss.take_record().statistics()
        self._checked = (0.0, self.loss.forwards, self.loss.backwards)
        logs.update(numbers)
        state.log_history[-1].update(numbers)

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():  # of a hyperparameter search
            return
        if self.table is not None:
            save_weights(folder / WEIGHTS_FILE, self.table, self.weighting, self.counts)
        if self.counts is not None:
            self.counts.save(folder / COUNTS_FILE)


def _digest(table: Tensor | None) -> str:
    """What tells tables from each other."""
    return "none" if table is None else hashlib.sha256(table.numpy().tobytes()).hexdigest()
