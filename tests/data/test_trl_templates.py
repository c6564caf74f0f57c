"""Chat templates of models, tools and options of rows: counted as TRL's SFTTrainer trains on them."""

import json

import pytest
from helpers.chat_tokenizers import CHATML, UNMARKED, make_chat_tokenizer
from helpers.trl_training import (
    CHATS,
    PAIRS,
    ROWS,
    TEMPLATES,
    WEATHER,
    as_dataset,
    assert_same,
    assistant,
    both_assistant,
    counted,
    known_warnings,
    template,
    user,
)

from pdl_kernels import TokenCounts

pytestmark = known_warnings


# Templates that TRL marks itself: the model's own and TRL's. LLaVA-NeXT's takes no texts as contents.
KNOWN = sorted({path.stem.removesuffix("_training") for path in TEMPLATES.glob("*_training.jinja")} - {"llava_next"})
MARKED = [f"{name}{suffix}" for name in KNOWN for suffix in ("", "_training")]


def test_known_templates_are_found():
    assert {"llama3", "llama3_training", "qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training"} <= set(MARKED)
    assert "{% generation" not in template("llama3") + template("qwen2_5") + template("qwen3")


# Without a system's message, which some refuse; all take BOS and EOS from the tokenizer.
ALTERNATING = [{"messages": chat} for chat in CHATS[1:] if len(chat) % 2 == 0]
ALTERNATING_PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in ALTERNATING]


@both_assistant
@pytest.mark.parametrize("name", MARKED)
def test_templates_of_models(trained, name, assistant_only_loss):
    tokenizer = make_chat_tokenizer("llama", template(name))
    options = {"assistant_only_loss": assistant_only_loss}
    assert_same(trained, TokenCounts.from_chats, ALTERNATING, tokenizer, **options)
    assert_same(
        trained, TokenCounts.from_completions, ALTERNATING_PAIRS, tokenizer, completion_only_loss=True, **options
    )


@pytest.mark.parametrize("text", [UNMARKED, template("llama3_1")], ids=["unknown", "llama3_1"])
@pytest.mark.parametrize("kind", ["chats", "completions"])
def test_templates_without_markers(trained, kind, text):
    tokenizer = make_chat_tokenizer("llama", text)
    rows, count = {
        "chats": (ALTERNATING, TokenCounts.from_chats),
        "completions": (ALTERNATING_PAIRS, TokenCounts.from_completions),
    }[kind]
    with pytest.raises(ValueError, match="generation"):
        trained(rows, tokenizer, assistant_only_loss=True)
    with pytest.raises(ValueError, match="generation"):
        counted(count, rows, tokenizer, assistant_only_loss=True)
    assert_same(trained, count, rows, tokenizer, assistant_only_loss=False)


def test_chats_without_an_assistant(trained):
    tokenizer = make_chat_tokenizer()
    rows = [ROWS[0], {"messages": [user("Anyone?")]}, ROWS[1]]
    with pytest.raises(RuntimeError, match="no assistant tokens"):
        trained(rows, tokenizer, assistant_only_loss=True)
    with pytest.raises(ValueError, match="chat 1: no token of this chat is the assistant's"):
        counted(TokenCounts.from_chats, rows, tokenizer)
    expected = trained([rows[0], rows[2]], tokenizer, assistant_only_loss=True).counts.tolist()
    assert counted(TokenCounts.from_chats, rows, tokenizer, skip_empty=True) == expected
    assert_same(trained, TokenCounts.from_chats, rows, tokenizer, assistant_only_loss=False)


def test_completions_without_an_assistant(trained):
    """One in the prompt is enough for the trainer, and then such a row has no target."""
    tokenizer = make_chat_tokenizer()
    rows = [PAIRS[0], {"prompt": WEATHER, "completion": [user("Thanks.")]}]
    assert_same(trained, TokenCounts.from_completions, rows, tokenizer, assistant_only_loss=True)
    rows = [PAIRS[0], {"prompt": WEATHER[:1], "completion": [user("Anyone?")]}]
    with pytest.raises(RuntimeError, match="no assistant tokens"):
        trained(rows, tokenizer, assistant_only_loss=True)
    with pytest.raises(ValueError, match="completion 1: no token of this chat is the assistant's"):
        counted(TokenCounts.from_completions, rows, tokenizer, assistant_only_loss=True)
    assert_same(trained, TokenCounts.from_completions, rows, tokenizer, assistant_only_loss=False)


def function(name, argument):
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": parameters}}


TOOLS = [function("weather", "city")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = [
    user("The weather in Oslo?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "6 degrees"},
    assistant("It is 6 degrees."),
]


@both_assistant
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_training"])
@pytest.mark.parametrize("convert", [list, json.dumps], ids=["list", "JSON"])
def test_tools(trained, convert, name, assistant_only_loss):
    tokenizer = make_chat_tokenizer("qwen", template(name))
    options = {"assistant_only_loss": assistant_only_loss}
    rows = [
        {"messages": CALLING, "tools": convert(TOOLS)},
        {"messages": WEATHER},
        {"messages": WEATHER, "tools": convert([])},
    ]
    assert_same(trained, TokenCounts.from_chats, rows, tokenizer, **options)
    without = counted(TokenCounts.from_chats, [{"messages": row["messages"]} for row in rows], tokenizer, **options)
    same = without == counted(TokenCounts.from_chats, rows, tokenizer, **options)
    assert same == assistant_only_loss, "the template writes tools into the system's turn"
    pairs = [
        {"prompt": CALLING[:1], "completion": CALLING[1:], "tools": convert(TOOLS)},
        {"prompt": WEATHER[:1], "completion": WEATHER[1:]},
    ]
    for completion_only_loss in (True, False):
        options["completion_only_loss"] = completion_only_loss
        assert_same(trained, TokenCounts.from_completions, pairs, tokenizer, **options)


@both_assistant
def test_tools_that_differ_are_counted_as_the_data_set_has_them(trained, assistant_only_loss):
    """A data set fills the columns of tools up with nulls, which the template writes."""
    tokenizer = make_chat_tokenizer("qwen", template("qwen2_5"))
    rows = [{"messages": WEATHER, "tools": [function(*names)]} for names in (("weather", "city"), ("sum", "terms"))]
    dataset = as_dataset(rows)
    expected = trained(dataset, tokenizer, assistant_only_loss=assistant_only_loss).counts.tolist()
    assert counted(TokenCounts.from_chats, dataset, tokenizer, assistant_only_loss=assistant_only_loss) == expected
    texts = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    assert_same(trained, TokenCounts.from_chats, texts, tokenizer, assistant_only_loss=assistant_only_loss)


@both_assistant
def test_options_of_rows_for_the_template(trained, assistant_only_loss):
    tokenizer = make_chat_tokenizer()
    styles = [{"chat_template_kwargs": {"style": style}} for style in ("brief", "as the weather")]
    rows = [{**row, **style} for row in ROWS for style in styles]
    pairs = [{**row, **style} for row in PAIRS for style in styles]
    options = {"assistant_only_loss": assistant_only_loss}
    assert_same(trained, TokenCounts.from_chats, rows, tokenizer, **options)
    assert_same(trained, TokenCounts.from_completions, pairs, tokenizer, completion_only_loss=False, **options)
    if not assistant_only_loss:
        assert counted(TokenCounts.from_chats, rows, tokenizer, **options) != counted(
            TokenCounts.from_chats, ROWS * 2, tokenizer, **options
        )


@both_assistant
@pytest.mark.parametrize("name", ["qwen3", "qwen3_training"])
def test_the_prompt_of_an_answer_without_thinking(trained, name, assistant_only_loss):
    """Alone, it ends with more than the whole has there, or the whole with more than it."""
    tokenizer = make_chat_tokenizer("qwen", template(name))
    for thinking in (True, False):
        rows = [{**row, "chat_template_kwargs": {"enable_thinking": thinking}} for row in PAIRS]
        options = {"completion_only_loss": True, "assistant_only_loss": assistant_only_loss}
        assert_same(trained, TokenCounts.from_completions, rows, tokenizer, **options)


@both_assistant
@pytest.mark.parametrize(
    "kwargs",
    [{"chat_template": CHATML.replace("im_end", "eot_id")}, {"add_generation_prompt": True}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_options_of_rows_go_before_those_of_the_count(trained, kwargs, assistant_only_loss):
    rows = [{**row, "chat_template_kwargs": kwargs} for row in ROWS]
    assert_same(trained, TokenCounts.from_chats, rows, make_chat_tokenizer(), assistant_only_loss=assistant_only_loss)


@both_assistant
@pytest.mark.parametrize("default", [CHATML, template("qwen3")], ids=["marked", "patched"])
def test_templates_with_names(trained, default, assistant_only_loss):
    """Rows with tools take the one for tools, unless TRL replaces the default one: then all take that."""
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = {"default": default, "tool_use": CHATML.replace("im_end", "eot_id")}
    rows = [{"messages": WEATHER, "tools": TOOLS}, {"messages": CHATS[1]}]
    assert_same(trained, TokenCounts.from_chats, rows, tokenizer, assistant_only_loss=assistant_only_loss)


@both_assistant
@pytest.mark.parametrize("text", [CHATML, template("qwen2_5")], ids=["marked", "patched"])
def test_another_template_than_the_tokenizers(trained, tmp_path, text, assistant_only_loss):
    path = tmp_path / "chat.jinja"
    path.write_text(text, encoding="utf-8")
    tokenizer = make_chat_tokenizer("qwen", UNMARKED)
    options = {"assistant_only_loss": assistant_only_loss}
    for count, rows in ((TokenCounts.from_chats, ROWS), (TokenCounts.from_completions, PAIRS)):
        expected = trained(rows, tokenizer, chat_template_path=str(path), **options).counts.tolist()
        assert counted(count, rows, tokenizer, chat_template=text, **options) == expected
    assert tokenizer.chat_template == UNMARKED, "the caller's stays as it was"
