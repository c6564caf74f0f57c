"""Weights of the user's own, one per example or per token, from a column of the data set to the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pdl_kernels.data.batches import RowName
from pdl_kernels.data.chats import ChatTemplate
from pdl_kernels.data.token_weights import join, message_factors, split

COLUMN = "token_weights"


class TokenWeightsCollator:
    """A data collator whose batches have `token_weights`: factors u_i of the loss, of any sign.

        L = sum_i w(y_i) u_i ce_i / n          n counts targets, whatever their u_i

    The factors travel in the upper half of the labels, so that they are padded, flattened and masked exactly as the
    labels are. `Trainer(data_collator=TokenWeightsCollator(DataCollatorForSeq2Seq(tokenizer)))` with
    `remove_unused_columns=False` takes examples with `input_ids`, `labels` and `token_weights`.

    Args:
        collator: makes a batch of examples and keeps the labels that they have, such as `DataCollatorForSeq2Seq`,
            `DataCollatorWithFlattening` or `default_data_collator`.
        column: of each example, a number, or a list of numbers, one for each label.

    A batch holds what `collator` makes, and `token_weights`, float32 of the labels' shape, 0 where a label is ignored.

    Raises:
        ValueError: an example without the column; numbers that are not finite or not as many as labels; a collator that
            replaces labels by its own, such as `DataCollatorForLanguageModeling`.
    """

    makes_token_weights = True  # PDLCallback sees to it that they reach the loss

    def __init__(self, collator: Callable[[list[Any]], Any], column: str = COLUMN) -> None:
        self.collator = collator
        self.column = column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        joined = [self._join(example, number) for number, example in enumerate(examples)]
        return split_batch(self.collator(joined), joined, self.collator)

    def _join(self, example: Mapping[str, Any], number: int) -> dict[str, Any]:
        if self.column not in example:
            raise ValueError(
                f"example {number} of the batch has no {self.column!r}, its columns are {', '.join(example)}; the "
                "Trainer drops columns that the model does not name: set remove_unused_columns=False"
            )
        joined = {name: value for name, value in example.items() if name != self.column}
        labels = example.get("labels", example.get("input_ids"))
        codes = join(labels, example[self.column], f"{self.column} of example {number} of the batch")
        return joined | {"labels": codes.tolist()}


def split_batch(batch: Any, examples: Sequence[Mapping[str, Any]], collator: Any) -> Any:
    """The batch with labels and `token_weights` in the place of what `join` made, which `examples` hold."""
    codes = batch["labels"]
    expected = torch.tensor([code for example in examples for code in example["labels"]])
    found = codes[codes != -100]
    if codes.dtype != torch.int64 or not torch.isin(found, expected).all():
        raise ValueError(
            f"{type(collator).__name__} replaces labels by its own, and the token weights are lost; accepted are "
            "collators that keep them, such as DataCollatorForSeq2Seq(tokenizer)"
        )
    batch["labels"], batch["token_weights"] = split(codes)
    if "shift_labels" in batch:
        batch["shift_labels"], batch["shift_token_weights"] = split(batch["shift_labels"])
    if "decoder_input_ids" in batch:  # made of the labels by a collator for an encoder-decoder model
        batch["decoder_input_ids"], _ = split(batch["decoder_input_ids"])
    return batch


def chat_token_weights(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **options: Any) -> list[float]:
    """One factor for each token of a chat: the `weight` of the assistant's message that holds it, and 1 elsewhere.

    Args:
        messages: of `role`, `content` and, for those of the assistant, perhaps `weight`, a number of any sign; 1 where
            there is none.
        tokenizer: of `transformers`, with a chat template with generation markers, or one that TRL knows.
        options: `tools` and `chat_template_kwargs`, as a row of a data set has them.

    Returns:
        As many numbers as `tokenizer.apply_chat_template(messages)` has ids.

    Raises:
        ValueError: a weight on a message of another role; two messages of the assistant in a row; a template that does
            not say what the assistant generates.
    """
    template = ChatTemplate(tokenizer, None, assistant_only=True, roles=None)
    where = RowName(lambda _: "messages", 0)
    ids, factors = message_factors(options, messages, template, where)
    own, _ = ChatTemplate(tokenizer, None, assistant_only=False, roles=None).encode(
        [(0, template.read(options, messages, "messages", where))], lambda _: str(where), mask=False
    )[0]
    if list(own) != list(ids):
        raise ValueError(
            "the tokenizer's chat template has no generation markers, and the one that TRL trains with instead makes "
            "other ids; accepted is a tokenizer whose chat_template has {% generation %} markers"
        )
    return factors
