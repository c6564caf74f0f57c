"""Weights of tokens in the upper half of labels come out as they went in, and those of messages on their own tokens."""

import math

import numpy as np
import pytest
import torch
from helpers.chat_tokenizers import CHATML, make_chat_tokenizer
from helpers.trl_training import CHATS, assistant, system, template, user
from hypothesis import given
from hypothesis import strategies as st

from pdl_kernels.data.batches import RowName
from pdl_kernels.data.chats import ChatTemplate
from pdl_kernels.data.token_weights import has_message_weights, join, message_factors, split

IGNORED = -100
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LABELS = st.just(IGNORED) | st.integers(0, 2**31 - 1)
EDGES = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38, -3.4028234663852886e38, 1 / 3]


def bits(values):
    """float32 -> int32, which tell 0 from -0."""
    return np.asarray(values, np.float32).view(np.int32).tolist()


def assert_round_trip(labels, factors):
    codes = join(labels, factors, "")
    assert codes.dtype == np.int64
    got, weights = split(torch.from_numpy(codes))
    assert (got.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert got.tolist() == labels
    every = factors if isinstance(factors, list) else [factors] * len(labels)
    expected = [0.0 if label == IGNORED else factor for label, factor in zip(labels, every, strict=True)]
    assert bits(weights) == bits(expected)
    assert (codes == IGNORED).tolist() == [label == IGNORED for label in labels]


# ---------------------------------------------------------------------------------------------------------------------
# Into the labels and out again


@given(st.lists(st.tuples(LABELS, FLOATS), max_size=20))
def test_every_label_and_number_comes_back(pairs):
    assert_round_trip([label for label, _ in pairs], [factor for _, factor in pairs])


@pytest.mark.parametrize("label", [0, 1, IGNORED, 2**31 - 1, 2**31, 2**32 - 1])
def test_edges(label):
    assert_round_trip([label] * len(EDGES), EDGES)


@given(LABELS, FLOATS)
def test_one_number_for_all(label, factor):
    assert_round_trip([label, IGNORED, 7], factor)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda values: np.array(values, np.int32)])
def test_kinds_of_labels_and_numbers(kind):
    codes = join(kind([3, IGNORED, 5]), torch.tensor([0.5, 2, -1]), "")
    assert codes.tolist() == join([3, IGNORED, 5], [0.5, 2, -1], "").tolist()


def test_any_shape_of_a_batch_comes_out():
    codes = torch.from_numpy(join(list(range(24)), [float(i) for i in range(24)], "")).view(2, 3, 4)
    labels, weights = split(codes)
    assert torch.equal(labels, torch.arange(24).view(2, 3, 4))
    assert torch.equal(weights, torch.arange(24.0).view(2, 3, 4))


def test_the_callers_numbers_are_left_alone():
    labels, factors = np.array([1, IGNORED]), np.array([2.0, 3.0], np.float32)
    codes = torch.from_numpy(join(labels, factors, ""))
    before = codes.clone()
    split(codes)
    assert torch.equal(codes, before)
    assert (labels.tolist(), factors.tolist()) == ([1, IGNORED], [2.0, 3.0])


@pytest.mark.parametrize("factors", [[], [1.0], [1.0] * 4, [[1.0] * 3], [[1.0]] * 3], ids=str)
def test_another_number_of_factors(factors):
    with pytest.raises(ValueError, match=r"weights of row 7 are .* values; accepted are a number, or 3 numbers"):
        join([1, 2, 3], factors, "weights of row 7")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(bad):
    for factors in (bad, [1.0, bad]):
        with pytest.raises(ValueError, match=f"weights of row 7 hold {bad}; accepted are finite numbers"):
            join([1, 2], factors, "weights of row 7")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_number_past_float32_is_not_finite():
    with pytest.raises(ValueError, match="accepted are finite numbers"):
        join([1, 2], [1.0, 1e39], "")


@pytest.mark.parametrize("factors", ["heavy", ["a", "b"], [1.0, {}], {"a": 1}, [[1.0], [1.0, 2.0]]], ids=str)
def test_what_is_no_number(factors):
    with pytest.raises(ValueError, match=r"weights of row 7 are .*; accepted are numbers"):
        join([1, 2], factors, "weights of row 7")


@pytest.mark.parametrize("factors", [None, [1.0, None]], ids=str)
def test_a_missing_number(factors):
    with pytest.raises(ValueError, match="weights of row 7"):
        join([1, 2], factors, "weights of row 7")


@pytest.mark.parametrize("factors", ["1.5", ["1", "2"]], ids=str)
def test_text_is_no_number_even_if_it_reads_as_one(factors):
    with pytest.raises(ValueError, match=r"weights of row 7 are .*; accepted are numbers"):
        join([1, 2], factors, "weights of row 7")


@pytest.mark.parametrize("label", [-1, -99, -101, 2**32, 2**40])
def test_a_label_that_does_not_fit_into_the_lower_half(label):
    """It would come out as another label, with another weight."""
    with pytest.raises(ValueError, match="label"):
        join([1, label], 1.0, "weights of row 7")


# ---------------------------------------------------------------------------------------------------------------------
# Messages


# Some of those that TRL marks itself, of which the first ones are shown otherwise without TRL's markers.
KNOWN = ("qwen3", "qwen3_5_think", "qwen2_5", "llama3", "gemma3", "phi3", "deepseekv3", "gptoss", "glm4moe")
WHERE = RowName(lambda _: "row 7", 0)
FIRST, SECOND = "The weather is fine.", "Whatever it is today."
# Two turns that are shown without anything between them.
MERGING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content + ': ' }}{% endif %}{% endfor %}"
)


def weighted(content, weight):
    return assistant(content) | {"weight": weight}


def factors_of(messages, chat_template=CHATML, family="qwen", row=None):
    """Ids and factors; the tokenizer."""
    tokenizer = make_chat_tokenizer(family, chat_template)
    read = ChatTemplate(tokenizer, None, assistant_only=True, roles=None)
    return *message_factors(row or {}, messages, read, WHERE), tokenizer


def factors_within(text, ids, factors, tokenizer):
    """The factors of the tokens that hold nothing but this text, which is there once."""
    ends = [len(tokenizer.decode(ids[: end + 1], clean_up_tokenization_spaces=False)) for end in range(len(ids))]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert whole.count(text) == 1
    begin = whole.index(text)
    inside = [begin <= start and end <= begin + len(text) for start, end in zip([0, *ends], ends, strict=False)]
    found = [factor for factor, is_inside in zip(factors, inside, strict=True) if is_inside]
    assert len(found) > 1
    return found


TEMPLATES_AND_FAMILIES = [
    pytest.param(CHATML, "qwen", id="chatml of qwen"),
    pytest.param(CHATML, "llama", id="chatml of llama"),
    *(pytest.param(name, "llama", id=name) for name in (*KNOWN, "qwen3_training", "llama3_training")),
]


@pytest.mark.parametrize(("name", "family"), TEMPLATES_AND_FAMILIES)
def test_each_turn_has_its_own_weight(name, family):
    text = name if name == CHATML else template(name)
    chat = [user("What is it like?"), weighted(FIRST, -2.5), user("And in the north?"), weighted(SECOND, 0.25)]
    ids, factors, tokenizer = factors_of(chat, text, family)
    assert len(ids) == len(factors)
    assert set(factors_within(FIRST, ids, factors, tokenizer)) == {-2.5}
    assert set(factors_within(SECOND, ids, factors, tokenizer)) == {0.25}
    for said in ("What is it like?", "And in the north?"):
        assert set(factors_within(said, ids, factors, tokenizer)) == {1.0}
    # Every token that is trained on has the weight of its turn, whatever the template puts around its text.
    read = ChatTemplate(tokenizer, None, assistant_only=True, roles=None)
    ((_, labels),) = read.labels([(0, (chat, {}))], lambda _: "")
    turns = [factor for factor, label in zip(factors, labels.tolist(), strict=True) if label != IGNORED]
    assert turns == [-2.5] * turns.count(-2.5) + [0.25] * turns.count(0.25)
    assert factors.count(1.0) == len(factors) - len(turns)


@pytest.mark.parametrize("weight", [0, 0.0, -1, 3, 1.5])
def test_weights_of_any_sign(weight):
    ids, factors, tokenizer = factors_of([user("So?"), weighted(FIRST, weight)])
    assert set(factors_within(FIRST, ids, factors, tokenizer)) == {weight}
    assert 1.0 in factors, "the user's tokens"


@pytest.mark.parametrize("message", [weighted(SECOND, None), assistant(SECOND)], ids=["none", "no key"])
def test_a_message_without_a_weight_has_1(message):
    ids, factors, tokenizer = factors_of([user("So?"), weighted(FIRST, 3.0), user("And?"), message])
    assert set(factors_within(FIRST, ids, factors, tokenizer)) == {3.0}
    assert set(factors_within(SECOND, ids, factors, tokenizer)) == {1.0}


def test_chats_that_end_with_the_user():
    ids, factors, tokenizer = factors_of([user("So?"), weighted(FIRST, 3.0), user("Thank you!")])
    assert set(factors_within(FIRST, ids, factors, tokenizer)) == {3.0}
    assert set(factors_within("Thank you!", ids, factors, tokenizer)) == {1.0}


def test_from_and_value():
    chat = [{"from": "user", "value": "So?"}, {"from": "assistant", "value": FIRST, "weight": 3.0}]
    assert factors_of(chat)[:2] == factors_of([user("So?"), weighted(FIRST, 3.0)])[:2]


def test_options_of_a_row_reach_the_template():
    chat = [user("So?"), weighted(FIRST, 3.0)]
    plain, _, _ = factors_of(chat)
    ids, factors, tokenizer = factors_of(chat, row={"chat_template_kwargs": {"style": "brief"}})
    assert len(ids) > len(plain)
    assert set(factors_within(FIRST, ids, factors, tokenizer)) == {3.0}


@pytest.mark.parametrize("message", [user("So?"), system("Be brief.")], ids=["user", "system"])
@pytest.mark.parametrize("weight", [0, 0.5, -1, 2])
def test_a_weight_on_what_the_assistant_does_not_say(message, weight):
    with pytest.raises(ValueError, match=rf"row 7: a message of '{message['role']}' has the weight {weight}; accepted"):
        factors_of([message | {"weight": weight}, weighted(FIRST, 3.0)])


@pytest.mark.parametrize("weight", [None, 1, 1.0])
def test_a_weight_that_says_nothing_may_stand_anywhere(weight):
    chat = [user("So?"), weighted(FIRST, 3.0)]
    assert factors_of([chat[0] | {"weight": weight}, chat[1]])[:2] == factors_of(chat)[:2]


def test_two_messages_of_the_assistant_in_a_row():
    """A template shows them as one turn or as two, and a turn in two parts as two: they are refused."""
    chat = [user("So"), weighted(FIRST, 3.0), weighted(SECOND, -1.0)]
    with pytest.raises(ValueError, match="row 7: the assistant has two messages in a row"):
        factors_of(chat)


def test_a_turn_that_the_template_leaves_out():
    last_only = MERGING.replace("messages %}", "messages[-2:] %}")
    with pytest.raises(ValueError, match="shows 1 turns of the assistant, and there are 2"):
        factors_of([user("a"), weighted(FIRST, 3.0), user("b"), weighted(SECOND, -1.0)], last_only)


def test_a_turn_in_two_parts_is_not_taken_for_two_turns():
    """Gemma's template shows a call and what is said with it apart; two turns after it are shown as one."""
    parts = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.reasoning %}{% generation %}{{ m.reasoning }}{% endgeneration %}{{ ' | ' }}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content + ': ' }}{% endif %}{% endfor %}"
    )
    call = weighted("I call it.", 5.0) | {"reasoning": "Think hard."}
    chat = [user("So"), call, user("sun"), weighted(FIRST, 3.0), weighted(SECOND, -1.0)]
    try:
        ids, factors, tokenizer = factors_of(chat, parts)
    except ValueError:
        return  # refused, which is right as well
    assert set(factors_within("I call it.", ids, factors, tokenizer)) == {5.0}
    assert set(factors_within(FIRST, ids, factors, tokenizer)) == {3.0}
    assert set(factors_within(SECOND, ids, factors, tokenizer)) == {-1.0}


def test_rows_with_weights_are_found():
    with_weight = [CHATS[0][0], weighted(FIRST, 0.0)]
    assert has_message_weights({"messages": with_weight})
    assert has_message_weights({"prompt": CHATS[0], "completion": with_weight[1:]})
    assert not has_message_weights({"messages": CHATS[0]})
    assert not has_message_weights({"messages": [weighted(FIRST, None)]})
    assert not has_message_weights({"prompt": "weight", "completion": "weight", "weight": 2.0})
