"""Rows and chats with token weights for TRL's trainer, and the gradients of what is cut and packed of them by hand."""

import torch
import torch.nn.functional as F

from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.trainer_models import relative_error, take_gradients
from helpers.trl_trainers import IGNORED, V, W, sharp_model, train
from helpers.trl_training import as_dataset, assistant, user

LENGTHS = (20, 31, 12, 25, 9, 18, 33, 15)
SIZE = 20
WHOLE = {}
KEEP_END = {"max_length": SIZE, "truncation_mode": "keep_end"}
FITS = {
    "whole": WHOLE,
    "keep_start": {"max_length": SIZE},
    "keep_end": KEEP_END,
    "bfd": {"max_length": SIZE, "packing": True},
    "bfd_split": {"max_length": SIZE, "packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"max_length": SIZE, "packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True},
    "shuffled": {"max_length": SIZE, "packing": True, "shuffle_dataset": True},
}
MANY = {"gradient_accumulation_steps": 16}


def token_rows(kind="tokens", lengths=LENGTHS):
    """Rows of ids and masked labels, with weights of both signs and 0: a number, or one for each token."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(7, V - 5, (length,), generator=generator).tolist()
        drawn = torch.randn(length, generator=generator)
        drawn[::5] = 0
        masked = 3 * (number % 3)
        weights = drawn.tolist() if kind == "tokens" else drawn[1].item()
        rows.append({"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:], "u": weights})
    return rows


def sequences(rows, fit="whole"):
    """[(ids, labels, factors)] of what is trained on, without padding."""
    all_of = [
        (row["input_ids"], row["labels"], torch.as_tensor(row["u"]).expand(len(row["labels"])).tolist()) for row in rows
    ]
    if fit in ("whole", "padding-free"):
        return all_of
    if fit == "keep_end":
        return [tuple(part[-SIZE:] for part in row) for row in all_of]
    if fit in ("keep_start", "bfd", "shuffled"):
        return [tuple(part[:SIZE] for part in row) for row in all_of]
    if fit == "wrapped":
        all_of = [tuple([value for row in all_of for value in row[part]] for part in range(3))]
    return [tuple(part[at : at + SIZE] for part in row) for row in all_of for at in range(0, len(row[0]), SIZE)]


def of_sequences(model, rows, weights=W):
    """Gradients of sum_i w(y_i) u_i ce_i / n, sequence by sequence."""
    total, number = 0.0, 0
    for ids, labels, factors in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        targets, u = torch.tensor(labels)[1:], torch.tensor(factors)[1:]
        total = total + (F.cross_entropy(logits, targets, weight=weights, reduction="none") * u).sum()
        number += int(targets.ne(IGNORED).sum())
    (total / number).backward()
    return take_gradients(model)


def assert_trains_on(rows, folder, expected_rows, column="u", **options):
    expected = of_sequences(sharp_model(), expected_rows)
    ones = [(ids, labels, [1.0] * len(ids)) for ids, labels, _ in expected_rows]
    assert relative_error(of_sequences(sharp_model(), ones), expected) > 0.05, "the token weights would not show"
    trainer, (found,) = train(folder, rows, pdl={"token_weights": column}, **MANY | options)
    assert relative_error(found, expected) < 1e-5
    return trainer


TURNS = [
    [
        user("What is the weather like?"),
        assistant(
            "The weather is fine.",
        )
        | {"weight": -2.0},
        user("And in the north?"),
        assistant("Whatever it is today.") | {"weight": 0.25},
    ],
    [user("So?"), assistant("The wind is weaker.") | {"weight": 3.0}],
    [user("And today?"), assistant("It is fine; it will be.") | {"weight": 0.0}, user("Sure?"), assistant("No.")],
]


def by_hand(chat, assistant_only=True):
    """(ids, labels, factors) of a chat in CHATML, piece by piece: special tokens keep its pieces apart."""
    tokenizer = make_chat_tokenizer()
    ids, labels, factors = [], [], []

    def add(text, said, factor):
        new = tokenizer(text)["input_ids"]
        ids.extend(new)
        labels.extend(new if said or not assistant_only else [IGNORED] * len(new))
        factors.extend([factor] * len(new))

    for message in chat:
        add(f"<|im_start|>{message['role']}\n", False, 1.0)
        is_assistant = message["role"] == "assistant"
        add(message["content"] + "<|im_end|>", is_assistant, message.get("weight", 1.0) if is_assistant else 1.0)
        add("\n", False, 1.0)
    assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
    return ids, labels, factors


def stream(rows, form):
    import datasets

    if form == "of a data set":
        return as_dataset(rows).to_iterable_dataset()
    return datasets.IterableDataset.from_generator(lambda: iter(rows))
