"""Pairs as ids, what the frozen layers make of them, and how they are put together in batches."""

import pytest
import torch
from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.quality import EOS, made_up_pairs, make_encoded, make_model, make_task

from benchmarks.quality import encoding
from benchmarks.quality.encoding import (
    IGNORED,
    Encoded,
    batches_of_similar_length,
    encode,
    encode_those_that_fit,
    run_below,
)
from benchmarks.quality.errors import UserError
from benchmarks.quality.tasks.pairs import Pair

PAIR = Pair(("What is it?", "The wind.", "And today?"), "The weather is fine.", "g")


def test_a_pair_is_asked_in_the_template_and_answered_up_to_eos():
    tokenizer = make_chat_tokenizer()
    (found,) = encode([PAIR], make_task(), tokenizer)
    assert tokenizer.decode(found.prompt) == (
        "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nThe wind.<|im_end|>\n<|im_start|>user\nAnd today?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(found.targets) == "The weather is fine.<|im_end|>"
    assert found.inputs == [*found.prompt, *found.targets[:-1]]


def test_nothing_is_put_in_front_of_a_reference():
    tokenizer = make_chat_tokenizer(family="llama")  # it puts BOS before every text
    (found,) = encode([PAIR], make_task(), tokenizer)
    assert tokenizer.decode(found.targets) == "The weather is fine.<|eot_id|>"


def test_a_template_that_refuses_the_messages_is_told():
    tokenizer = make_chat_tokenizer(chat_template="{{ raise_exception('no system message, please') }}")
    with pytest.raises(UserError, match=r"refuses the messages of dialogue: no system message, please"):
        encode([PAIR], make_task(), tokenizer)


def test_many_pairs_are_encoded_as_each_by_itself():
    tokenizer, task = make_chat_tokenizer(), make_task()
    pairs = [*made_up_pairs(5), PAIR]
    assert encode(pairs, task, tokenizer) == [encode([pair], task, tokenizer)[0] for pair in pairs]


def test_pairs_beyond_the_tasks_limits_are_left_out(monkeypatch):
    monkeypatch.setattr(encoding, "PAIRS_AT_A_TIME", 7)
    tokenizer, task = make_chat_tokenizer(), make_task()
    pairs = made_up_pairs(30)
    every = list(zip(pairs, encode(pairs, task, tokenizer), strict=True))
    assert encode_those_that_fit(pairs, task, tokenizer) == every
    longest_prompt = max(len(ids.prompt) for _, ids in every)
    longest_targets = max(len(ids.targets) for _, ids in every)
    shorter = encode_those_that_fit(pairs, make_task(prompt_tokens=longest_prompt - 1), tokenizer)
    assert shorter == [(pair, ids) for pair, ids in every if len(ids.prompt) < longest_prompt]
    shorter = encode_those_that_fit(pairs, make_task(new_tokens=longest_targets - 1), tokenizer)
    assert shorter == [(pair, ids) for pair, ids in every if len(ids.targets) < longest_targets]
    assert 0 < len(shorter) < len(every)
    assert encode_those_that_fit(pairs, make_task(prompt_tokens=longest_prompt), tokenizer) == every
    assert encode_those_that_fit(pairs, make_task(new_tokens=longest_targets), tokenizer) == every


def test_a_reference_without_a_token_is_left_out():
    assert encode_those_that_fit([Pair(("Hi!",), "", "g")], make_task(), make_chat_tokenizer()) == []


# Batches


def test_batches_are_as_full_as_their_padding_allows():
    lengths = [3, 50, 4, 4, 9, 1, 10, 10, 2]
    batches = list(batches_of_similar_length(lengths, tokens=20))
    assert batches == [[5, 8, 0, 2, 3], [4, 6], [7], [1]]  # 5 x 4, 2 x 10, 10, and one that is longer by itself
    assert list(batches_of_similar_length([], tokens=20)) == []


@pytest.mark.parametrize("trained_layers", [2, None])
def test_the_frozen_layers_see_each_pair_as_if_it_were_alone(trained_layers, monkeypatch):
    model, whole = make_model(trained_layers)
    encoded = make_encoded(9)
    monkeypatch.setattr(encoding, "batches_of_similar_length", lambda lengths: [[0, 5, 1], [2, 3, 4, 8], [6, 7]])
    states = run_below(model, encoded, "tests")
    assert len(states) == 9
    assert states.encoded == encoded
    for row, one in enumerate(encoded):
        found = states.values[states.offsets[row] : states.offsets[row + 1]]
        ids = torch.tensor([one.inputs])
        if trained_layers is None:
            assert found.tolist() == one.inputs
            continue
        expected = whole.model(ids, output_hidden_states=True).hidden_states[model.cut][0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained_layers", [2, None])
def test_a_batch_is_padded_on_the_right_and_labels_stand_where_a_target_is_predicted(trained_layers):
    model, _ = make_model(trained_layers)
    encoded = [Encoded([5, 6, 7], [8, EOS]), Encoded([9], [10, 11, 12, EOS]), Encoded([13, 14], [EOS])]
    states = run_below(model, encoded, "tests")
    assert states.offsets == [0, 4, 8, 10]
    inputs, labels = states.batch([2, 0])
    no = IGNORED
    assert labels.tolist() == [[no, EOS, no, no], [no, no, 8, EOS]]
    assert torch.equal(inputs[0, :2], states.values[8:10])
    assert torch.equal(inputs[1], states.values[0:4])
    assert inputs[0, 2:].count_nonzero() == 0
    assert inputs.dtype == states.values.dtype
    assert states.batch([1])[1].tolist() == [[10, 11, 12, EOS]]
