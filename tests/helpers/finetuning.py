"""A tiny model in a folder, and chats and completions in files, for the fine-tuning examples."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from helpers.chat_tokenizers import make_chat_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOUNS = ("weather", "wind", "north", "assistant", "model", "prompt")
WORDS = ("fine", "weaker than yesterday", "like the other", "not trained", "helpful", "whatever it will be")


def import_example(name):
    """The examples import each other by plain name, as they do when one of them is started."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def save_tiny_model(folder):
    """A Llama of two layers with random weights, and its tokenizer; returns the folder's name."""
    transformers = pytest.importorskip("transformers")
    tokenizer = make_chat_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 8,  # output layers are often longer than the tokenizer
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(number=40):
    """Rows with prompt and completion, all different."""
    return [
        {
            "prompt": f"What is the {NOUNS[i % 6]} {i}?\n",
            "completion": f"The {NOUNS[i % 6]} {i} is {WORDS[i // 6 % 6]}.",
        }
        for i in range(number)
    ]


def chats(number=40):
    """The same as messages."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"].strip()},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in pairs(number)
    ]
