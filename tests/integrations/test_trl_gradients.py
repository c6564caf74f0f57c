"""PDLSFTTrainer: the gradient of torch's weighted cross entropy, whatever TRL does to the data, and no logits."""

import pytest
import torch
import torch.nn.functional as F
from helpers.chat_tokenizers import CHATML, make_chat_tokenizer
from helpers.trainer_models import V as NARROW
from helpers.trainer_models import make_model, relative_error, take_gradients, transformers
from helpers.trl_trainers import (
    ASSISTANT,
    IGNORED,
    PACKED,
    TEXTS,
    V,
    W,
    batches_of,
    logs_of,
    lora,
    make_trainer,
    of_batches,
    sharp_model,
    train,
    training_marks,
)
from helpers.trl_training import CHATS, PAIRS, ROWS, WRITTEN
from torch.utils._python_dispatch import TorchDispatchMode

from pdl_kernels import WeightSchedule
from pdl_kernels.weights.saved import save_weights

pytestmark = training_marks


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


KINDS = {
    "text": (TEXTS, {}),
    "text, cut": (TEXTS, {"max_length": 12}),
    "prompts and completions": (WRITTEN, {}),
    "prompts and completions, all": (WRITTEN, {"completion_only_loss": False}),
    "messages of prompts and completions": (PAIRS, {}),
    "chats": (ROWS, {}),
    "chats, assistant": (ROWS, ASSISTANT),
    "chats, assistant, keep_end": (ROWS, ASSISTANT | {"max_length": 20, "truncation_mode": "keep_end"}),
    "bfd": (ROWS, ASSISTANT | PACKED | {"per_device_train_batch_size": 1}),
    "bfd, two at once": (TEXTS, PACKED),
    "bfd_split": (TEXTS, PACKED | {"packing_strategy": "bfd_split"}),
    "wrapped": (TEXTS, PACKED | {"packing_strategy": "wrapped"}),
    "padding-free": (WRITTEN, {"padding_free": True}),
    "to a multiple": (TEXTS, {"pad_to_multiple_of": 8}),
    "checkpointing": (ROWS, ASSISTANT | {"gradient_checkpointing": True}),
    "checkpointing, packed": (TEXTS, PACKED | {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize(("rows", "options"), KINDS.values(), ids=KINDS)
def test_the_gradient_of_a_step(rows, options, tmp_path):
    trainer, (found,) = train(tmp_path, rows, **{"gradient_accumulation_steps": 16} | options)
    loss, expected = of_batches(trainer, batches_of(trainer))
    assert relative_error(found, expected) < 1e-5
    assert logs_of(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-4)
    unweighted = of_batches(trainer, batches_of(trainer), weights=None)
    assert relative_error(unweighted[1], expected) > 1e-2, "the weights would not show"


MASKED = ["prompts and completions", "chats, assistant", "bfd", "padding-free"]


@pytest.mark.parametrize("kind", MASKED)
def test_some_of_these_labels_are_masked(kind, tmp_path):
    rows, options = KINDS[kind]
    data = make_trainer(tmp_path, rows, **options).train_dataset
    assert any(IGNORED in row["labels"][1:] for row in data)


@pytest.mark.parametrize("name", ["llama tied", "gemma2", "granite", "cohere"])
def test_models(name, tmp_path):
    """Tied embeddings, a softcap, scales: TRL applies them to its log-probabilities."""
    trainer, (found,) = train(tmp_path, TEXTS, model=sharp_model(name))
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing, tmp_path):
    trainer, (found,) = train(tmp_path, WRITTEN, more={"peft_config": lora()}, gradient_checkpointing=checkpointing)
    assert found
    assert all("lora_" in name for name in found)
    assert {name.split(".")[-4] for name in found} == {"q_proj", "v_proj"}
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_a_model_that_is_wrapped_by_peft_already(tmp_path):
    peft = pytest.importorskip("peft")
    trainer, (found,) = train(tmp_path, TEXTS, model=peft.get_peft_model(sharp_model(), lora()))
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_prompt_tuning(tmp_path):
    """TRL then trains on the first token of a row, too, which the last virtual token predicts."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer, (found,) = train(tmp_path, TEXTS, more={"peft_config": config})
    total, number = 0.0, 0
    for batch in batches_of(trainer):
        labels = batch.pop("labels")
        logits = trainer.model(**batch).logits[:, 2:-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=W, reduction="sum")
        number += int(labels[:, 1:].ne(IGNORED).sum())
    (total / number).backward()
    assert relative_error(found, take_gradients(trainer.model)) < 1e-5


def test_a_mixture_of_experts(tmp_path):
    """The loss that balances them comes on top, unweighted."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": V}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(output_router_logits=True, **sizes, **heads))
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "router_aux_loss_coef": 0.5}
    trainer, (found,) = train(tmp_path, TEXTS, model=model.train(), **options)
    (batch,) = batches_of(trainer)
    targets = batch.pop("labels")[:, 1:]
    outputs = trainer.model(**batch, output_router_logits=True)
    total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.flatten(), weight=W, reduction="sum")
    (total / targets.ne(IGNORED).sum() + 0.5 * outputs.aux_loss).backward()
    assert relative_error(found, take_gradients(trainer.model)) < 1e-5


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_a_step_may_be_cut_as_one_likes(accumulate, tmp_path):
    cut = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer, (found,) = train(tmp_path, TEXTS, **cut)
    targets = [int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in batches_of(trainer)]
    assert len(targets) == accumulate
    assert accumulate == 1 or len(set(targets)) > 1
    whole = trainer.data_collator([trainer.train_dataset[row] for row in range(8)])
    loss, expected = of_batches(trainer, [whole])
    assert relative_error(found, expected) < 1e-5
    assert logs_of(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_last_step_of_an_epoch_is_smaller(tmp_path):
    order = {"train_sampling_strategy": "sequential"}
    trainer, steps = train(tmp_path, TEXTS[:7], per_device_train_batch_size=2, gradient_accumulation_steps=3, **order)
    assert len(steps) == 2
    batches = batches_of(trainer)
    for found, part in zip(steps, (batches[:3], batches[3:]), strict=True):
        assert relative_error(found, of_batches(trainer, part)[1]) < 1e-5


def test_bfloat16(tmp_path):
    trainer, (found,) = train(tmp_path, TEXTS, bf16=True)
    _, expected = of_batches(trainer, batches_of(trainer))
    _, unweighted = of_batches(trainer, batches_of(trainer), weights=None)
    assert relative_error(found, expected) < 0.05
    assert relative_error(unweighted, expected) > 0.1


def test_weights_from_a_file(tmp_path):
    save_weights(tmp_path / "weights.safetensors", W)
    trainer, (found,) = train(tmp_path, TEXTS, pdl={"weights": tmp_path / "weights.safetensors"})
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_a_schedule(tmp_path):
    schedule = WeightSchedule(W, steps=2)
    one_each = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3}
    pdl = {"weights": schedule.weights_at(0), "schedule": schedule}
    trainer, steps = train(tmp_path, TEXTS, pdl=pdl, **one_each)
    for step, found in enumerate(steps):
        _, expected = of_batches(trainer, batches_of(trainer), weights=schedule.weights_at(step))
        assert relative_error(found, expected) < 1e-5
    assert len(steps) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_logits(tmp_path):
    """TRL has a block of its own for 32768 columns; three of them make the vocabulary."""
    width = 3 * 32768
    model = sharp_model(width=width)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = make_trainer(tmp_path, TEXTS[1:6:2] * 2, model=model, pdl={"weights": torch.ones(width)}, **options)
    batch = batches_of(trainer)[0]
    rows, length = batch["labels"].shape
    logits = rows * (length - 1) * width
    assert logits > 2 * model.lm_head.weight.numel(), "parameters and their gradients are smaller"
    trainer.pdl_loss.keep_record()
    with Largest() as ours:
        trainer.training_step(trainer.model, batch, torch.tensor(100.0))
    assert model.lm_head.weight.grad.norm() > 0
    assert ours.numel < logits
    with torch.no_grad(), Largest() as plain:
        model(input_ids=batch["input_ids"])
    assert plain.numel >= logits, "the watch would have seen them"


def test_what_these_tests_train_on():
    assert len(make_chat_tokenizer()) < V
    assert NARROW < V
    assert CHATML.count("generation") >= 2
    assert len(CHATS) == len(ROWS)
    assert make_model("llama", vocab_size=V).config.vocab_size == V
