"""Every form of file that can be counted: what is read, what is said of damaged ones, and where reading goes on."""

import gzip
import json
import socket
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

from pdl_kernels import TokenCounts  # noqa: E402
from pdl_kernels.data import inputs, tables  # noqa: E402
from pdl_kernels.data.corpora import open_corpus  # noqa: E402

TEXTS = ["the cat", "NA", "2020-01-01", 'on the "mat", twice', "007", "a lone\rreturn"]
LABELS = [[3, 4, 5], [-100, -100, 6, 7], [], [2], [3, 3, 3], [7]]
LINES = (".jsonl", ".json", "array.json", ".jsonl.gz", ".jsonl.zst", "array.json.gz", "array.json.zst")
TABLES = (".parquet", "stream.arrow", "file.arrow", "saved")
FORMS_OF_TEXTS = (*LINES, ".txt", ".txt.gz", ".txt.zst", ".csv", ".csv.gz", *TABLES)
FORMS_OF_LABELS = (*LINES, *TABLES)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No network is tried, and nothing is written below the home folder."""

    def refused(*arguments, **_):
        raise AssertionError(f"the network was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    assert not (tmp_path / "cache").exists()


def pack(name, content):
    """Write bytes, compressed as the name says."""
    if name.endswith(".zst"):
        with pa.output_stream(name, compression="zstd") as file:
            file.write(content)
    else:
        Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


def write(form, values, column="text", name="rows"):
    """A file or folder with these values in a column, and another column beside it."""
    name = name + form
    beside = list(range(len(values)))
    if ".parquet" in form:
        pq.write_table(pa.table({"n": beside, column: values}), name, row_group_size=2)
    elif "arrow" in form:
        table = pa.table({"n": beside, column: values})
        make = pa.ipc.new_file if "file" in form else pa.ipc.new_stream
        with pa.OSFile(name, "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif "saved" in form:
        datasets.Dataset.from_dict({"n": beside, column: values}).save_to_disk(
            name, num_shards=min(2, len(values)) or 1
        )
    elif ".txt" in form:
        pack(name, "\r\n\r\n   \n".join(values).encode())
    elif ".csv" in form:
        cells = [value.replace('"', '""') for value in values]
        pack(name, "".join([f"n,{column}\n", *(f'{n},"{cell}"\n' for n, cell in enumerate(cells))]).encode())
    elif "array" in form:
        pack(name, json.dumps([{"n": n, column: value} for n, value in enumerate(values)], indent=1).encode())
    else:
        rows = [json.dumps({"n": n, column: value}, ensure_ascii=False) for n, value in enumerate(values)]
        pack(name, ("\n\n".join(rows) + "\n").encode("utf-8-sig"))  # with a byte order mark and empty lines
    return name


def count(corpus, **options):
    return TokenCounts.from_dataset(
        corpus.rows, 8, corpus.reading.column, progress=False, batch_size=corpus.batch_size, **options
    )


def read_all(corpus):
    return list(corpus.rows.arrow_tables("text", 0, 9) if corpus.kind == "labels" else corpus.rows)


@pytest.mark.parametrize("form", FORMS_OF_TEXTS)
def test_texts_come_as_they_were_written(form):
    names = [write(form, TEXTS[:2], name="a"), write(form, TEXTS[2:], name="b")]
    corpus = open_corpus(names)
    assert corpus.kind == "texts"
    assert list(corpus.rows) == TEXTS
    assert list(corpus.rows) == TEXTS, "the rows can be read again"


@pytest.mark.parametrize("form", FORMS_OF_LABELS)
@pytest.mark.parametrize("shift", [True, False])
def test_labels_of_every_form(form, shift):
    names = [write(form, LABELS[:3], "labels", "a"), write(form, LABELS[3:], "labels", "b")]
    corpus = open_corpus(names, "labels")
    assert corpus.kind == "labels"
    assert count(corpus, shift=shift, documents=True) == TokenCounts(8, documents=True).update(LABELS, shift=shift)


@pytest.mark.parametrize("form", FORMS_OF_LABELS)
def test_reading_goes_on_after_any_row(form):
    rows = [[number] for number in range(7)]
    names = [write(form, rows[:4], "labels", "a"), write(form, rows[4:], "labels", "b")]
    corpus = open_corpus(names, "labels")
    for skipped in range(8):
        for batch_size in (1, 3, 100):
            found = corpus.rows.arrow_tables("labels", skipped, batch_size)
            assert [row for table in found for row in table["labels"].to_pylist()] == rows[skipped:]


def test_row_groups_that_were_counted_are_not_read():
    name = write(".parquet", [[1, 2], [3], [4], [5, 6]], "labels")
    last = pq.read_metadata(name).row_group(1).column(1)
    content = bytearray(Path(name).read_bytes())
    content[4 : last.dictionary_page_offset] = bytes(last.dictionary_page_offset - 4)
    Path(name).write_bytes(content)
    rows = open_corpus([name], "labels").rows
    assert [table["labels"].to_pylist() for table in rows.arrow_tables("labels", 3, 9)] == [[[5, 6]]]
    with pytest.raises(ValueError, match=r"rows.parquet is damaged or no parquet file"):
        list(rows.arrow_tables("labels", 1, 9))


def test_lengths_are_known_where_files_tell_them():
    for form in TABLES:
        assert (
            len(open_corpus([write(form, LABELS, "labels"), write(form, LABELS, "labels", "b")], "labels").rows) == 12
        )


@pytest.mark.parametrize("form", FORMS_OF_LABELS)
def test_an_id_outside_the_vocabulary_is_named_with_its_place(form):
    names = [write(form, [[1], []], "labels", "a"), write(form, [[2], [3, 99]], "labels", "b")]
    place = "line 3" if form in (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst") else "row 1"
    with pytest.raises(IndexError, match=rf"^{names[1]}, {place}: labels\[1\] is 99; accepted are ids from 0 to 7"):
        count(open_corpus(names, "labels"))


@pytest.mark.parametrize("form", TABLES)
def test_a_null_is_named_with_its_place(form):
    texts = open_corpus([write(form, ["a"], name="a"), write(form, ["b", "c", None], name="b")]).rows
    with pytest.raises(TypeError, match=rf"b{form}, row 2: the text is null; accepted is a string"):
        TokenCounts.from_texts(texts, lambda text: [0], vocab_size=1, progress=False)
    labels = open_corpus([write(form, [[1]], "labels", "c"), write(form, [[2], [3, None]], "labels", "d")], "labels")
    with pytest.raises(ValueError, match=rf"d{form}, row 1: labels\[1\] is null inside a list"):
        count(labels)


@pytest.mark.parametrize("form", TABLES)
def test_rows_that_are_null_hold_no_ids(form):
    assert count(open_corpus([write(form, [[1], None, [2, 3]], "labels")], "labels"), shift=False).total == 3


@pytest.mark.parametrize("form", [*LINES, ".csv", *TABLES])
def test_a_missing_column_is_told_which_there_are(form):
    message = rf"rows{form}.* has no column 'txt'; accepted by --column are those it has: 'n', 'text'"
    with pytest.raises(ValueError, match=message):
        open_corpus([write(form, ["a"])], "txt")


@pytest.mark.parametrize("form", [".jsonl", "array.json", ".txt", ".csv", *TABLES])
def test_files_without_rows(form):
    if form == ".csv":
        Path("rows.csv").write_text("n,text\n")
    elif form in TABLES:
        write(form, pa.array([], pa.string()) if form != "saved" else [])
    else:
        write(form, [])
    with pytest.raises(ValueError, match=rf"rows{form}: there is no text and no label in there; accepted is at least"):
        open_corpus([f"rows{form}"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, ["b"]]', r"a.json, row 1 is a JSON list; accepted is .* or one array of objects"),
        ("a.json", b'[{"text": "a"},\n\n {"text"}]', r"a.json, row 1 is no JSON \(Expecting ':' delimiter\)"),
        ("a.json", b'{\n "text": "a"\n}', r"a.json, line 1 is no JSON \(Expecting property name"),
        ("a.jsonl", b'[{"text": "a"}]', r"a.jsonl, line 1 is a JSON list; accepted is one JSON object a line$"),
        ("a.jsonl", b'{"text": [1, 18446744073709551615]}', r"a.jsonl, line 1: .* a list with 18446744073709551615"),
        ("a.jsonl", b'{"text": [99999999999999999999, 1]}', r"a.jsonl, line 1: .* a list with 99999999999999999999"),
        ("a.jsonl.gz", b"a", r"a.jsonl.gz is damaged after line 0 \(.*\); accepted is a .gz file"),
        ("a.csv", b"", r"a.csv is damaged or no csv file \(No columns to parse from file\)"),
        ("a.csv", b"n,text\n1,a\n2,b,c\n", r"a.csv is damaged or no csv file \(.*Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"n,text\n1,a\n2,caf\xe9\n", r"a.csv, line 3 is no UTF-8"),
        ("a.csv.zst", b"a", r"a.csv.zst has the suffix '.csv.zst'; accepted are .jsonl or .json"),
        ("a.parquet.gz", b"a", r"a.parquet.gz has the suffix '.parquet.gz'"),
        ("a.parquet", b"a", r"a.parquet is damaged or no parquet file"),
        ("a.arrow", b"hello world, hello world", r"a.arrow is damaged or no arrow file"),
        ("a.arrow", b"ARROW1 and then nothing of it", r"a.arrow is damaged or no arrow file"),
    ],
)
def test_damaged_files(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_all(open_corpus([name]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_short(suffix):
    write(f".jsonl{suffix}", [f"{number * 7919 % 1000} {number}" for number in range(20_000)])
    content = Path(f"rows.jsonl{suffix}").read_bytes()
    Path(f"rows.jsonl{suffix}").write_bytes(content[: len(content) // 2])
    corpus = open_corpus([f"rows.jsonl{suffix}"])
    with pytest.raises(
        ValueError, match=rf"rows.jsonl{suffix} is damaged after line \d+ \(.*\); accepted is a {suffix}"
    ):
        list(corpus.rows)


def test_an_arrow_file_that_was_cut_short():
    name = write("stream.arrow", TEXTS)
    Path(name).write_bytes(Path(name).read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"rowsstream.arrow is damaged or no arrow file"):
        list(open_corpus([name]).rows)


def test_texts_of_tables_that_are_no_utf8():
    offsets, data = pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xe9")
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, offsets, data)}), "latin.parquet")
    with pytest.raises(ValueError, match=r"latin.parquet is no UTF-8 \(.*\); accepted is UTF-8"):
        list(open_corpus(["latin.parquet"]).rows)


@pytest.mark.parametrize("form", [".txt", ".parquet"])
def test_errors_of_the_disk_stay_what_they_are(monkeypatch, form):
    corpus = open_corpus([write(form, TEXTS)])

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(inputs.Input, "_open", broken)
    monkeypatch.setattr(tables.ParquetFiles, "open", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        list(corpus.rows)
    assert caught.value.errno == 5


def test_a_column_is_read_whatever_lies_beside_it():
    """`datasets` refuses a file with a column of a type that it lacks."""
    beside = pa.array([[("a", 1)]] * len(TEXTS), pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode(), "beside": beside}), "rows.parquet")
    assert list(open_corpus(["rows.parquet"]).rows) == TEXTS


def test_files_of_different_integers_are_not_cast_to_each_other():
    for number, kind in enumerate((pa.list_(pa.int8()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 1))):
        pq.write_table(pa.table({"labels": pa.array([[7]], kind)}), f"{number}.parquet")
    assert count(open_corpus(["?.parquet"], "labels"), shift=False).counts[7] == 3


def test_globs():
    for number in (2, 10, 1):
        write(".txt", [str(number)], name=f"part{number}")
    write(".txt", ["in brackets"], name="a[1]")
    assert list(open_corpus(["part*.txt"]).rows) == ["1", "10", "2"], "in the order of their names"
    assert list(open_corpus(["part2.txt", "part1*.txt"]).rows) == ["2", "1", "10"]
    assert list(open_corpus(["a[1].txt"]).rows) == ["in brackets"], "a file with this name comes first"
    with pytest.raises(FileNotFoundError, match=r"there is no file none\*.txt"):
        open_corpus(["none*.txt"])
    with pytest.raises(ValueError, match=r"part1.txt is given twice"):
        open_corpus(["part*.txt", "part1.txt"])


def test_folders():
    Path("plain").mkdir()
    with pytest.raises(
        ValueError, match=r"plain is a folder; accepted are files, such as plain/\*.jsonl, and folders made"
    ):
        open_corpus(["plain"])
    data = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk("splits")
    with pytest.raises(ValueError, match=r"splits holds several splits; accepted is one of splits/test, splits/train"):
        open_corpus(["splits"])
    assert list(open_corpus(["splits/test"]).rows) == TEXTS
    with pytest.raises(ValueError, match=r"several kinds, saved data set \(splits/test\) and text \(a.txt\)"):
        open_corpus(["splits/test", write(".txt", TEXTS, name="a")])


@pytest.mark.parametrize("form", FORMS_OF_LABELS)
def test_a_corpus_is_known_by_what_it_holds(form):
    before = open_corpus([write(form, LABELS, "labels")], "labels").source
    assert open_corpus([f"rows{form}"], "labels").source == before
    if form == "saved":
        datasets.Dataset.from_dict({"labels": LABELS[::-1]}).save_to_disk("rowssaved")
    else:
        write(form, LABELS[::-1], "labels")
    assert open_corpus([f"rows{form}"], "labels").source != before


def test_what_a_saved_folder_is_called():
    source = open_corpus([write("saved", LABELS, "labels")], "labels").source
    assert source.startswith("1 saved data set (rowssaved; ")


# ---------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub with one data set; what it was asked for."""
    import huggingface_hub

    asked = []
    rows = datasets.Dataset.from_dict({"text": TEXTS, "labels": LABELS})

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return rows.to_iterable_dataset()

    class Info:
        sha = "abc123"

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repository: Info())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("name", "arguments", "split"),
    [
        ("someone/data:train", ("someone/data", None), "train"),
        ("someone/da.ta-1:en:test", ("someone/da.ta-1", "en"), "test"),
    ],
)
def test_a_data_set_on_the_hub(hub, name, arguments, split):
    corpus = open_corpus([name], "text")
    assert hub == [(arguments, {"split": split, "revision": "abc123", "streaming": True})]
    assert list(corpus.rows) == TEXTS
    assert corpus.source == f"data set {name} on the Hugging Face hub, commit abc123"
    labels = open_corpus([name], "labels")
    assert labels.batch_size == tables.TEXT_BATCH
    assert count(labels) == TokenCounts(8).update(LABELS, shift=True)
    found = labels.rows.arrow_tables("labels", 4, 1)
    assert [row for table in found for row in table["labels"].to_pylist()] == LABELS[4:]
    with pytest.raises(IndexError, match=rf"{name}, row 1: labels\[3\] is 7; accepted are ids from 0 to 6"):
        TokenCounts.from_dataset(labels.rows, 7, "labels", shift=False, progress=False)
    with pytest.raises(ValueError, match=rf"{name} has no column 'txt'"):
        open_corpus([name], "txt")


@pytest.mark.parametrize("column", ["n", "numbers"])
def test_columns_of_tables_that_hold_neither(hub, column):
    name = write(".parquet", [[0.5]], "numbers")
    with pytest.raises(ValueError, match=rf"column '{column}' holds (int64|list<.*>); accepted are strings, lists of"):
        open_corpus([name], column)


def test_a_hub_that_gives_nothing(hub, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"did not give a data set \(Couldn't reach the hub\); accepted on the hub are OWN"
    ):
        open_corpus(["someone/data:train"])
    assert hub == []


def test_a_hub_that_stops_giving(hub, monkeypatch):
    texts, labels = open_corpus(["someone/data:train"], "text"), open_corpus(["someone/data:train"], "labels")

    def lost(*_, **__):
        raise ConnectionError("the connection was lost")

    monkeypatch.setattr(datasets.IterableDataset, "iter", lost)
    message = r"someone/data:train could not be read from the Hugging Face hub \(the connection was lost\)"
    for read in (lambda: list(texts.rows), lambda: count(labels)):
        with pytest.raises(ValueError, match=message):
            read()


def test_only_names_with_a_split_are_asked_of_the_hub(hub):
    for name in ("someone/data", "someone/data/more:train", "data:train"):
        with pytest.raises(FileNotFoundError, match=f"there is no file {name}"):
            open_corpus([name])
    assert hub == []
