"""transformers.Trainer with each of the hooks of PDL, and the gradients of its steps."""

import pytest
import torch
import torch.nn.functional as F

from helpers.trainer_models import collate, make_model, make_weights, next_labels, transformers
from pdl_kernels.integrations.transformers import PDLCallback, pdl_compute_loss, pdl_loss_function, use_pdl_linear_loss

W = make_weights()


def by_loss_function(model, weights=W, **options):
    model.loss_function = pdl_loss_function(weights, **options)
    return model.loss_function, {}


def by_compute_loss(model, weights=W, **options):
    loss = pdl_compute_loss(weights, **options)
    return loss, {"compute_loss_func": loss}


def by_linear_loss(model, weights=W, **options):
    return use_pdl_linear_loss(model, weights, **options), {}


def stock(model, weights=None):
    return None, {}


ROUTES = [by_loss_function, by_compute_loss, by_linear_loss]
each_route = pytest.mark.parametrize("route", ROUTES)


class Watch(transformers.TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(found)


def make_trainer(folder, model, rows, kind=transformers.Trainer, settings=None, seq2seq=False, **arguments):
    """A Trainer that takes the rows in their order, does not clip, and logs every step."""
    settings = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 3,
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        **(settings or {}),
    }
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    made = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    return kind(
        model,
        args=made(output_dir=str(folder), **quiet, **settings),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=arguments.pop("data_collator", collate),
        **arguments,
    )


def train(folder, route, rows, name="llama", changes=None, weights=W, settings=None, **arguments):
    """Train a new model; (trainer, gradients of each step)."""
    model = make_model(name, **changes or {})
    loss, more = route(model, weights)
    watch = Watch()
    callbacks = [watch] if loss is None else [watch, PDLCallback(loss)]
    trainer = make_trainer(folder, model, rows, settings=settings, callbacks=callbacks, **more, **arguments)
    trainer.train()
    return trainer, watch.gradients


def statistics_of(rows, model):
    """What the callback logs of these rows, from the logits."""
    batch = collate(rows)
    targets = next_labels(batch["labels"])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits, targets = logits[targets != -100].double(), targets[targets != -100]
    w = W[targets].double()
    nll = F.cross_entropy(logits, targets)
    return {
        "loss": F.cross_entropy(logits, targets, weight=W.double(), reduction="sum") / len(targets),
        "nll": nll,
        "perplexity": nll.exp(),
        "accuracy": (logits.argmax(-1) == targets).double().mean(),
        "mean_weight": w.mean(),
        "effective_sample_share": w.sum().square() / (len(w) * w.square().sum()),
    }


def cut(total, pieces):
    return {"per_device_train_batch_size": total // pieces, "gradient_accumulation_steps": pieces}
