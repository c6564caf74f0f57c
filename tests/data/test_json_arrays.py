"""Arrays in .json files: they are read an element at a time, as `json.loads` reads the whole, or refused."""

import gzip
import io
import json
import re
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdl_kernels.data import lines
from pdl_kernels.data.corpora import open_corpus
from pdl_kernels.data.inputs import Input

CHUNKS = (1, 2, 7, 64, 2**20)
MIB = 2**20
BOM = b"\xef\xbb\xbf"
ELEMENT = b'{"text": "' + b"x" * 1000 + b'"},\n'
ROWS = [
    {"text": "plain", "n": 0},
    {"nested": {"a": [1, [2, {"b": []}]], "c": {}}, "text": "[{]}, \"quoted\", 'and' \\ / \b\f\n\r\t"},
    {},
    {"text": "é ü 漢字 \U0001f600 \u2028 \x7f", "\U0001f600 é": None, "": ""},
    {"numbers": [100000.0, -0.5, 0, -7, 12345678901234567890, 1e-300, 1.7976931348623157e308, 0.1]},
    {"yes": True, "no": False, "nothing": None, "long": 'abcdefg\\"\u00e9\u6f22' * 400},
    {"text": "\ud83d", "last": 5},  # half of a surrogate pair
]
LAYOUTS = {
    "as it is": {},
    "compact": {"separators": (",", ":")},
    "pretty": {"indent": 4},
    "tabs": {"indent": "\t", "separators": (" \t,", "\t :  ")},
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(content, name="rows.json"):
    Path(name).write_bytes(content)
    return [row for _, row in lines.json_objects(Input(Path(name)))]


def refused(content, name="rows.json"):
    """The message, which names the file."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the tests look into the message
        read(content, name)
    assert str(caught.value).startswith(name)
    return str(caught.value)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_array_is_read_as_by_the_standard_library(monkeypatch, chunk, layout):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    text = json.dumps(ROWS, **LAYOUTS[layout])
    assert json.loads(text) == ROWS
    assert read(text.encode()) == ROWS
    assert read(BOM + text.replace("\n", "\r\n").encode() + b"\r\n \t\n") == ROWS
    assert read(b" \r\n\t " + text.encode()) == ROWS
    plain = json.dumps(ROWS[:-1], ensure_ascii=False, **LAYOUTS[layout])  # UTF-8 has no halves of surrogate pairs
    assert read(plain.encode()) == ROWS[:-1]
    assert read(BOM + plain.encode()) == ROWS[:-1]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    "value",
    [
        *("1e5", "1E+5", "1.5e-10", "-0", "-0.5", "0.0", "123", "1" * 70, "NaN", "Infinity", "-Infinity"),
        *("true", "false", "null", "[]", "{}", "[[ ], { }]", '""', r'"\\"', r'"\""', r'"\/"', r'"a\u00e9\u0000"'),
        *(r'"\ud83d\ude00"', r'"\ud83d\ude00\ud83d\ude00"', r'"\ud83d"', r'"\ud83d\n"', r'"\ude00\ud83d"'),
    ],
)
def test_words_numbers_and_escapes_that_a_chunk_cuts(monkeypatch, chunk, value):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    text = f'[{{"a":{value}}},{{"a": [{value} ,{value}\n]}}]'
    for before in range(8):
        assert repr(read((" " * before + text).encode())) == repr(json.loads(text))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("content", ["[]", " [ ] ", "[\n]\n", "\r\n[\r\n\r\n]\r\n"])
def test_an_empty_array_holds_nothing(monkeypatch, chunk, content):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    assert read(content.encode()) == []
    assert read(BOM + content.encode()) == []
    with pytest.raises(ValueError, match=r"rows.json: there is no text and no label in there"):
        open_corpus(["rows.json"])


@pytest.mark.parametrize("suffix", [".json.gz", ".json.zst"])
@pytest.mark.parametrize("chunk", [1, 64, MIB])
def test_compressed_arrays(monkeypatch, suffix, chunk):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    pa = pytest.importorskip("pyarrow")
    text = json.dumps(ROWS, indent=1).encode()
    packed = gzip.compress(text) if suffix.endswith("gz") else pa.compress(text, "zstd", asbytes=True)
    assert read(packed, f"rows{suffix}") == ROWS
    for kept in range(len(packed) // 3, len(packed) - 8, len(packed) // 3):  # 8: the checksum of .gz
        refused(packed[:kept], f"rows{suffix}")


def test_only_json_files_that_begin_with_a_bracket_are_arrays():
    by_line = b'{"a": [1]}\n\n{"a": []}\n'
    assert read(by_line) == read(by_line, "rows.jsonl") == [{"a": [1]}, {"a": []}]
    message = refused(b'[{"a": 1}]', "rows.jsonl")
    assert "rows.jsonl, line 1 is a JSON list; accepted is one JSON object a line" in message


# ---------------------------------------------------------------------------------------------------------------------
# Damaged arrays


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_array_that_was_cut_short_passes(monkeypatch, chunk):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    rows = [{"text": 'é\U0001f600\\"', "n": [1.5e-3, True, None]}, {"text": "b", "n": {}}]
    for start in (b"", BOM, b" \n"):
        whole = start + json.dumps(rows, ensure_ascii=False, indent=1).encode()
        Path("rows.json").write_bytes(whole)
        assert list(open_corpus(["rows.json"], "text").rows) == ['é\U0001f600\\"', "b"]
        for kept in range(len(whole)):
            Path("rows.json").write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=r"^rows\.json"):
                list(open_corpus(["rows.json"], "text").rows)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"a": 1} {"a": 2}]',
            r"row 0 is no JSON (Expecting ',' or ']' after it); accepted is one JSON object a line",
        ),
        ('[{"a": 1}, {"a": 2}\n\n{"a": 3}]', "row 1 is no JSON (Expecting ',' or ']' after it)"),
        ('[{"a": 1},]', "row 0 is no JSON (a comma, and nothing after it)"),
        ('[{"a": 1}, {"a": 2} , ]', "row 1 is no JSON (a comma, and nothing after it)"),
        ("[,]", "row 0 is no JSON (Expecting value)"),
        ('[{"a": 1},, {"a": 2}]', "row 1 is no JSON (Expecting value)"),
        ('[{"a": 1}}]', "row 0 is no JSON"),
        ('[{"a": 1}]]', "goes on after the end of its array"),
        ('[{"a": 1}] x', "goes on after the end of its array"),
        ('[{"a": 1}]\n[{"a": 2}]', "goes on after the end of its array"),
        ('[{"a": 1}, {"a": tru}]', "row 1 is no JSON"),
        ('[{"a": 01}]', "row 0 is no JSON (Expecting ',' delimiter)"),
        ('[{"a": 1.}]', "row 0 is no JSON (Expecting ',' delimiter)"),
        ('[{"a": "\\x"}]', "row 0 is no JSON (Invalid \\escape)"),
        ('[{"a": "\\u12"}]', "row 0 is no JSON (Invalid \\uXXXX escape)"),
        ('[{"a": 1}, {"a"}]', "row 1 is no JSON (Expecting ':' delimiter)"),
        ("[{'a': 1}]", "row 0 is no JSON (Expecting property name enclosed in double quotes)"),
        ('[{"a": "tab\there"}]', "row 0 is no JSON (Invalid control character at)"),
        ('[{"a": 1}, ["b"]]', "row 1 is a JSON list; accepted is one JSON object a line, or one array of objects"),
        ('["b"]', "row 0 is a JSON str"),
        ("[null]", "row 0 is a JSON NoneType"),
        ("[{}, 12]", "row 1 is a JSON int"),
    ],
)
def test_damaged_arrays_are_refused_at_their_row(monkeypatch, chunk, content, message):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    assert message in refused(content.encode())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    "wrong", [b'{"a": "caf\xe9"}]', b'{"a": "\xf0\x9f"}]', b'{"a": "b"}]\xff', b'{"a": "b"}]\xf0', b'\xc0 {"a": "b"}]']
)
def test_what_is_no_utf8_is_refused_by_name(monkeypatch, chunk, wrong):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    for before in (b"[", b"[" + b'{"a": 1}, ' * 30):
        assert "UTF-8" in refused(before + wrong)


def test_other_spaces_before_an_array():
    assert "rows.json" in refused(b'\x0c[{"a": 1}]')


def test_a_number_of_too_many_digits():
    assert "rows.json, row 0 is no JSON" in refused(b'[{"a": ' + b"1" * 5000 + b"}]")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_lists_in_lists_in_lists(name):
    refused(b'[{"a": ' * (name == "rows.json") + b"[" * 100_000, name)


# ---------------------------------------------------------------------------------------------------------------------
# Large ones


class Endless(io.RawIOBase):
    """The start of an array, and then one element over and over, up to a size."""

    def __init__(self, start, element, size):
        self.start, self.element, self.size, self.given = start, element, size, 0
        self.block = element * (MIB // len(element))

    def readable(self):
        return True

    def readinto(self, buffer):
        size = min(len(buffer), self.size - self.given)
        if self.given < len(self.start):
            data = self.start[self.given : self.given + size]
        else:
            data = self.block[(self.given - len(self.start)) % len(self.element) :][:size]
        buffer[: len(data)] = data
        self.given += len(data)
        return len(data)


class Large(Input):
    """A file of 50 MB that is not on the disk."""

    def __init__(self, start=b"["):
        super().__init__(Path("large.json"))
        self.stream = Endless(start, ELEMENT, 50 * MIB)

    @contextmanager
    def opened(self):
        yield io.BufferedReader(self.stream)


def test_a_large_array_is_neither_read_ahead_nor_kept():
    file = Large()
    rows = lines.json_objects(file)
    assert [next(rows)[0] for _ in range(3)] == [f"large.json, row {row}" for row in range(3)]
    assert file.stream.given <= 2 * MIB
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"large.json, row {(50 * MIB - 1) // len(ELEMENT)} is no JSON"):
            for _ in rows:  # it has no end
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.stream.given == 50 * MIB
    assert peak < 10 * MIB


@pytest.mark.parametrize("before", [0, 3300])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (b'{"text": "a\x01b"},', "Invalid control character"),
        (b'{"text": "a\nb"},', "Invalid control character"),
        (b'{"text": "a"}\n', "Expecting ',' or ']' after it"),
        (b'{"text": "a},', "Expecting ',' delimiter"),
        (b'{"text": "a" "b"},', "Expecting ',' delimiter"),
        (b'{"text" "a"},', "Expecting ':' delimiter"),
        (b'{"text": \\"a"},', "Expecting value"),
        (b'{"text": "a\xe9b"},', "no UTF-8"),
        (b'"text",', "a JSON str"),
    ],
)
def test_damage_in_a_large_array_is_found_where_it_is(before, wrong, reason):
    start = b"[" + ELEMENT * before + wrong
    file = Large(start)
    places = []
    message = rf"^large.json, row {before} is .*{re.escape(reason)}.*; accepted is one JSON"
    with pytest.raises(ValueError, match=message):
        places.extend(place for place, _ in lines.json_objects(file))
    assert places == [f"large.json, row {row}" for row in range(before)]
    assert file.stream.given <= len(start) + 4 * MIB


# ---------------------------------------------------------------------------------------------------------------------
# Any array

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
spaces = st.text(" \t\r\n", max_size=3)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=5),
    chunk=st.integers(1, 40),
    around=st.tuples(spaces, spaces, spaces, spaces),
    indent=st.none() | st.integers(0, 3) | st.just("\t"),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_any_array(rows, chunk, around, indent, ascii_only, bom):
    a, b, c, d = around
    text = json.dumps(rows, indent=indent, separators=(f"{a},{b}", f"{c}:{d}"), ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(lines, "CHUNK", chunk)
        assert read(BOM * bom + f"{d}{text}{a}".encode()) == rows
