"""How fast texts, completions and chats are counted, beside `map` of datasets with numpy on the same file.

    python -m benchmarks.counting_texts --output results/counting_texts.json

The texts are the docstrings of Python's standard library, each several times, in one JSON lines file; the tokenizer is
a byte-level BPE that is trained on them first, with a ChatML template that marks what the assistant says. Each way runs
in fresh processes; memory is the process's peak, with torch and transformers loaded. What `map` gives is compared with
what is counted, target by target.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.counting import environment, measure_all, options_of, print_table
from benchmarks.results import write_record
from pdl_kernels import TokenCounts
from pdl_kernels.data.corpora import open_corpus

VOCAB_SIZE = 32_768
REPEATS = 5
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def docstrings() -> list[tuple[str, str]]:
    """(name, docstring) of everything in the standard library that has one."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append((f"What does {path.stem}.{node.name} do?\n", text))
    return found


def make_files(folder: Path) -> None:
    import tokenizers
    import transformers

    pairs = docstrings()
    rows = [
        {
            "text": text,
            "prompt": name,
            "completion": text,
            "messages": [{"role": "user", "content": name}, {"role": "assistant", "content": text}],
        }
        for name, text in pairs * REPEATS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        (name + text for name, text in pairs),
        tokenizers.trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False),
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "tokenizer")


def _tokenizer(folder: str):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(f"{folder}/tokenizer")


def _counted(folder: str, kind: str, method: str, **options) -> Callable[[], TokenCounts]:
    tokenizer = _tokenizer(folder)
    corpus = open_corpus([f"{folder}/rows.jsonl"], kind=kind)
    return lambda: getattr(TokenCounts, method)(corpus.rows, tokenizer, progress=False, **options)


def count_texts(folder: str) -> Callable[[], TokenCounts]:
    return _counted(folder, "texts", "from_texts", append_eos=True)


def count_completions(folder: str) -> Callable[[], TokenCounts]:
    return _counted(folder, "completions", "from_completions")


def count_chats(folder: str) -> Callable[[], TokenCounts]:
    return _counted(folder, "chats", "from_chats")


def _mapped(folder: str, labels_of: Callable[[object, dict], list[list[int]]]) -> Callable[[], TokenCounts]:
    """`map` over the file, a batch at a time, and numpy over the column that it makes."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = _tokenizer(folder)

    def run() -> TokenCounts:
        rows = datasets.load_dataset(
            "json", data_files=f"{folder}/rows.jsonl", split="train", cache_dir=tempfile.mkdtemp(dir=folder)
        )
        labels = rows.map(
            lambda batch: {"labels": labels_of(tokenizer, batch)},
            batched=True, remove_columns=rows.column_names, load_from_cache_file=False,
        )  # fmt: skip
        counts = TokenCounts(len(tokenizer))
        for batch in labels.with_format("numpy").iter(1000):
            ids = np.concatenate([row[1:] for row in batch["labels"]])
            counts.counts += torch.from_numpy(np.bincount(ids[ids != -100], minlength=len(tokenizer)))
        return counts

    return run


def map_texts(folder: str) -> Callable[[], TokenCounts]:
    return _mapped(
        folder, lambda tokenizer, batch: tokenizer([text + "<|im_end|>" for text in batch["text"]])["input_ids"]
    )


def map_completions(folder: str) -> Callable[[], TokenCounts]:
    def labels_of(tokenizer, batch):
        prompts = tokenizer(batch["prompt"])["input_ids"]
        both = zip(batch["prompt"], batch["completion"], strict=True)
        whole = tokenizer([prompt + completion + "<|im_end|>" for prompt, completion in both])["input_ids"]
        return [
            [-100] * _shared(ids, prompt) + ids[_shared(ids, prompt) :]
            for ids, prompt in zip(whole, prompts, strict=True)
        ]

    return _mapped(folder, labels_of)


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    return next((i for i, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), len(others))


def map_chats(folder: str) -> Callable[[], TokenCounts]:
    def labels_of(tokenizer, batch):
        found = tokenizer.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
        rows = zip(found["input_ids"], found["assistant_masks"], strict=True)
        return [[i if said else -100 for i, said in zip(ids, mask, strict=True)] for ids, mask in rows]

    return _mapped(folder, labels_of)


WAYS = (count_texts, map_texts, count_completions, map_completions, count_chats, map_chats)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments, __doc__, "results/counting_texts.json")
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        samples = measure_all(WAYS, options.runs, folder)
    for kind in ("texts", "completions", "chats"):
        sums = {run["checksum"] for way in ("count", "map") for run in samples[f"{way}_{kind}"]}
        if len(sums) != 1:
            raise AssertionError(f"{kind}: what `map` gives is not what was counted")
    print_table(samples)
    record = {"environment": environment(), "vocab_size": VOCAB_SIZE, "repeats": REPEATS, "samples": samples}
    write_record(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
