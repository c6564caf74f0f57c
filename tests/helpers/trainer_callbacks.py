"""Runs of the Trainer that a PDLCallback watches over, and in which something is changed on the way."""

import types

from helpers.trainer_models import make_model, make_rows, transformers
from helpers.trainer_runs import W, Watch, by_compute_loss, by_linear_loss, by_loss_function, make_trainer
from pdl_kernels.integrations.transformers import PDLCallback

EAGER = {"backend": "eager"}  # pytest has the kernels interpreted, which takes long
ROWS = make_rows(8)


class After(transformers.TrainerCallback):
    """Does something once, when so many steps are trained and the next one begins."""

    def __init__(self, steps, action):
        self.steps, self.action = steps, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            self.action()


def watched(folder, route, *, weights=W, model=None, settings=None, callbacks=(), pdl=None, options=None, **arguments):
    """(trainer, loss, gradients of its steps) of a small Llama, or another model, with an attached PDLCallback.

    `pdl` is for the callback, `options` for the loss, and the settings for the Trainer, which takes ten steps.
    """
    model = make_model("llama", num_hidden_layers=1) if model is None else model
    loss, more = route(model, weights, **EAGER | (options or {}))
    watch = Watch()
    settings = {"max_steps": 10, "learning_rate": 0.01, "logging_steps": 100} | (settings or {})
    rows = arguments.pop("rows", ROWS)
    trainer = make_trainer(folder, model, rows, settings=settings, callbacks=[watch, *callbacks], **more | arguments)
    PDLCallback(loss, **pdl or {}).attach(trainer)
    return trainer, loss, watch.gradients


def plain_compute_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits
    return transformers.loss.loss_utils.ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)


def without_hook(route, trainer, loss):
    """A function that takes the hook of this route away."""
    if route is by_loss_function:
        return lambda: setattr(trainer.model, "loss_function", transformers.loss.loss_utils.ForCausalLMLoss)
    if route is by_compute_loss:
        return lambda: setattr(trainer, "compute_loss_func", None)
    assert route is by_linear_loss
    return loss.undo


def with_another_hook(route, trainer, loss):
    """A function that puts another loss in the place of the hook of this route."""
    model = trainer.model

    def replace():
        without_hook(route, trainer, loss)()
        if route is by_compute_loss:
            trainer.compute_loss_func = plain_compute_loss
        else:
            route(model, W.flip(0), **EAGER)

    return replace


def begin(loss, **more):
    """A callback for which training has begun, and what it is called with: arguments of which only these matter."""
    given = {"label_smoothing_factor": 0.0, "report_to": [], "gradient_accumulation_steps": 1, "world_size": 1}
    arguments = types.SimpleNamespace(**given | {"n_gpu": 1} | more)
    called_with = arguments, transformers.TrainerState(global_step=0), transformers.TrainerControl()
    callback = PDLCallback(loss)
    callback.on_train_begin(*called_with)
    return callback, called_with


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]
