"""`pdl-kernels count` on chats, completions and files of tokens: options, what goes wrong, and going on after it."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sample_data
import transformers
from helpers.command_line import fail, files_here, run, write_json

from pdl_kernels import TokenCounts
from pdl_kernels.data import streams
from pdl_kernels.weights import tally

EOS = 2  # <|im_end|>


@pytest.fixture(autouse=True)
def _samples(_in_a_folder_of_its_own):
    sample_data.write_tokenizer(Path())


def chat(answer, role="assistant", question="what is the cat"):
    return {"messages": [{"role": "user", "content": question}, {"role": role, "content": answer}]}


def count(name, *options):
    return run("count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors", "--overwrite", *options)


def refused(name, *options):
    """The error; nothing is left behind."""
    message = fail(2, "count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors", *options)
    assert not [file for file in files_here() if file.startswith("c.")]
    return message


def template(text):
    Path("template.jinja").write_text(text)
    return ["--chat-template", "template.jinja"]


CHATS = [chat("the cat"), chat("a dog sat"), chat("the mat")]
PAIRS = [{"prompt": "what is ", "completion": answer} for answer in ("the cat", "a dog sat", "the mat")]


# ---------------------------------------------------------------------------------------------------------------------
# What is said and counted


def test_what_is_counted_is_said_before_counting():
    write_json("chats.jsonl", CHATS)
    assert count("chats.jsonl").startswith(
        "counting assistant messages of `messages`, 3 chats; nothing is cut (TRL's own default: whole chats, cut to 1,0"
    )
    assert "counting whole chats of `messages`, 3 chats; cut to 9 tokens (keep_end)\n" in count(
        "chats.jsonl", "--whole-chats", "--max-length", 9, "--truncation-mode", "keep_end"
    )
    write_json("pairs.jsonl", PAIRS)
    assert "counting completions of `completion`, each after `prompt`, 3 rows; EOS is appended; packed (bfd) to 4 " in (
        count("pairs.jsonl", "--packing", "bfd", "--max-length", 4)
    )
    assert "counting prompts and completions of `completion`, each after `prompt`, 3 rows; no EOS" in count(
        "pairs.jsonl", "--with-prompts", "--no-append-eos"
    )
    messages = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHATS]
    write_json("messages.jsonl", messages)
    assert "each after `prompt`, 3 rows; the chat template ends them" in count("messages.jsonl")


@pytest.mark.parametrize("options", [[], ["--max-length", 4], ["--max-length", 3, "--packing", "wrapped"]])
def test_options_of_completions_arrive(options):
    write_json("pairs.jsonl", PAIRS)
    count("pairs.jsonl", *options)
    rows = [[*map(sample_data.WORDS.index, f"what is {row['completion']}".split()), EOS] for row in PAIRS]
    if "wrapped" in options:
        rows = [[token if place > 1 else -100 for place, token in enumerate(row)] for row in rows]
        flat = [token for row in rows for token in row]
        targets = [token for place, token in enumerate(flat) if place % 3 and token != -100]
    else:
        targets = [token for row in rows for token in row[2 : 4 if options else None]]
    expected = np.bincount(targets, minlength=len(sample_data.WORDS))
    assert TokenCounts.load("c.safetensors").counts.tolist() == expected.tolist()


def test_a_template_and_roles_arrive():
    marked = (
        "{% for m in messages %}{% if m.role == 'bot' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    )
    write_json("chats.jsonl", CHATS)
    count("chats.jsonl", *template(marked + "{{ ' ' }}{% endfor %}"), "--role", "assistant=bot", "--skip-empty")
    counts = TokenCounts.load("c.safetensors")
    assert (counts.total, counts.left_out) == (7 - 3, 0), "the template's name for the assistant counts"
    count("chats.jsonl", *template(marked.replace("bot", "assistant") + "{{ ' ' }}{% endfor %}"))
    assert TokenCounts.load("c.safetensors").total == 7 - 3, "the first token of each chat is no target"


def test_empty_rows_are_left_out_and_said():
    write_json("chats.jsonl", [*CHATS, {"messages": None}, {"messages": []}, chat("the", role="user")])
    assert "3 left out" in count("chats.jsonl", "--skip-empty")
    assert TokenCounts.load("c.safetensors").sequences == 3
    empty = [
        {"prompt": None, "completion": "a"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
    ]
    write_json("pairs.jsonl", [*PAIRS, *empty])
    assert "3 left out" in count("pairs.jsonl", "--skip-empty")
    assert TokenCounts.load("c.safetensors").sequences == 3


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("the cat", role="system"), "no token of this chat is the assistant's by the chat template"),
        (chat("the cat", role="gpt"), "its roles are 'user', 'gpt'; accepted are chats with an assistant turn, --role"),
        ({"messages": []}, "messages are empty; accepted is a list of messages with role and content"),
        ({"messages": None}, "messages are a NoneType; accepted is a list of messages"),
        ({"messages": ["hello"]}, "messages hold a str; accepted are objects with a role"),
        ({"messages": [{"content": "the cat"}]}, "a message has no role; it has the keys content"),
        ({"messages": [{"role": "assistant"}]}, "the chat template refuses it ("),
        ({"messages": "hello"}, "messages are a str"),
        ({"message": []}, "has no column 'messages'; accepted by --column are those it has: 'message'"),
        ({**chat("the"), "tools": "{"}, "tools are no JSON (Expecting property name"),
    ],
)
def test_chats_that_cannot_be_counted_are_named(row, message):
    write_json("chats.jsonl", [chat("the cat"), row])
    assert re.search(
        rf"error: chats\.jsonl, line 2:? .*{re.escape(message)}|line 2: {re.escape(message)}", refused("chats.jsonl")
    )


def test_roles_that_the_template_refuses_are_named():
    strict = "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
    options = template(strict + "{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    write_json("chats.jsonl", [*CHATS, chat("the", role="alien")])
    message = refused("chats.jsonl", *options)
    assert (
        "error: chats.jsonl, line 4: the chat template refuses it (no alien); its roles are 'user', 'alien'" in message
    )
    message = refused("chats.jsonl", *template("{% for m in messages %}{{ m.content"), "--whole-chats")
    assert "error: chats.jsonl, line 1: the chat template refuses it (" in message


def test_tokenizers_without_a_template_are_refused():
    write_json("chats.jsonl", CHATS)
    tokenizer = ["--tokenizer", "tokenizer.json", "--output", "c.safetensors"]
    assert "which has no chat template; accepted is a transformers tokenizer" in fail(
        2, "count", "chats.jsonl", *tokenizer
    )
    folder = Path("tokenizer")
    (folder / "chat_template.jinja").unlink()
    assert "the tokenizer has no chat template; accepted is one that has, or --chat-template" in refused("chats.jsonl")
    write_json("pairs.jsonl", PAIRS)
    message = fail(2, "count", "pairs.jsonl", *tokenizer)
    assert (
        "tokenizer.json names no end-of-text token; accepted are a folder, hub name or .gguf that does, and --no-"
        in message
    )
    run("count", "pairs.jsonl", *tokenizer, "--no-append-eos")


def test_a_template_that_marks_nothing_is_refused_as_the_trainer_does():
    pytest.importorskip("trl", minversion="1.16")
    write_json("chats.jsonl", CHATS)
    options = template("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    message = refused("chats.jsonl", *options)
    assert "has no {% generation %} markers" in message
    assert (
        "the trainer would refuse it, too; accepted are a template with them (--chat-template), and whole chats"
        in message
    )
    assert "(--whole-chats)" in message
    count("chats.jsonl", *options, "--whole-chats")


def test_without_trl_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl.chat_template_utils", None)
    write_json("chats.jsonl", CHATS)
    message = refused("chats.jsonl", *template("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"))
    assert (
        "TRL, which replaces the templates of known models, is not installed: pip install 'pdl-kernels[trl]'" in message
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "the completion is empty; accepted is a text; --skip-empty leaves"),
        ({"prompt": "a", "completion": None}, "the completion is null; accepted is text or a list of messages"),
        ({"prompt": None, "completion": "a"}, "the prompt is null; accepted is text"),
        ({"prompt": 5, "completion": "a"}, "the prompt is of type int; accepted is text"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "a"}, "one is text and one a list"),
        ({"prompt": "a"}, "has no column 'completion'"),
    ],
)
def test_completions_that_cannot_be_counted_are_named(row, message):
    write_json("pairs.jsonl", [*PAIRS, row])
    found = refused("pairs.jsonl")
    assert "error: pairs.jsonl, line 4" in found
    assert message in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder-decoder"], "for encoder-decoder models the answers are texts: --kind texts --column completion"),
        (["--no-special-tokens"], "--special-tokens is for texts, and column 'completion' holds completions"),
        (["--ignore-index", 3], "--ignore-index is for labels"),
        (["--packing", "bfd"], "--packing is bfd, and --max-length is missing"),
        (["--role", "gpt=assistant"], "--role is for messages, and column 'completion' holds text"),
        (["--assistant-only-loss"], "--assistant-only-loss is for messages, and column 'completion' holds text"),
        (["--chat-template", "nowhere.jinja"], "--chat-template is for messages"),
        (["--truncation-mode", "keep_end"], "--truncation-mode is for sequences that --max-length cuts"),
        (["--dtype", "uint16"], "--dtype is for .bin files of token ids"),
    ],
)
def test_options_that_completions_do_not_take(options, message):
    write_json("pairs.jsonl", PAIRS)
    arguments = ["pairs.jsonl", "--tokenizer", "tokenizer", "--output", "c.safetensors", *options]
    assert message in fail(2, "count", *arguments)


def test_packing_needs_a_causal_model():
    Path("corpus.txt").write_text("the cat\n")
    options = ["--packing", "bfd", "--max-length", 4, "--encoder-decoder"]
    assert "--packing is for causal models, and --encoder-decoder came with it" in refused("corpus.txt", *options)


def test_files_of_tokens_that_cannot_be_counted():
    np.array([5, 6, 99], np.uint16).tofile("a.bin")
    assert "error: a.bin: token 2 is 99; accepted are ids from 0 to 14" in refused("a.bin", "--dtype", "uint16")
    Path("b.bin").write_bytes(b"abc")
    assert "error: b.bin has 3 bytes, which is no whole number of ids of uint16" in refused(
        "b.bin", "--dtype", "uint16"
    )
    assert "b.bin does not tell the dtype of its ids, and --dtype is missing" in refused("b.bin")
    sample_data.write_megatron(Path("m"), np.array(sample_data.STREAM, np.uint16), [4, 3, 4])
    assert "error: m.idx does not fit m.bin: it announces 11 ids of uint16, and the file has 20 bytes" in refused(
        "m.bin"
    )


def test_roles_and_templates_that_cannot_be_read():
    write_json("chats.jsonl", CHATS)
    assert "--role is 'gpt'; accepted is NAME=ROLE, such as gpt=assistant" in refused("chats.jsonl", "--role", "gpt")
    message = refused("chats.jsonl", "--chat-template", "nowhere.jinja")
    assert "--chat-template is nowhere.jinja, which cannot be read" in message
    Path("latin.jinja").write_bytes(b"caf\xe9")
    assert "--chat-template is latin.jinja, which cannot be read" in refused(
        "chats.jsonl", "--chat-template", "latin.jinja"
    )
    write_json("chats.jsonl", [{**CHATS[0], "chat_template_kwargs": "x"}])
    assert "chats.jsonl, line 1: chat_template_kwargs are of type str; accepted is an object" in refused("chats.jsonl")


def test_skipping_hides_nothing_but_emptiness():
    write_json("chats.jsonl", [chat("the", role="gpt")])
    assert "no token of this chat is the assistant's" in refused("chats.jsonl", "--skip-empty")
    write_json("chats.jsonl", [*CHATS, {"messages": "a text"}])
    assert "chats.jsonl, line 4: messages are a str" in refused("chats.jsonl", "--skip-empty")
    write_json("pairs.jsonl", [*PAIRS, {"prompt": "a", "completion": 0}])
    assert "pairs.jsonl, line 4: the completion is of type int" in refused("pairs.jsonl", "--skip-empty")


def test_labels_are_not_replaced_by_what_lies_beside_them():
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]
    write_json("late.jsonl", rows)
    assert "late.jsonl, line 1 has no column 'labels'" in refused("late.jsonl", "--causal")
    write_json("numbers.jsonl", [{"input_ids": [1, 2], "labels": 1}])
    assert "has the columns 'input_ids' (lists of ids), 'labels' (int), which cannot be" in refused(
        "numbers.jsonl", "--causal"
    )


def test_chats_and_headers_are_no_texts():
    Path("chats.csv").write_text('messages\n"[{}]"\n')
    assert "chats.csv has the columns 'messages' (strings), which cannot be read" in refused("chats.csv")
    Path("semicolons.csv").write_text("a;text\n1;the cat\n")
    assert "semicolons.csv has the columns 'a;text' (strings), which cannot be read" in refused("semicolons.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def big(kind):
    """A file of many batches, and options."""
    rows = [chat(f"the cat {'sat ' * (row % 7)}") for row in range(3500)]
    if kind == "gz":
        Path("big.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        return "big.jsonl.gz", []
    if kind == "array":
        Path("big.json").write_text(json.dumps(rows))
        return "big.json", []
    if kind == "token file":
        np.tile(np.array(sample_data.STREAM, np.uint16), 350).tofile("big.bin")
        return "big.bin", ["--dtype", "uint16", "--separator", EOS, "--documents"]
    texts = [row["messages"][1]["content"] for row in rows]
    write_json(
        "big.jsonl", [{"prompt": "what ", "completion": text if row % 5 else ""} for row, text in enumerate(texts)]
    )
    return "big.jsonl", ["--skip-empty", *(["--packing", "wrapped", "--max-length", 5] if kind == "wrapped" else [])]


@pytest.mark.parametrize("kind", ["gz", "array", "token file", "completions", "wrapped"])
def test_an_interrupted_count_goes_on_without_counting_a_row_twice(kind, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_IDS", 1000)
    name, options = big(kind)
    run("count", name, "--tokenizer", "tokenizer", "--output", "whole.safetensors", *options)
    whole = TokenCounts.load("whole.safetensors")
    add = tally.Tally._add
    for batch in range(1, 3):
        calls = []

        def interrupted(counts, *arguments, calls=calls, batch=batch):
            calls.append(arguments)
            if len(calls) > batch:
                raise KeyboardInterrupt
            return add(counts, *arguments)

        with monkeypatch.context() as patches:
            patches.setattr(tally.Tally, "_add", interrupted)
            message = fail(130, "count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors", *options)
        assert "c.safetensors.partial keeps the work so far; --resume goes on" in message
        part = TokenCounts.load("c.safetensors.partial")
        assert 0 < part.total < whole.total
        run("count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors", *options, "--resume")
        counts = TokenCounts.load("c.safetensors")
        assert counts == whole
        assert counts.left_out == whole.left_out == (700 if kind in ("completions", "wrapped") else 0)
        Path("c.safetensors").unlink()


@pytest.mark.parametrize(
    "change",
    [["--whole-chats"], ["--max-length", 5], ["--role", "user=human"], ["--prompt", "{prompt}who "], "template"],
)
def test_another_setting_is_not_gone_on_with(change, monkeypatch):
    name, _ = big("gz")
    if change[0] == "--prompt":
        name = write_json("big.jsonl", PAIRS * 1000)
    add, calls = tally.Tally._add, []

    def interrupted(counts, *arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return add(counts, *arguments)

    with monkeypatch.context() as patches:
        patches.setattr(tally.Tally, "_add", interrupted)
        fail(130, "count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors")
    options = template(sample_data.TEMPLATE + " ") if change == "template" else change
    message = fail(2, "count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors", "--resume", *options)
    assert "holds counts of" in message
    assert Path("c.safetensors.partial").exists()


def test_what_was_read_of_a_file_that_is_cut_short_is_not_the_result(monkeypatch):
    name, _ = big("gz")
    rows = "".join(json.dumps(chat(f"the cat {row}")) + "\n" for row in range(20_000)).encode()
    Path(name).write_bytes(gzip.compress(rows)[:-2000])
    message = fail(2, "count", name, "--tokenizer", "tokenizer", "--output", "c.safetensors")
    assert "error: big.jsonl.gz is damaged after line" in message
    assert "c.safetensors.partial keeps the work so far" in message
    assert not Path("c.safetensors").exists()
    assert TokenCounts.load("c.safetensors.partial").sequences % 1000 == 0


def test_places_are_not_looked_up_where_nothing_is_wrong():
    """Each would read the file again from its start."""
    for method, rows in (("from_chats", CHATS), ("from_completions", PAIRS), ("from_texts", ["the cat", "a dog"])):

        class Rows(list):
            def place(self, row):
                raise AssertionError(row)

        tokenizer = transformers.AutoTokenizer.from_pretrained("tokenizer")
        assert getattr(TokenCounts, method)(Rows(rows), tokenizer, progress=False).total > 0
