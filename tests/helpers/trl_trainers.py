"""Trainers of TRL, with and without PDL, what they train on, and the gradients of their steps."""

import pytest
import torch
import torch.nn.functional as F

from helpers import trainer_models
from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.trainer_models import Gradients, take_gradients
from helpers.trl_training import as_dataset, known_warnings, trl
from pdl_kernels.integrations.trl import PDLSFTMixin, PDLSFTTrainer

training_marks = [
    *known_warnings,
    pytest.mark.filterwarnings("ignore:.*return_outputs=True:FutureWarning"),
    pytest.mark.usefixtures("quick"),
]
V = 365  # some more than the tokenizer has entries
W = 0.1 + 2.9 * torch.rand(V, generator=torch.Generator().manual_seed(0))
IGNORED = -100
WORDS = ("weather", "wind", "north", "today", "fine", "whatever", "count", "tokens", "prompts", "helpful", "it", "is")
TEXTS = [
    {"text": " ".join(WORDS[(start * 7 + 5 * word) % 12] for word in range(length))}
    for start, length in enumerate((3, 14, 1, 9, 6, 20, 2, 5))
]
ONE_STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}  # for up to 8 rows
ASSISTANT = {"assistant_only_loss": True}
PACKED = {"packing": True, "max_length": 20}


def sharp_model(name="llama", width=V):
    return trainer_models.sharp_model(name, vocab_size=width)


def make_trainer(folder, rows, trainer=PDLSFTTrainer, *, model=None, pdl=None, more=None, **options):
    """A trainer of one epoch in which the parameters stay as they are; `pdl` and `more` are for it, options for TRL."""
    given = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
        "learning_rate": 0.0,
        "num_train_epochs": 1,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    named = {"processing_class": make_chat_tokenizer(), **(more or {})}
    if issubclass(trainer, PDLSFTMixin):
        named |= {"weights": W, **(pdl or {})}
    return trainer(
        sharp_model() if model is None else model,
        trl.SFTConfig(output_dir=str(folder), **given | ONE_STEP | options),
        train_dataset=as_dataset(rows),
        **named,
    )


def train(*arguments, **named):
    """The trainer after its epoch, and the gradients of its steps."""
    gradients = Gradients()
    trainer = make_trainer(*arguments, **named)
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.steps


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batches_of(trainer):
    return list(trainer.get_train_dataloader())


def of_batches(trainer, batches, weights=W, count=None):
    """Loss and gradients of sum_i w(y_i) u_i ce_i / n over all of these batches, from logits, by torch's functions."""
    total, number = 0.0, 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "token_weights")}
        logits = trainer.model(**inputs, use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        per_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weights, reduction="none")
        if "token_weights" in batch:
            per_token = per_token * batch["token_weights"][:, 1:].flatten()
        total = total + per_token.sum()
        number += int(targets.ne(IGNORED).sum())
    loss = total / (number if count is None else count)
    loss.backward()
    return loss.item(), take_gradients(trainer.model)


def lora():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
