"""PDLCallback in a run of the Trainer: it stops where PDL does not train the model, and nowhere else."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from helpers.trainer_callbacks import (
    EAGER,
    ROWS,
    After,
    begin,
    logs_of,
    plain_compute_loss,
    watched,
    with_another_hook,
    without_hook,
)
from helpers.trainer_models import big_batch_gradients, collate, make_model, relative_error, transformers
from helpers.trainer_runs import W, by_compute_loss, by_linear_loss, by_loss_function, each_route

pytestmark = pytest.mark.usefixtures("quick")
LIMIT = 5  # steps until it is noticed
REMOVED_AFTER = (1, 4, 6, 9)
GONE = "PDL (did not train the model in step|trained .* micro-batches up to step)"
STEPS = max(REMOVED_AFTER) + LIMIT + 1


def stops(trainer, changed_after, words):
    """The Trainer stops by this error within ten steps of the change."""
    with pytest.raises(RuntimeError, match=words):
        trainer.train()
    assert changed_after < trainer.state.global_step <= changed_after + LIMIT


def changed(folder, route, after, change, settings=None):
    """A trainer in which what `change(route, trainer, loss)` makes is called after some steps."""
    trainer, loss, _ = watched(folder, route, settings={"max_steps": STEPS} | (settings or {}))
    trainer.add_callback(After(after, change(route, trainer, loss)))
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# The hook is gone


each_cut = pytest.mark.parametrize("accumulate", [1, 3])
each_logging = pytest.mark.parametrize("logging_steps", [1, 4, 100])


@each_route
@each_cut
@each_logging
def test_the_hook_is_removed(logging_steps, accumulate, route, tmp_path):
    settings = {"logging_steps": logging_steps, "gradient_accumulation_steps": accumulate}
    for after in REMOVED_AFTER:
        trainer = changed(tmp_path, route, after, without_hook, settings)
        stops(trainer, after, GONE)


@each_route
def test_the_hook_is_replaced(route, tmp_path):
    for after in REMOVED_AFTER:
        stops(changed(tmp_path, route, after, with_another_hook), after, GONE)


@each_route
@pytest.mark.parametrize(("steps", "after", "logging_steps"), [(4, 3, 100), (9, 5, 100), (12, 10, 100), (9, 7, 1)])
def test_the_last_steps_are_checked(steps, after, logging_steps, route, tmp_path):
    settings = {"max_steps": steps, "logging_steps": logging_steps}
    with pytest.raises(RuntimeError, match=GONE):
        changed(tmp_path, route, after, without_hook, settings).train()


@each_route
@each_cut
@each_logging
def test_nothing_is_removed(logging_steps, accumulate, route, tmp_path):
    settings = {"logging_steps": logging_steps, "gradient_accumulation_steps": accumulate, "max_steps": STEPS}
    trainer, loss, gradients = watched(tmp_path, route, settings=settings)
    trainer.train()
    assert len(gradients) == STEPS
    assert loss.forwards == loss.backwards > 0
    assert len(logs_of(trainer)) == STEPS // logging_steps


REASONS = {
    by_loss_function: "model.loss_function is another one by now",
    by_compute_loss: "it is not the Trainer's compute_loss_func, or a subclass overrides compute_loss",
    by_linear_loss: r"\.undo\(\) was called, the model's forward or output layer was replaced",
}


@pytest.mark.parametrize(("route", "words"), REASONS.items())
def test_the_hook_was_never_there(route, words, tmp_path):
    """The first step stops, and says what may be the reason."""
    trainer, loss, _ = watched(tmp_path, route)
    without_hook(route, trainer, loss)()
    with pytest.raises(RuntimeError, match=f"PDL did not train the model in step 1: .*{words}"):
        trainer.train()


def test_the_forward_is_replaced_by_the_models_own(tmp_path):
    """As other libraries do that bring a forward of their own."""
    trainer, *_ = watched(tmp_path, by_linear_loss)
    trainer.model.forward = type(trainer.model).forward.__get__(trainer.model)
    with pytest.raises(RuntimeError, match="the model's forward or output layer was replaced"):
        trainer.train()


def test_a_model_that_does_not_call_its_loss_function(tmp_path):
    """BERT computes its loss itself, as T5 and BART do."""
    config = transformers.BertConfig(vocab_size=len(W), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.intermediate_size = 16
    trainer, *_ = watched(
        tmp_path, by_loss_function, model=transformers.BertForMaskedLM(config), options={"encoder_decoder": True}
    )
    with pytest.raises(RuntimeError, match="the model does not call its loss_function: T5, BART"):
        trainer.train()


def test_a_loss_function_of_an_adapter(tmp_path):
    """The model inside does not know of it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")

    def adapted():
        return peft.get_peft_model(make_model("llama"), config)

    trainer, *_ = watched(tmp_path, by_loss_function, model=adapted())
    with pytest.raises(RuntimeError, match=r"accepted is model.get_base_model\(\).loss_function = "):
        trainer.train()

    def inside(model, weights, **options):
        return by_loss_function(model.get_base_model(), weights, **options)

    trainer, _, gradients = watched(tmp_path, inside, model=adapted())
    trainer.train()
    assert len(gradients) == 10


# ---------------------------------------------------------------------------------------------------------------------
# The hook is there, and something else trains


class Dropped(transformers.Trainer):
    """Calls the loss of PDL, and trains with plain cross entropy; from `dropped_after` steps on."""

    dropped_after = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, dict(inputs), False, num_items_in_batch)
        if self.state.global_step < self.dropped_after:
            return loss
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return plain_compute_loss(logits, inputs["labels"], num_items_in_batch)


@each_route
@each_cut
@pytest.mark.parametrize("after", [0, 4, 6])
def test_the_loss_is_computed_and_dropped(after, accumulate, route, tmp_path):
    settings = {"gradient_accumulation_steps": accumulate, "max_steps": STEPS}
    trainer, *_ = watched(tmp_path, route, kind=Dropped, settings=settings)
    trainer.dropped_after = after
    stops(trainer, after, "its gradient never came back: another loss trains the model")


class DroppedInParts(Dropped):
    """Trains every second micro-batch with plain cross entropy."""

    micro_batches = 0

    def compute_loss(self, *arguments, **named):
        self.micro_batches += 1
        self.dropped_after = 0 if self.micro_batches % 2 else len(ROWS) * STEPS
        return super().compute_loss(*arguments, **named)


@each_route
def test_the_loss_of_some_micro_batches_is_dropped(route, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_steps": STEPS}
    trainer, *_ = watched(tmp_path, route, kind=DroppedInParts, settings=settings)
    stops(trainer, 0, "its gradient never came back|another loss trains")


CHANGES = {
    "set_weights": lambda loss: loss.set_weights(torch.ones(len(W))),
    "a write to its table": lambda loss: loss.table.fill_(1),
    "no weights": lambda loss: setattr(loss, "table", None),
}


@each_route
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_weights_are_changed(change, route, tmp_path):
    for after in (0, 2, 6):
        trainer = changed(tmp_path, route, after, lambda route, trainer, loss: lambda: change(loss))
        stops(trainer, after, "the loss had other weights in step .* than it was given")


class OnlyTheFirst(transformers.TrainerCallback):
    """Has PDL train the first micro-batch of each step, and plain cross entropy the others."""

    def __init__(self):
        self.loss = self.model = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.loss_function = self.loss = self.loss or model.loss_function

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        model.loss_function = transformers.loss.loss_utils.ForCausalLMLoss


def test_some_micro_batches_train_with_pdl(tmp_path):
    settings = {"gradient_accumulation_steps": 3}
    trainer, *_ = watched(tmp_path, by_loss_function, settings=settings, callbacks=[OnlyTheFirst()])
    stops(trainer, 0, "PDL trained 1 of 3 micro-batches up to step 1: another loss trains the others")


# ---------------------------------------------------------------------------------------------------------------------
# The number of targets of the whole step


class Alone(transformers.Trainer):
    """Calls the model without the number of targets, as many subclasses do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def shifted(rows):
    """Batches whose labels are shifted already, which the Trainer does not count."""
    batch = collate(rows)
    batch["shift_labels"] = F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    return batch


UNCOUNTED = {
    "compute_loss, loss_function": (by_loss_function, {"kind": Alone}),
    "compute_loss, linear": (by_linear_loss, {"kind": Alone}),
    "shift_labels, linear": (by_linear_loss, {"data_collator": shifted}),
}
each_uncounted = pytest.mark.parametrize(("route", "more"), UNCOUNTED.values(), ids=UNCOUNTED)


@each_uncounted
def test_the_number_of_targets_is_missing(route, more, tmp_path):
    settings = {"gradient_accumulation_steps": 2}
    trainer, *_ = watched(tmp_path, route, settings=settings, **more)
    stops(trainer, 0, "the loss was not given the number of targets of the whole step.*num_items_in_batch")


@each_uncounted
def test_the_number_of_targets_of_one_micro_batch(route, more, tmp_path):
    """It is that of the step."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.0}
    trainer, _, gradients = watched(tmp_path, route, settings=settings, **more)
    trainer.train()
    model = make_model("llama", num_hidden_layers=1)
    for found, rows in zip(gradients, (ROWS[:4], ROWS[4:]), strict=True):
        assert relative_error(found, big_batch_gradients(model, rows, W)) < 1e-5


def test_it_is_missing_from_a_later_step_on(tmp_path):
    class Later(Alone):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            compute = super() if self.state.global_step >= 5 else super(Alone, self)
            return compute.compute_loss(model, inputs, return_outputs, num_items_in_batch)

    settings = {"gradient_accumulation_steps": 2, "max_steps": 20}
    trainer, *_ = watched(tmp_path, by_linear_loss, settings=settings, kind=Later)
    stops(trainer, 5, "the loss was not given the number of targets of the whole step")


@each_route
@pytest.mark.parametrize("processes", [1, 2])
def test_the_number_of_targets_of_one_process(processes, route):
    """It is not that of the step where there are others."""
    model = make_model("llama", num_hidden_layers=1)
    loss, _ = route(model, W, **EAGER)
    callback, called_with = begin(loss, world_size=processes)
    batch = collate(ROWS)
    outputs = model(**batch)
    (loss(outputs, batch["labels"]) if route is by_compute_loss else outputs.loss).backward()
    problem = pytest.raises(RuntimeError, match="not given the number of targets of the whole step")
    with problem if processes > 1 else contextlib.nullcontext():
        callback.on_step_end(*called_with)


def test_calls_before_training_do_not_count(tmp_path):
    """A loss of one's own beside the Trainer, without the number of targets, is no fault of the run."""
    settings = {"gradient_accumulation_steps": 2}
    trainer, loss, _ = watched(tmp_path, by_loss_function, settings=settings)
    loss.keep_record()
    trainer.model(**collate(ROWS)).loss.backward()
    assert loss.uncounted == 1
    trainer.train()
    assert trainer.state.global_step == 10
