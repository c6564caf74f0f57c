"""Tiny models, a made-up task and settings of seconds, for the tests of benchmarks.quality."""

import copy
import random
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5.24", reason="benchmarks.quality needs transformers >= 5.24, whose models take `cache`"
)

from benchmarks.quality import prepare, records  # noqa: E402
from benchmarks.quality.encoding import Encoded  # noqa: E402
from benchmarks.quality.language_model import LanguageModel  # noqa: E402
from benchmarks.quality.matrix import Run  # noqa: E402
from benchmarks.quality.settings import Settings  # noqa: E402
from benchmarks.quality.tasks import TASKS  # noqa: E402
from benchmarks.quality.tasks.pairs import Pair, Task  # noqa: E402
from helpers.chat_tokenizers import CHATML, make_chat_tokenizer  # noqa: E402

CPU = torch.device("cpu")
V, EOS = 60, 2
LAYERS = 4
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # logits that differ by some units, and depend on the whole prompt
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": 0,
}


class Tokenizer:
    """As much of one as a model's two parts ask for."""

    chat_template = CHATML
    eos_token_id = EOS


def make_causal_lm(kind="Llama", seed=0, **changes):
    """A whole model of transformers with random weights; EOS is the likeliest token every now and then."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 2
    return model


def make_model(trained_layers=2, kind="Llama", dtype=torch.float32, **changes):
    """The model in two parts, and the whole model that it was made of."""
    causal_lm = make_causal_lm(kind, **changes)
    whole = copy.deepcopy(causal_lm).requires_grad_(False)
    return LanguageModel("tiny", Tokenizer(), causal_lm, trained_layers, CPU, dtype), whole


def make_encoded(number=10, seed=0, longest=16, targets=4):
    """Prompts of different lengths, in no order, with references of different lengths."""
    random_ids = random.Random(seed)

    def ids(length):
        return [random_ids.randrange(3, V) for _ in range(length)]

    return [
        Encoded(ids(random_ids.randint(3, longest)), [*ids(random_ids.randint(1, targets)), EOS]) for _ in range(number)
    ]


@torch.no_grad()
def target_logits(whole, one):
    """(targets, V) of the whole model, for one pair alone."""
    return whole(torch.tensor([one.inputs])).logits[0, len(one.prompt) - 1 :]


# A model that reads texts, and a task


def make_chat_causal_lm(tokenizer, layers):
    return make_causal_lm(
        vocab_size=len(tokenizer) + 8,  # output layers are often longer than the tokenizer
        num_hidden_layers=layers,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_chat_model(trained_layers=2):
    tokenizer = make_chat_tokenizer()
    return LanguageModel(
        "tiny", tokenizer, make_chat_causal_lm(tokenizer, layers=3), trained_layers, CPU, torch.float32
    )


def save_model(folder, chat_template=CHATML, layers=5):
    """A model and its tokenizer in a folder, whose name is returned. By default four of the layers are trained."""
    tokenizer = make_chat_tokenizer(chat_template=chat_template)
    make_chat_causal_lm(tokenizer, layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


NOUNS = ("weather", "north", "assistant", "name", "wind", "city")
ENDS = ("fine", "weaker", "trained", "helpful")
NEW_TOKENS = 16  # of each text; references have at most 15


def made_up_pairs(number, seed=0):
    """Pairs in groups of three; no two are the same."""
    words = random.Random(seed)
    return [
        Pair(
            (f"What is the {words.choice(NOUNS)} {i}?",),
            f"The {words.choice(NOUNS)} {i} is {words.choice(ENDS)}.",
            f"group {i // 3}",
        )
        for i in range(number)
    ]


def make_task(name="dialogue", pairs=60, seed=0, **changes):
    def load():
        return made_up_pairs(pairs, seed)

    task = Task(name, name, "Answer.", "made up", load, prompt_tokens=100, new_tokens=NEW_TOKENS)
    return replace(task, **changes)


def use_task(monkeypatch, task, versions=None):
    """Put it in the place of the task of this name, made from these versions."""
    monkeypatch.setitem(TASKS, task.name, task)
    monkeypatch.setattr(prepare, "versions_of", lambda name: versions or {"made-up": "1.0"})


TINY = Settings(
    model="tiny",
    layers=2,
    training_pairs=24,
    validation_pairs=6,
    held_out_pairs=6,
    batch_size=4,
    learning_rates=(1e-3, 1e-2),
    search_steps=3,
    seeds=2,
    compute_dtype="float32",
)
CROSS_ENTROPY, PDL, UNTOUCHED = (Run("dialogue", arm, 0) for arm in ("cross-entropy", "pdl-1", "untouched"))


def record_of(experiment, run):
    return records.read(records.record_path(experiment.folder, run.task, run.arm, run.seed))


def same(document):
    """A record without what differs from one start to the next."""
    return {name: value for name, value in document.items() if name not in ("seconds", "environment")}


def one_line(caught):
    """The message of an error, which has no more than a line."""
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
