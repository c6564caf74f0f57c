"""Counting the batches of data loaders."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.counting import ROWS, V, from_dataloader, oracle
from helpers.tokenizers import make_transformers_tokenizer

from pdl_kernels import TokenCounts


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)


def test_batches_of_every_kind():
    batches = [padded([row for row in ROWS[i : i + 3] if row]) for i in range(0, len(ROWS), 3)]
    expected = oracle(ROWS)
    assert from_dataloader([{"labels": b, "input_ids": b + 1} for b in batches]).counts.tolist() == expected
    assert from_dataloader([(None, b) for b in batches], column=1).counts.tolist() == expected
    assert from_dataloader([[b] for b in batches], column=-1).counts.tolist() == expected
    assert from_dataloader(batches, column=lambda batch: batch).counts.tolist() == expected
    assert from_dataloader(iter([{"y": b.numpy()} for b in batches]), column="y").counts.tolist() == expected


def test_shifted_labels_are_counted_as_they_are():
    labels = padded([row for row in ROWS if row])
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    got = from_dataloader([{"shift_labels": shifted}], column="shift_labels", shift=False)
    assert got.counts.tolist() == oracle(ROWS)


def test_a_training_loader_gives_what_the_trainer_divides_by():
    """The trainer's number of items is the sum of labels[..., 1:] != -100 over its batches, shuffled and padded."""
    transformers = pytest.importorskip("transformers")
    tokenizer = make_transformers_tokenizer()
    rows = list(np.random.default_rng(1).integers(4, 8, (23, 9)).tolist())
    examples = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    loader = torch.utils.data.DataLoader(examples, 4, shuffle=True, collate_fn=collate)
    got = TokenCounts.from_dataloader(loader, len(tokenizer), progress=False)
    assert got.total == sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in loader)
    expected = Counter(token for example in examples for token in example["labels"][1:] if token != -100)
    assert got.counts.tolist() == [expected[token] for token in range(len(tokenizer))]
    assert got.sequences == len(examples)


def test_loader_workers_change_nothing():
    rows = torch.randint(0, V, (40, 6))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), 8, num_workers=2)
    assert from_dataloader(loader, column=0).counts.tolist() == oracle(rows.tolist())


@pytest.mark.parametrize(
    ("batch", "column", "error", "message"),
    [
        ({"ids": [1]}, "labels", ValueError, "column is 'labels', and a batch has the keys 'ids'"),
        (([1],), 1, ValueError, "column is 1, and a batch has tuple"),
        (([1],), "labels", ValueError, "column is 'labels', and a batch has tuple"),
        ({"labels": None}, "labels", TypeError, "batch 1, labels is a NoneType"),
        ({"labels": torch.tensor([[1, 2], [3, 77]])}, "labels", IndexError, r"batch 1, labels\[1, 1\] is 77"),
    ],
)
def test_batches_without_labels(batch, column, error, message):
    good = {"labels": [[1, 2]]} if isinstance(batch, dict) else ([1, 2], [1, 2])
    if column == "labels":
        good = {"labels": [[1, 2]]}
    with pytest.raises(error, match=message):
        from_dataloader([good, batch], column=column)


def answers(batch):
    return batch["labels"]


def test_what_was_counted_names_no_memory_address():
    class Answers:
        def __call__(self, batch):
            return batch["labels"]

    batches = [{"labels": [[1, 2]]}]
    assert from_dataloader(batches, column=answers).counted == "answers of a data loader, shifted, ignore_index -100"
    for column in (Answers(), functools.partial(answers), lambda batch: batch["labels"]):
        assert " at 0x" not in from_dataloader(batches, column=column).counted
