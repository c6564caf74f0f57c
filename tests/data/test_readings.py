"""How columns are read, by their names and by what they hold; what the user's wishes change, and what is refused."""

import json
from pathlib import Path

import pytest

from pdl_kernels.data.contents import EMPTY, IDS, MESSAGES, NULL, STRINGS, Content, held_by, held_by_type
from pdl_kernels.data.corpora import open_corpus
from pdl_kernels.data.readings import PAIRS, choose, prompt_of

# Columns of rows; of which the completions, and what comes before them where a column holds its name in capitals.
COMPLETIONS = [
    (("prompt", "completion"), "completion", "PROMPT"),
    (("prompt", "response"), "response", "PROMPT"),
    (("instruction", "output"), "output", "INSTRUCTION\n"),
    (("instruction", "input", "output"), "output", "INSTRUCTION\nINPUT\n"),
    (("instruction", "response"), "response", "INSTRUCTION\n"),
    (("instruction", "context", "response"), "response", "INSTRUCTION\nCONTEXT\n"),
    (("instruction", "input", "response"), "response", "INSTRUCTION\nINPUT\n"),
    (("question", "answer"), "answer", "QUESTION\n"),
    (("query", "response"), "response", "QUERY\n"),
    (("document", "summary"), "summary", "DOCUMENT\n"),
    (("dialogue", "summary"), "summary", "DIALOGUE\n"),
    (("article", "highlights"), "highlights", "ARTICLE\n"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(columns, kind=None, column=None, prompt=None):
    """What columns are read as; a tuple of names stands for columns of strings."""
    holds = columns if isinstance(columns, dict) else dict.fromkeys(columns, STRINGS)
    contents = {name: Content(found, f"rows.jsonl, line {line}") for line, (name, found) in enumerate(holds.items(), 3)}
    return choose(contents, "rows.jsonl", kind, column, prompt)


def refused(columns, *wishes):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the tests look into the message
        read(columns, *wishes)
    return str(caught.value)


def in_capitals(columns):
    return {name: name.upper() for name in columns}


def rows_of(rows, **wishes):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(open_corpus(["rows.jsonl"], **wishes).rows)


# ---------------------------------------------------------------------------------------------------------------------
# What the names say


@pytest.mark.parametrize(("columns", "column", "prompt"), COMPLETIONS)
def test_completions_by_their_names(columns, column, prompt):
    others = ("id", "title", "score")
    for order in ((*columns, *others), (*others, *reversed(columns))):
        found = read(order)
        assert (found.kind, found.column) == ("completions", column)
        assert set(found.columns) <= set(columns)
        assert found.prompt.of(in_capitals(order)) == prompt
    (row,) = rows_of([in_capitals((*columns, *others))])
    assert (row["prompt"], row["completion"]) == (prompt, column.upper())


def test_every_pair_of_names_is_tried_here():
    tried = {(column, columns[0]) for columns, column, _ in COMPLETIONS} | {("summary", "text")}
    assert tried == {(column, prompt[0]) for column, prompt, _ in PAIRS}


@pytest.mark.parametrize(
    ("columns", "kind", "column"),
    [
        ({"messages": MESSAGES, "id": STRINGS}, "chats", "messages"),
        ({"conversations": MESSAGES, "system": STRINGS, "tools": STRINGS}, "chats", "conversations"),
        ({"messages": NULL, "id": STRINGS}, "chats", "messages"),
        ({"messages": EMPTY, "id": STRINGS}, "chats", "messages"),
        ({"prompt": MESSAGES, "completion": MESSAGES}, "completions", "completion"),
        ({"prompt": STRINGS, "completion": NULL}, "completions", "completion"),
        ({"text": STRINGS, "meta": "dict"}, "texts", "text"),
        ({"text": NULL, "url": STRINGS}, "texts", "text"),
        ({"labels": IDS, "input_ids": IDS, "attention_mask": IDS}, "labels", "labels"),
        ({"labels": EMPTY, "n": "int"}, "labels", "labels"),
        ({"input_ids": IDS, "attention_mask": IDS}, "labels", "input_ids"),
        # The only column, whatever it is called.
        ({"content": STRINGS}, "texts", "content"),
        ({"dialog": MESSAGES}, "chats", "dialog"),
        ({"tokens": IDS}, "labels", "tokens"),
    ],
)
def test_other_kinds_by_names_and_contents(columns, kind, column):
    found = read(columns)
    assert (found.kind, found.column, found.prompt is None) == (kind, column, kind != "completions")


@pytest.mark.parametrize(
    ("columns", "names", "wishes"),
    [
        (("text", "summary"), ["texts (`text`)", "completions (`summary`"], {
            ("texts", None, None): "texts text", ("completions", None, None): "completions summary",
            (None, "text", None): "texts text", (None, "summary", None): "completions summary",
            (None, None, "text"): "completions summary", ("texts", "summary", None): "texts summary"}),
        (("instruction", "input", "output", "text"), ["completions (`output`", "texts (`text`)"], {
            ("completions", None, None): "completions output", (None, "text", None): "texts text",
            ("texts", "input", None): "texts input"}),
        (("prompt", "instruction", "response"), ["after `prompt`", "after `instruction`"], {
            (None, "response", "prompt"): "completions response", (None, None, "prompt"): "completions response",
            ("completions", None, "{instruction}: "): "completions response"}),
        ({"prompt": STRINGS, "completion": STRINGS, "messages": MESSAGES}, ["chats (`messages`)", "completions (`c"], {
            ("chats", None, None): "chats messages", ("completions", None, None): "completions completion",
            (None, "messages", None): "chats messages"}),
        ({"messages": MESSAGES, "conversations": MESSAGES}, ["(`messages`)", "(`conversations`)"], {
            (None, "messages", None): "chats messages", ("chats", "conversations", None): "chats conversations"}),
        ({"text": STRINGS, "labels": IDS, "input_ids": IDS}, ["texts (`text`)", "labels (`labels`)"], {
            ("texts", None, None): "texts text", ("labels", None, None): "labels labels",
            (None, "input_ids", None): "labels input_ids"}),
    ],
)  # fmt: skip
def test_two_possible_readings_are_named_and_wishes_decide(columns, names, wishes):
    message = refused(columns)
    assert message.startswith("rows.jsonl can be read as ")
    assert " and as " in message
    assert all(name in message for name in names)
    assert message.endswith("; --kind and --column say which is meant")
    found = {wish: read(columns, *wish) for wish in wishes}
    assert {wish: f"{reading.kind} {reading.column}" for wish, reading in found.items()} == wishes


def test_columns_of_any_name_where_they_are_said():
    columns = {"a": STRINGS, "b": STRINGS, "c": MESSAGES, "d": IDS, "e": "dict"}
    assert "has the columns 'a' (strings), 'b' (strings), 'c' (messages), 'd' (lists of" in refused(columns)
    for column, kind in zip("abcd", ("texts", "texts", "chats", "labels"), strict=True):
        assert read(columns, kind, column).kind == kind
        if kind == "texts":  # or an answer to the other one
            assert f"has `{column}` beside `" in refused(columns, None, column)
        else:
            assert read(columns, None, column).kind == kind
    assert read(columns, "chats").column == "c"
    assert read(columns, "labels").column == "d"
    assert "can be read as texts (`a`) and as texts (`b`)" in refused(columns, "texts")
    found = read(columns, None, "b", "a")
    assert (found.kind, found.column, found.columns) == ("completions", "b", ("a", "b"))
    assert read(columns, "completions", "a", "{b}: ").prompt.of({"b": "x"}) == "x: "


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ((None, "txt"), "rows.jsonl has no column 'txt'; accepted by --column are those it has: 'text', 'answer', "),
        ((None, "answer", "question"), "rows.jsonl has no column 'question'"),
        ((None, "answer", "{text} {q}"), "rows.jsonl has no column 'q'"),
        (("texts", "answer", "text"), "--prompt is for completions, and --kind is texts"),
        (("labels", None, "text"), "--prompt is for completions, and --kind is labels"),
        ((None, "n"), "line 7: column 'n' holds int; accepted are strings, lists of"),
        (("texts", "labels"), "line 5: column 'labels' holds lists of ids; accepted are strings, to be read as texts"),
        (("labels", "text"), "line 3: column 'text' holds strings; accepted are lists of ids"),
        (("chats", "answer"), "line 4: column 'answer' holds strings; accepted are messages, to be read as chats"),
        ((None, "labels", "text"), "line 5: column 'labels' holds lists of ids; accepted are strings or messages"),
        (("completions", "answer"), "--kind is completions, and nothing says what comes before `answer`; --prompt s"),
        (("completions",), "cannot be read as completions without more; --column says where the completions are"),
    ],
)
def test_what_cannot_be(wishes, message):
    columns = {"text": STRINGS, "answer": STRINGS, "labels": IDS, "messages": MESSAGES, "n": "int"}
    assert message in refused(columns, *wishes)


def test_rows_are_no_stream_of_tokens():
    for column in (None, "text"):
        assert "stream" in refused(("text", "n"), "stream", column)


@pytest.mark.parametrize("masks", [("completion_mask",), ("assistant_masks",), ("completion_mask", "assistant_masks")])
def test_masks_beside_input_ids_are_refused(masks):
    columns = dict.fromkeys(("input_ids", *masks), IDS)
    for wishes in ((), ("labels",), (None, "input_ids"), ("labels", "input_ids")):
        message = refused(columns, *wishes)
        assert message.startswith(f"rows.jsonl has `input_ids`, and {' and '.join(f'`{mask}`' for mask in masks)}")
        assert "TokenCounts.from_dataloader" in message
    assert read({**columns, "labels": IDS}).column == "labels"


def test_options_of_files_of_tokens_and_of_others():
    Path("a.bin").write_bytes(b"abcd")
    for options, message in (
        ({"kind": "labels"}, "--kind is labels, and a.bin is a file of token ids; accepted is stream"),
        ({"column": "text"}, "--column is 'text', and files of token ids have no columns"),
        ({"prompt": "text"}, "--prompt is 'text', and files of token ids have no columns"),
    ):
        with pytest.raises(ValueError, match=message):
            open_corpus(["a.bin"], dtype="uint16", **options)
    Path("a.txt").write_bytes(b"abcd")
    for option, value in (("dtype", "uint16"), ("separator", 0)):
        with pytest.raises(ValueError, match=f"--{option} is for .bin files of token ids, and these are text files"):
            open_corpus(["a.txt"], **{option: value})


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize(
    ("template", "columns", "expected"),
    [
        ("q", ("q",), "what {is} it"),
        ("Q: {q} A: ", ("q",), "Q: what {is} it A: "),
        ("{q}\n{n}\n{q}", ("q", "n"), "what {is} it\n5\nwhat {is} it"),
        ("{{q}} {q}}}{{", ("q",), "{q} what {is} it}{"),
        ("{{}}", (), "{}"),
        ("{q!r:>16}", ("q",), "  'what {is} it'"),
        ("{a b}{ä}", ("a b", "ä"), "spaceumlaut"),
        ("meta.q", ("meta.q",), "dot"),
        ("q[0]", ("q[0]",), "brackets"),
        ("q:d", ("q:d",), "colon"),
        ("q!", ("q!",), "exclamation mark"),
    ],
)
def test_prompts_of_columns_and_templates(template, columns, expected):
    row = {"q": "what {is} it", "n": 5, "a b": "space", "ä": "umlaut", "answer": "x", "other": None}
    row |= {"meta.q": "dot", "q[0]": "brackets", "q:d": "colon", "q!": "exclamation mark"}
    found = read(tuple(row), None, "answer", template)
    assert found.prompt.columns == columns
    assert found.prompt.of(row) == expected
    for column in columns:
        assert found.prompt.of({**row, column: None}) is None


@pytest.mark.parametrize("template", ["{q", "{q} {", "}{q}", "{q} }", "{q!x}", "{q!}", "{q:{n}}", "{}", "{0}", "{q.n}"])
def test_templates_that_are_none(template):
    assert refused(("q", "n", "answer"), None, "answer", template).startswith(("--prompt is ", "rows.jsonl has no col"))


def test_a_prompt_that_no_column_is_called():
    assert "rows.jsonl has no column 'Q: }'" in refused(("q", "answer"), None, "answer", "Q: }")
    assert prompt_of("prompt").of({"prompt": "as it stands"}) == "as it stands"


@pytest.mark.parametrize(("column", "optional"), [("output", ["input"]), ("response", ["input", "context"])])
def test_optional_columns_may_be_null_empty_or_missing(column, optional):
    rows = [{"instruction": "a", **dict.fromkeys(optional, "b"), column: "c"}]
    rows += [{"instruction": "a", **dict.fromkeys(optional, value), column: "c"} for value in (None, "")]
    rows += [{"instruction": "a", column: "c"}, {"instruction": None, optional[0]: "b", column: "c"}]
    prompts = [row["prompt"] for row in rows_of(rows)]
    assert prompts == ["a\n" + "b\n" * len(optional), "a\n", "a\n", "a\n", None]


@pytest.mark.parametrize("after", [1, 3, 150])
def test_an_optional_column_that_later_rows_have(after):
    rows = [{"instruction": "a", "output": "c"}] * after + [{"instruction": "a", "input": "b", "output": "c"}]
    assert rows_of(rows)[-1]["prompt"] == "a\nb\n"


@pytest.mark.parametrize("prompt", [None, "question", "Q: {question}"])
def test_messages_are_no_part_of_a_text(prompt):
    question, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"question.*messages"):
        rows_of([{"question": question, "answer": "b"}], column="answer", prompt=prompt)
    if prompt == "question":
        (row,) = rows_of([{"question": question, "answer": answer}], prompt=prompt)
        assert (row["prompt"], row["completion"]) == (question, answer)


# ---------------------------------------------------------------------------------------------------------------------
# Contents


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, NULL), ("", STRINGS), ("a", STRINGS), ([], EMPTY), ([1], IDS), ([-100, 2**63], IDS),
        ([{"role": "user", "content": "a"}], MESSAGES), ([{"from": "human", "value": "a"}, {}], MESSAGES),
        ([{"text": "a", "n": 1}], "lists of objects with the keys text, n"),
        (5, "int"), (0.5, "float"), (True, "bool"), ({"role": "user"}, "dict"),
        (["a"], "a list with 'a'"), ([0.5], "a list with 0.5"), ([[1]], "a list with [1]"),
        ([True], "a list with True"), ([None], "a list with None"), ([1, 2, None], "a list with None"),
        ([1, "a"], "a list with 'a'"), (["x" * 99], f"a list with '{'x' * 39}"),
    ],
)  # fmt: skip
def test_what_a_value_is(value, expected):
    assert held_by(value) == expected


def test_what_an_arrow_type_is():
    pa = pytest.importorskip("pyarrow")
    message = pa.struct({"role": pa.string(), "content": pa.string()})
    expected = {
        STRINGS: [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())],
        IDS: [pa.list_(pa.int8()), pa.large_list(pa.uint64()), pa.list_(pa.int32(), 3)],
        MESSAGES: [pa.list_(message), pa.large_list(message), pa.list_(pa.struct({"from": pa.string()}))],
        NULL: [pa.null()],
        EMPTY: [pa.list_(pa.null())],
        "lists of objects with the keys text": [pa.list_(pa.struct({"text": pa.string()}))],
    }
    for holds, kinds in expected.items():
        assert [held_by_type(kind) for kind in kinds] == [holds] * len(kinds)
    for kind in (pa.int64(), pa.list_(pa.float32()), pa.list_(pa.list_(pa.int8())), message, pa.binary(), pa.bool_()):
        assert held_by_type(kind) == str(kind)


def test_optional_columns_of_tables_are_read():
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"instruction": ["a"], "input": ["b"], "output": ["c"]}), "rows.parquet")
    (row,) = open_corpus(["rows.parquet"]).rows
    assert row["prompt"] == "a\nb\n"


def test_rows_after_a_null_tell_what_a_column_holds():
    Path("rows.jsonl").write_text('{"n": 1, "ids": null}\n{"n": 2, "ids": [3]}\n')
    assert open_corpus(["rows.jsonl"], "ids").kind == "labels"


@pytest.mark.parametrize("prompt", ["Q: {question}", None])
def test_messages_inside_a_text_are_refused(prompt):
    """Both are messages, and a template or a line break would make text of one."""
    columns = {"question": MESSAGES, "answer": MESSAGES}
    assert "`question` holds messages, which are no part of a text" in refused(columns, None, "answer", prompt)
