"""Texts, completions and chats are counted as the batches of TRL's SFTTrainer have them as labels."""

import itertools
import json

import pytest
from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.trl_training import (
    CHATS,
    PAIRS,
    ROWS,
    TEXTS,
    WRITTEN,
    as_dataset,
    assert_same,
    assistant,
    both_assistant,
    both_completion,
    both_families,
    counted,
    each_fit,
    known_warnings,
    trl,
    user,
)

from pdl_kernels import TokenCounts

pytestmark = known_warnings


@both_assistant
@each_fit
def test_chats(trained, fit, assistant_only_loss):
    options = {"assistant_only_loss": assistant_only_loss, **fit}
    assert_same(trained, TokenCounts.from_chats, ROWS, make_chat_tokenizer(), **options)


@both_assistant
def test_chats_that_are_lists_of_messages(trained, assistant_only_loss):
    tokenizer, options = make_chat_tokenizer(), {"assistant_only_loss": assistant_only_loss}
    expected = trained(ROWS, tokenizer, **options).counts.tolist()
    assert counted(TokenCounts.from_chats, CHATS, tokenizer, **options) == expected
    chats = [[{"from": message["role"], "value": message["content"]} for message in chat] for chat in CHATS]
    assert counted(TokenCounts.from_chats, chats, tokenizer, **options) == expected


@both_assistant
def test_chats_with_from_and_value(trained, assistant_only_loss):
    """SFTTrainer refuses assistant_only_loss for these, so that they are converted before, by TRL."""
    rows = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in chat]} for chat in CHATS]
    tokenizer = make_chat_tokenizer()
    dataset = as_dataset(rows)
    given = dataset.map(trl.maybe_convert_to_chatml, remove_columns="conversations") if assistant_only_loss else dataset
    expected = trained(given, tokenizer, assistant_only_loss=assistant_only_loss).counts.tolist()
    for form in (rows, dataset):
        assert counted(TokenCounts.from_chats, form, tokenizer, assistant_only_loss=assistant_only_loss) == expected
    humans = json.loads(json.dumps(rows).replace('"user"', '"human"').replace('"assistant"', '"gpt"'))
    roles = {"human": "user", "gpt": "assistant"}
    got = counted(TokenCounts.from_chats, humans, tokenizer, assistant_only_loss=assistant_only_loss, roles=roles)
    assert got == expected


@both_families
@both_completion
@each_fit
def test_completions_of_text(trained, fit, completion_only_loss, family):
    options = {"completion_only_loss": completion_only_loss, **fit}
    assert_same(trained, TokenCounts.from_completions, WRITTEN, make_chat_tokenizer(family), **options)


def test_tokens_of_prompts_merge_with_those_of_completions():
    """Otherwise the tests above compare nothing that is difficult."""
    tokenizer = make_chat_tokenizer()
    for row in WRITTEN[:2]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"][: len(prompt)] != prompt


@pytest.mark.parametrize("rows", [WRITTEN, PAIRS], ids=["text", "messages"])
def test_defaults_for_completions_are_those_of_the_trainer(trained, rows):
    assert_same(trained, TokenCounts.from_completions, rows, make_chat_tokenizer())


@both_families
@both_completion
def test_completions_that_end_with_eos_get_no_second_one(trained, completion_only_loss, family):
    tokenizer = make_chat_tokenizer(family)
    eos = tokenizer.eos_token
    rows = [{**row, "completion": row["completion"] + eos} for row in WRITTEN]
    rows += [WRITTEN[0], {"prompt": f"x{eos}", "completion": f"the {eos} weather{eos}\n"}]
    assert_same(trained, TokenCounts.from_completions, rows, tokenizer, completion_only_loss=completion_only_loss)


@both_assistant
@both_completion
@each_fit
def test_completions_of_messages(trained, fit, completion_only_loss, assistant_only_loss):
    options = {"completion_only_loss": completion_only_loss, "assistant_only_loss": assistant_only_loss, **fit}
    assert_same(trained, TokenCounts.from_completions, PAIRS, make_chat_tokenizer(), **options)


@both_families
@each_fit
def test_texts(trained, fit, family):
    tokenizer = make_chat_tokenizer(family)
    expected = trained([{"text": text} for text in TEXTS], tokenizer, **fit).counts.tolist()
    assert counted(TokenCounts.from_texts, TEXTS, tokenizer, append_eos=True, **fit) == expected
    ended = [text + tokenizer.eos_token for text in TEXTS]
    for append_eos in (True, False):  # texts that end with it get no second one
        assert counted(TokenCounts.from_texts, ended, tokenizer, append_eos=append_eos, **fit) == expected
    assert trained([{"text": text} for text in ended], tokenizer, **fit).counts.tolist() == expected
    if "max_length" in fit:
        assert counted(TokenCounts.from_texts, ended, tokenizer) != expected, "nothing was cut"


def many(count):
    words = ("weather", "wind", "the north", "🦊", "x")
    return [" ".join(words[(i * j) % 5] for j in range(1, 2 + i % 7)) for i in range(count)]


@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_many_texts_are_packed_a_thousand_at_a_time(trained, packing):
    tokenizer, texts = make_chat_tokenizer(), many(2300)
    options = {"packing": packing, "max_length": 9}
    expected = trained([{"text": text} for text in texts], tokenizer, loader_batch=50, **options).counts.tolist()
    for batch_size in (70, 1000, 10_000):
        got = counted(TokenCounts.from_texts, texts, tokenizer, append_eos=True, batch_size=batch_size, **options)
        assert got == expected


@pytest.mark.parametrize("kind", ["chats", "completions"])
def test_many_rows_of_messages_are_packed_a_thousand_at_a_time(trained, tmp_path, kind):
    messages = [[user(text), assistant(text[::-1])] for text in many(1300)]
    if kind == "chats":
        count, rows = TokenCounts.from_chats, [{"messages": chat} for chat in messages]
    else:
        count, rows = TokenCounts.from_completions, [{"prompt": c[:1], "completion": c[1:]} for c in messages]
    tokenizer = make_chat_tokenizer()
    options = {"packing": "wrapped", "max_length": 50, "assistant_only_loss": True}
    expected = trained(rows, tokenizer, loader_batch=50, **options).counts.tolist()
    assert counted(count, rows, tokenizer, **options) == expected
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        counted(count, interrupted(rows, 1200), tokenizer, checkpoint=path, **options)
    assert TokenCounts.load(path).rows_read == 1000
    assert counted(count, rows, tokenizer, checkpoint=path, **options) == expected


def interrupted(rows, after):
    yield from itertools.islice(rows, after)
    raise KeyboardInterrupt


@both_assistant
def test_batches_and_interruptions_change_nothing(trained, tmp_path, assistant_only_loss):
    tokenizer = make_chat_tokenizer()
    options = {"assistant_only_loss": assistant_only_loss}
    expected = trained(ROWS, tokenizer, **options).counts.tolist()
    for batch_size in (1, 1000):
        assert counted(TokenCounts.from_chats, ROWS, tokenizer, batch_size=batch_size, **options) == expected
    options |= {"checkpoint": tmp_path / "checkpoint", "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        counted(TokenCounts.from_chats, interrupted(ROWS, 3), tokenizer, **options)
    assert TokenCounts.load(tmp_path / "checkpoint").sequences == 2
    assert counted(TokenCounts.from_chats, ROWS, tokenizer, **options) == expected
