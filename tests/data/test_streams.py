"""Files of nothing but token ids: what is counted, document by document, where it goes on, and what is refused."""

import functools
import itertools
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pdl_kernels import TokenCounts
from pdl_kernels.data import streams

ROOT = Path(__file__).resolve().parents[2]
V, END = 50, 7
LLM_C = {"uint16": 20240520, "uint32": 20240801}
MEGATRON = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LENGTHS = (1, 4, 5, 13, 1, 1, 2, 27, 3)  # of documents: some in one block, some over several, some as long as one

count = functools.partial(TokenCounts.from_stream, vocab_size=V, progress=False)


@pytest.fixture(autouse=True)
def _blocks_of_five_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "BLOCK_IDS", 5)


def random_documents(seed, lengths=LENGTHS, separated=True):
    """Documents of ids other than END; `separated` ones end with it."""
    random = np.random.default_rng(seed)
    others = [token for token in range(V) if token != END]
    return [[*random.choice(others, length - separated).tolist(), *[END] * separated] for length in lengths]


def write(name, ids, dtype="uint16"):
    np.asarray(ids, dtype).tofile(name)
    return name


def write_llm_c(name, ids, dtype, announced=None):
    header = [LLM_C[dtype], 1, len(ids) if announced is None else announced, *[0] * 253]
    Path(name).write_bytes(struct.pack("<256i", *header) + np.asarray(ids, dtype).tobytes())
    return name


def write_megatron(name, documents, code=8, version=1, bounds=None, magic=b"MMIDIDX\0\0"):
    """X.bin and X.idx of documents, which are lists of sequences of ids."""
    lengths = [len(sequence) for document in documents for sequence in document]
    dtype = MEGATRON.get(code, "float32")
    starts = [sum(lengths[:number]) * np.dtype(dtype).itemsize for number in range(len(lengths))]
    if bounds is None:
        bounds = [sum(map(len, documents[:number])) for number in range(len(documents) + 1)]
    index = struct.pack("<9sQBQQ", magic, version, code, len(lengths), len(bounds))
    for form, numbers in (("i", lengths), ("q", starts), ("q", bounds)):
        index += struct.pack(f"<{len(numbers)}{form}", *numbers)
    Path(name).with_suffix(".idx").write_bytes(index)
    return write(name, flat(flat(documents)), dtype)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def check(counts, *files):
    """Against counts by hand of files, which are lists of documents; a file's first id is no target."""
    rows = [document[not number :] for documents in files for number, document in enumerate(documents)]
    assert counts.counts.tolist() == np.bincount(flat(rows), minlength=V).tolist()
    assert counts.sequences == len(rows)
    if counts.document_counts is not None:
        held = Counter(token for row in rows for token in set(row))
        assert counts.document_counts.tolist() == [held[token] for token in range(V)]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block", [1, 5, 10_000])
def test_all_ids_but_the_first_of_each_file_are_targets(monkeypatch, dtype, documents, block):
    monkeypatch.setattr(streams, "BLOCK_IDS", block)
    a, b, c = random_documents(0, [23, 1, 10], separated=False)
    check(count(write("a.bin", a, dtype), dtype=dtype, documents=documents), [a])
    names = [write("b.bin", b, dtype), Path(write("c.bin", c, dtype)), write("none.bin", [], dtype), "a.bin"]
    check(count(names, dtype=dtype, documents=documents), [b], [c], [a])


@pytest.mark.parametrize("block", [1, 2, 5, 10_000])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_separator_ends_documents(monkeypatch, block, documents, cut):
    """With a `cut` the files do not end with it."""
    monkeypatch.setattr(streams, "BLOCK_IDS", block)
    files = [random_documents(seed) for seed in (1, 2)]
    for number, file in enumerate(files):
        file[-1] = file[-1][: len(file[-1]) - cut]
        write(f"{number}.bin", flat(file))
    check(count(["0.bin", "1.bin"], dtype="uint16", separator=END, documents=documents), *files)


def test_a_separator_that_ends_no_document():
    (ids,) = random_documents(3, [33], separated=False)
    for separator in (END, 60_000, 70_000):  # the last one is too large for the dtype
        check(count(write("a.bin", ids), dtype="uint16", separator=separator, documents=True), [ids])


@pytest.mark.parametrize("code", MEGATRON)
@pytest.mark.parametrize("documents", [False, True])
def test_megatron(code, documents):
    """Documents are one sequence or several, and the second file has a dtype of its own."""
    files = [[[[1, 2], [3, 3, 3]], [[4]], [[5] * 12, [1, 49]]], [[[9, 8, 7]], [[6], [6]]]]
    names = [write_megatron("a.bin", files[0], code), write_megatron("b.v1.bin", files[1], 4)]
    expected = [list(map(flat, file)) for file in files]
    check(count(names, documents=documents), *expected)
    if MEGATRON[code] in streams.DTYPES:
        check(count("a.bin", dtype=MEGATRON[code]), expected[0])


@pytest.mark.parametrize("dtype", LLM_C)
def test_llm_c(dtype):
    (ids,) = random_documents(4, [13], separated=False)
    check(count(write_llm_c("a.bin", ids, dtype)), [ids])
    documents = random_documents(5)
    name = write_llm_c("b.bin", flat(documents), dtype)
    check(count(name, dtype=dtype, separator=END, documents=True), documents)
    check(count([write_llm_c("none.bin", [], dtype), "a.bin"]), [ids])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("parts", [[[END]], [[END], [END], [3, 4, END], [END], [END]], [[3, END], *[[END]] * 8, [4]]])
def test_a_separator_alone_is_a_document(documents, parts):
    check(count(write("a.bin", flat(parts)), dtype="uint16", separator=END, documents=documents), parts)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([[[1, 2]], [], [[]], [[3, 4, 5, 6]]], id="between"),
        pytest.param([[[1, 2, 3, 4, 5]], [[]], [], [[3, 4, 5, 6]]], id="between blocks"),
        pytest.param([[[1, 2], [3, 4]], [[3]], [[]], []], id="last"),
        pytest.param([[], [[]], [[1, 2]], [[3, 4]]], id="first"),
    ],
)
def test_documents_without_ids_are_documents(documents, parts):
    found = count(write_megatron("a.bin", parts), documents=documents)
    assert found.counts.tolist() == np.bincount(flat(flat(parts))[1:], minlength=V).tolist()
    assert found.sequences == 4


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("form", ["plain", "separated", "megatron"])
def test_counting_goes_on_after_any_block(monkeypatch, form, documents):
    files = [random_documents(6), random_documents(7, [1]), random_documents(8, [11, 2, 3])]
    names = [f"{number}.bin" for number in range(3)]
    options = {"plain": {"dtype": "uint16"}, "separated": {"dtype": "uint16", "separator": END}, "megatron": {}}[form]
    for name, file in zip(names, files, strict=True):
        write_megatron(name, [[document] for document in file]) if form == "megatron" else write(name, flat(file))
    expected = [[flat(file)] for file in files] if form == "plain" else files
    run = functools.partial(count, names, documents=documents, **options)
    blocks = 0
    add = TokenCounts._add

    def add_until(stop):
        def add_block(counts, *block):
            nonlocal blocks
            if blocks == stop:
                raise KeyboardInterrupt
            blocks += 1
            add(counts, *block)

        return add_block

    monkeypatch.setattr(TokenCounts, "_add", add_until(None))
    check(run(), *expected)
    total = blocks
    assert total >= 3
    for stop in range(total):
        blocks = 0
        monkeypatch.setattr(TokenCounts, "_add", add_until(stop))
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=f"{stop}.partial")
        monkeypatch.setattr(TokenCounts, "_add", add_until(None))
        check(run(checkpoint=f"{stop}.partial"), *expected)
        check(run(checkpoint=f"{stop}.partial"), *expected)
        assert blocks == total, "each block is counted once"


def test_a_checkpoint_of_another_separator_or_file_is_refused():
    Path("other").mkdir()
    names = [write("a.bin", [1, 2, 3, END]), write("other/a.bin", [3, 2, 1, END])]
    count(names[0], dtype="uint16", separator=3, checkpoint="c")
    for name, separator in ((names[0], END), (names[1], 3)):
        with pytest.raises(ValueError, match=r"the checkpoint c holds counts of .*, and these are of "):
            count(name, dtype="uint16", separator=separator, checkpoint="c")


def refused(name, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the tests look into the message
        count(name, **options)
    return str(caught.value)


def test_files_of_ids_alone_that_do_not_fit():
    three_bytes = write("a.bin", [1, 2, 3], "uint8")
    assert "a.bin does not tell the dtype of its ids, and --dtype is missing; accepted are uint16" in refused("a.bin")
    assert "has 3 bytes, which is no whole number of ids of uint16" in refused(three_bytes, dtype="uint16")
    assert "has 6 bytes, which is no whole number of ids of int32" in refused(write("b.bin", [1] * 3), dtype="int32")
    assert "none.bin: there is no token in there; accepted is at" in refused(write("none.bin", []), dtype="uint16")
    assert "dtype is 'uint8'; accepted are uint16, uint32, int32, int64" in refused("a.bin", dtype="uint8")
    for separator in (-1, True, "7", 7.0):
        message = refused("b.bin", dtype="uint16", separator=separator)
        assert f"separator is {separator!r}; accepted is the id that ends a document, >= 0" in message
    with pytest.raises(FileNotFoundError, match=r"nowhere.bin"):
        count(["b.bin", "nowhere.bin"], dtype="uint16")


def test_files_of_llm_c_that_do_not_fit():
    assert "a.bin: there is no token in there" in refused(write_llm_c("a.bin", [], "uint16"))
    name = write_llm_c("a.bin", [1], "uint16")
    assert "dtype is uint32, and the header of a.bin says uint16" in refused(name, dtype="uint32")
    name = write_llm_c("a.bin", [1], "uint16", announced=2)
    assert "a.bin has 1,026 bytes, and its header says 2 ids, 1,028 bytes" in refused(name)
    name = write_llm_c("a.bin", [1, 2], "uint32", announced=1)
    assert "a.bin has 1,032 bytes, and its header says 1 ids, 1,028 bytes" in refused(name)


def test_indices_that_do_not_fit():
    documents = [[[1], [2, 3]], [[4]]]
    name = write_megatron("a.bin", documents)
    assert "dtype is int32, and a.idx says uint16" in refused(name, dtype="int32")
    assert "separator is 3, and an .idx tells where documents end; accepted is one" in refused(name, separator=3)
    write("a.bin", [1, 2, 3, 4, 5])
    assert "a.idx does not fit a.bin: it announces 4 ids of uint16, and the file has 10 bytes" in refused(name)
    write_megatron("a.bin", documents, magic=b"MMIDIDX\0\1")
    assert "a.idx is no index of Megatron, which begins with" in refused(name)
    write_megatron("a.bin", documents, version=2)
    assert "a.idx has version 2 and dtype 8; accepted are version 1 and dtypes 1 (uint8), 2 (int8)" in refused(name)
    for code in (0, 6, 7, 9):  # 6 and 7 are floating
        write_megatron("a.bin", documents, code=code)
        assert f"a.idx has version 1 and dtype {code}; accepted are" in refused(name)
    for bounds in ([], [0], [0, 2], [1, 3], [0, 4], [0, 2, 1, 3]):
        write_megatron("a.bin", documents, bounds=bounds)
        assert "a.idx does not fit a.bin: the bounds of its documents do not run from 0 to its 3 seq" in refused(name)


def test_an_index_with_a_negative_length():
    name = write_megatron("a.bin", [[[1], [2, 3]], [[4]]])
    index = bytearray(Path("a.idx").read_bytes())
    index[34 : 34 + 3 * 4] = struct.pack("<3i", 3, -1, 2)
    Path("a.idx").write_bytes(index)
    assert "a.idx does not fit a.bin" in refused(name)


def test_an_index_that_was_cut_short():
    name = write_megatron("a.bin", [[[1, 2]], [[3]]])
    content = Path("a.idx").read_bytes()
    assert len(content) == 34 + 2 * 12 + 3 * 8
    for kept in range(len(content)):
        Path("a.idx").write_bytes(content[:kept])
        expected = "is no index of Megatron" if kept < 34 else "is cut short: it announces 2 sequences and 3 bounds"
        assert f"a.idx {expected}" in refused(name)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("place", [1, 4, 5, 9, 17])  # in the first block, at its end, in the second, ...
def test_an_id_outside_the_vocabulary_is_named_with_its_place(place, documents):
    ids = np.ones(18, "int32")
    write("a.bin", ids, "int32")
    for wrong in (V, -100):
        ids[place] = wrong
        write("b.bin", ids, "int32")
        with pytest.raises(IndexError, match=rf"^b.bin: token {place} is {wrong}; accepted are ids from 0 to 49"):
            count(["a.bin", "b.bin"], dtype="int32", separator=0, documents=documents)


COUNT_AND_SAY_PEAK = """
from pdl_kernels import TokenCounts
counts = TokenCounts.from_stream("a.bin", 65536, dtype="uint16", separator=1, progress=False)
assert (counts.total, counts.counts[0].item(), counts.sequences) == (79_999_999, 79_999_999, 1), counts
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(line.split()[1]) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_large_file_is_not_read_into_memory():
    with open("a.bin", "wb") as file:
        file.truncate(160_000_000)
    done = subprocess.run(
        [sys.executable, "-c", COUNT_AND_SAY_PEAK],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1
