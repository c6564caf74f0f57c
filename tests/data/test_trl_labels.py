"""Texts, completions and chats are counted as the batches of TRL's SFTTrainer have them as labels."""

import copy
import itertools
import json
from pathlib import Path

import pytest
from helpers.chat_tokenizers import CHATML, UNMARKED, make_chat_tokenizer

from pdl_kernels import TokenCounts

trl = pytest.importorskip("trl", minversion="1.16", reason="compares with SFTTrainer of TRL 1.16")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SIZE = 20
FITS = {
    "whole": {},
    "keep_start": {"max_length": SIZE},
    "keep_end": {"max_length": SIZE, "truncation_mode": "keep_end"},
    "bfd": {"max_length": SIZE, "packing": "bfd"},
    "bfd_split": {"max_length": SIZE, "packing": "bfd_split"},
    "wrapped": {"max_length": SIZE, "packing": "wrapped"},
    "padding_free": {"padding_free": True},
    "shuffled": {"max_length": SIZE, "packing": "bfd", "shuffle_dataset": True},
}
each_fit = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
both_assistant = pytest.mark.parametrize("assistant_only_loss", [True, False], ids=["assistant", "everyone"])
both_completion = pytest.mark.parametrize("completion_only_loss", [True, False], ids=["completion", "all"])
both_families = pytest.mark.parametrize("family", ["qwen", "llama"])


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


WEATHER = [user("What is the weather like?"), assistant("The weather is fine.")]
CHATS = [
    [system("You are a helpful assistant."), *WEATHER],
    [*WEATHER, user("And in the north?"), assistant("Whatever it is today."), user("Sure?"), assistant("No.")],
    [user("Wie heißt das auf 日本語? 🦊"), assistant("狐 — naïve Füchse 🦊🦊, ﬁne"), user("Danke!")],
    [user("  two \n"), assistant("\n\nbegins and ends with a line\n"), user("\n"), assistant(" spaces ")],
    [user("What will the weather be in the north today, and whatever is the wind like?"), assistant("Wind.")],
]
ROWS = [{"messages": chat} for chat in CHATS]
PAIRS = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in (CHATS[0], CHATS[1], CHATS[3], CHATS[4])] + [
    {"prompt": CHATS[1][:1], "completion": CHATS[1][1:]},
    {"prompt": [system("Be brief.")], "completion": WEATHER},
    {"prompt": CHATS[1][:2], "completion": [assistant("It goes on."), user("Does it?")]},
]
TEXTS = [
    "The weather is fine; the wind is weaker than yesterday, and whatever will it be?",
    "What is the weather like in the north today?\n",
    "naïve Füchse 🦊🦊, 日本語 ",
    "",
    "x",
]
WRITTEN = [
    {"prompt": "What is the wea", "completion": "ther like in the north today, and whatever will it be?"},
    {"prompt": "Count the to", "completion": "kens that a model is trained on, not the tokens of the prompts."},
    {"prompt": "The wind is fine:\n", "completion": "\n\nweaker than yesterday.\n"},
    {"prompt": "naïve Füchse ", "completion": " 🦊🦊 日本語"},
    {"prompt": "", "completion": "the weather"},
    {"prompt": "Count the tokens that a model is trained on, not the tokens of the prompts: ", "completion": "x"},
]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def trained(tmp_path):
    """A function that counts the labels in the batches of a trainer of `rows`."""

    def count(rows, tokenizer, *, packing=None, loader_batch=2, **options):
        tokenizer = copy.deepcopy(tokenizer)  # the trainer gives it a padding token
        sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 8)
        heads = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
        options = {"max_length": None, "packing": packing is not None} | options
        if packing is not None:
            options["packing_strategy"] = packing
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            per_device_train_batch_size=loader_batch,
            **options,
        )
        trainer = trl.SFTTrainer(
            transformers.LlamaForCausalLM(config),
            args=arguments,
            train_dataset=as_dataset(rows),
            processing_class=tokenizer,
        )
        counts = TokenCounts.from_dataloader(trainer.get_train_dataloader(), len(tokenizer), progress=False)
        assert counts.total > 0
        return counts

    return count


def as_dataset(rows):
    return datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows


def counted(count, rows, tokenizer, padding_free=False, shuffle_dataset=False, **options):
    """What `count` counts, given the options of the trainer without those that change no targets."""
    return count(rows, tokenizer, progress=False, **options).counts.tolist()


def assert_same(trained, count, rows, tokenizer, **options):
    """The rows give the same counts as a list, as a data set and to the trainer."""
    expected = trained(rows, tokenizer, **options).counts.tolist()
    assert counted(count, rows, tokenizer, **options) == expected
    assert counted(count, as_dataset(rows), tokenizer, **options) == expected
    if "max_length" in options:
        whole = {name: value for name, value in options.items() if name.endswith("_loss")}
        assert counted(count, rows, tokenizer, **whole) != expected, "nothing was cut"


def template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


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
    assert counted(TokenCounts.from_texts, ended, tokenizer, **fit) == expected
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
