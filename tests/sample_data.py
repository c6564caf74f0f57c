"""Writes small files of every kind that `pdl-kernels count` takes, for the commands in docs/weights.md.

python tests/sample_data.py FOLDER
"""

import csv
import gzip
import json
import os
import struct
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers

WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "the", "a", "cat", "dog", "sat", "on", "mat"]
WORDS += ["what", "who", "is"]
# ChatML, with the markers that say what the assistant generates.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <|im_end|>' }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
TEXTS = ("the cat sat", "a dog sat on the mat", "what is a cat")
QUESTIONS = ("who sat on the mat", "what is the dog", "who is the cat")
ANSWERS = ("the cat", "a dog", "the cat is the cat")
STREAM = (5, 7, 9, 2, 6, 8, 2, 5, 5, 2)  # three documents, each with <|im_end|> after it


def write_all(folder: Path) -> None:
    write_tokenizer(folder)
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    write_lines(folder / "corpus.txt", TEXTS)
    texts = [{"text": text} for text in TEXTS]
    write_objects(folder / "corpus.jsonl", texts)
    write_objects(folder / "nulls.jsonl", [*texts, {"text": None}])
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    with pa.output_stream(folder / "corpus.jsonl.zst", compression="zstd") as file:
        file.write((folder / "corpus.jsonl").read_bytes())
    write_objects(folder / "chats.jsonl", [{"messages": chat(*pair, "role", "content", "user")} for pair in pairs])
    sharegpt = [{"conversations": chat(*pair, "from", "value", "human", "gpt")} for pair in pairs]
    write_objects(folder / "sharegpt.jsonl", sharegpt)
    write_objects(folder / "pairs.jsonl", [{"prompt": f"{q} ", "completion": a} for q, a in pairs])
    alpaca = [{"instruction": q, "input": "", "output": a} for q, a in pairs]
    (folder / "alpaca.json").write_text(json.dumps(alpaca, indent=1))
    with open(folder / "questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *pairs])
    write_objects(folder / "summaries.jsonl", [{"document": q, "summary": a} for q, a in pairs])
    datasets.disable_progress_bars()
    labels = datasets.Dataset.from_dict({"labels": [[-100, -100, 5, 7], [-100, 6, 8, 2]]})
    labels.save_to_disk(folder / "saved")
    for part in range(2):
        labels.shard(2, part).to_parquet(folder / f"part-{part}.parquet")
    labels.to_parquet(folder / "labels.parquet")
    np.array(STREAM, np.uint16).tofile(folder / "train.bin")
    write_megatron(folder / "megatron", np.array(STREAM, np.uint16), [4, 3, 3])


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, and the folder tokenizer/ with a chat template and EOS."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(WORDS[1:3])
    made.save(str(folder / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "tokenizer")


def chat(question, answer, role, content, user, assistant="assistant"):
    return [{role: user, content: question}, {role: assistant, content: answer}]


def write_lines(path: Path, lines) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def write_objects(path: Path, rows) -> None:
    write_lines(path, map(json.dumps, rows))


def write_megatron(name: Path, ids, lengths) -> None:
    """NAME.bin and NAME.idx; one sequence a document."""
    ids.tofile(name.with_suffix(".bin"))
    starts = np.cumsum([0, *lengths[:-1]]) * ids.itemsize
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(lengths) + 1)
    parts = [np.array(lengths, "<i4"), np.array(starts, "<i8"), np.arange(len(lengths) + 1, dtype="<i8")]
    name.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_all(target)
    print(f"wrote {', '.join(sorted(os.listdir(target)))} in {target}")
