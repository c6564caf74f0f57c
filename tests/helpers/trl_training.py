"""Rows for TRL's SFTTrainer, what it trains on, and what is counted of them."""

import copy
from pathlib import Path

import pytest

from pdl_kernels import TokenCounts

trl = pytest.importorskip("trl", minversion="1.16", reason="compares with SFTTrainer of TRL 1.16")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
datasets.disable_progress_bars()

known_warnings = [
    pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SIZE = 20
FITS = {
    "whole": {},
    "keep_start": {"max_length": SIZE},
    "keep_end": {"max_length": SIZE, "truncation_mode": "keep_end"},
    "bfd": {"max_length": SIZE, "packing": "bfd"},
    "bfd_split": {"max_length": SIZE, "packing": "bfd_split"},
    "wrapped": {"max_length": SIZE, "packing": "wrapped"},
    "padding_free": {"padding_free": True},
    "shuffled": {"max_length": SIZE, "packing": "bfd", "shuffle_dataset": True},
}
each_fit = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
both_assistant = pytest.mark.parametrize("assistant_only_loss", [True, False], ids=["assistant", "everyone"])
both_completion = pytest.mark.parametrize("completion_only_loss", [True, False], ids=["completion", "all"])
both_families = pytest.mark.parametrize("family", ["qwen", "llama"])


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


WEATHER = [user("What is the weather like?"), assistant("The weather is fine.")]
CHATS = [
    [system("You are a helpful assistant."), *WEATHER],
    [*WEATHER, user("And in the north?"), assistant("Whatever it is today."), user("Sure?"), assistant("No.")],
    [user("Wie heißt das auf 日本語? 🦊"), assistant("狐 — naïve Füchse 🦊🦊, ﬁne"), user("Danke!")],
    [user("  two \n"), assistant("\n\nbegins and ends with a line\n"), user("\n"), assistant(" spaces ")],
    [user("What will the weather be in the north today, and whatever is the wind like?"), assistant("Wind.")],
]
ROWS = [{"messages": chat} for chat in CHATS]
PAIRS = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in (CHATS[0], CHATS[1], CHATS[3], CHATS[4])] + [
    {"prompt": CHATS[1][:1], "completion": CHATS[1][1:]},
    {"prompt": [system("Be brief.")], "completion": WEATHER},
    {"prompt": CHATS[1][:2], "completion": [assistant("It goes on."), user("Does it?")]},
]
TEXTS = [
    "The weather is fine; the wind is weaker than yesterday, and whatever will it be?",
    "What is the weather like in the north today?\n",
    "naïve Füchse 🦊🦊, 日本語 ",
    "",
    "x",
]
WRITTEN = [
    {"prompt": "What is the wea", "completion": "ther like in the north today, and whatever will it be?"},
    {"prompt": "Count the to", "completion": "kens that a model is trained on, not the tokens of the prompts."},
    {"prompt": "The wind is fine:\n", "completion": "\n\nweaker than yesterday.\n"},
    {"prompt": "naïve Füchse ", "completion": " 🦊🦊 日本語"},
    {"prompt": "", "completion": "the weather"},
    {"prompt": "Count the tokens that a model is trained on, not the tokens of the prompts: ", "completion": "x"},
]


def count_of_training(folder, rows, tokenizer, *, packing=None, loader_batch=2, **options):
    """Counts of the labels in the batches of a trainer of `rows`."""
    tokenizer = copy.deepcopy(tokenizer)  # the trainer gives it a padding token
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 8)
    heads = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    options = {"max_length": None, "packing": packing is not None} | options
    if packing is not None:
        options["packing_strategy"] = packing
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        per_device_train_batch_size=loader_batch,
        **options,
    )
    trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=as_dataset(rows),
        processing_class=tokenizer,
    )
    counts = TokenCounts.from_dataloader(trainer.get_train_dataloader(), len(tokenizer), progress=False)
    assert counts.total > 0
    return counts


def as_dataset(rows):
    return datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows


def counted(count, rows, tokenizer, padding_free=False, shuffle_dataset=False, **options):
    """What `count` counts, given the options of the trainer without those that change no targets."""
    return count(rows, tokenizer, progress=False, **options).counts.tolist()


def assert_same(trained, count, rows, tokenizer, **options):
    """The rows give the same counts as a list, as a data set and to the trainer."""
    expected = trained(rows, tokenizer, **options).counts.tolist()
    assert counted(count, rows, tokenizer, **options) == expected
    assert counted(count, as_dataset(rows), tokenizer, **options) == expected
    if "max_length" in options:
        whole = {name: value for name, value in options.items() if name.endswith("_loss")}
        assert counted(count, rows, tokenizer, **whole) != expected, "nothing was cut"


def template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
