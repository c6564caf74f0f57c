"""Docstrings as pairs: what a docstring goes on to say, and the sentence that it begins with."""

from __future__ import annotations

import ast
import re
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from benchmarks.quality.tasks.markup import UNDERLINE, inline, prose
from benchmarks.quality.tasks.pairs import Pair

MINIMUM_BODY_WORDS = 20
MAXIMUM_BODY_WORDS = 80  # what follows is cut off
MINIMUM_SUMMARY_WORDS = 4
MAXIMUM_SUMMARY_WORDS = 24
MINIMUM_SUMMARY_PROSE = 0.7  # the share of plain words
MINIMUM_BODY_PROSE = 0.6
SHINGLE_WORDS = 5
# Tests, other people's code inside a package, and programs that are not library code.
EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_external",
        "_testing",
        "_uarray",
        "_vendor",
        "_vendored",
        "array_api_compat",
        "array_api_extra",
        "benchmarks",
        "clipboard",
        "cobyqa",
        "dist-packages",
        "ensurepip",
        "examples",
        "extern",
        "external",
        "externals",
        "idle_test",
        "idlelib",
        "lib2to3",
        "multipledispatch",
        "pyprima",
        "site-packages",
        "test",
        "testing",
        "tests",
        "turtledemo",
        "vendor",
        "vendored",
    }
)
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\bal)(?<!\betc)\.(?=\s+[A-Z\"'(]|$)")
PLAIN_WORD = re.compile(r"[\"'(]*[A-Za-z]+(?:[-'][A-Za-z]+)*[.,;:!?)\"']*")
NO_SUMMARY = re.compile(
    r"deprecated|todo\b|fixme\b|tests?\b|see\b|alias\b|copyright|licen[cs]e|created on|authors?\b|this file|"
    r"usage\b|[\w.]+\s*\(|[\w.]+\s*=",
    re.IGNORECASE,
)
CODE = re.compile(r"[{}\\$`@|]|%[(sdr]|>>>|::|->|==|https?:|\*\w+\*|\[\d+\]|\.\. ")
# Formulas, drawings, links, unfilled templates and notes of authorship.
NO_BODY = re.compile(
    r"\\[A-Za-z]|[$`]|%[(sdr]|>>>|https?:|@\w|[-_=~]{4,}|\b(?:TODO|FIXME|XXX)\b|\bCreated on\b|\bAuthors?\s*:|"
    r"\bLicen[cs]e\s*:|Copyright"
)


def module_files(folder: Path) -> list[Path]:
    """The folder's Python files in a fixed order, without tests and the other excluded folders."""
    return sorted(
        path
        for path in folder.rglob("*.py")
        if EXCLUDED_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1])
        and path.name != "conftest.py"
        and not path.name.startswith("test_")
    )


def module_pairs(folder: Path, name: str) -> Iterator[Pair]:
    """The pairs of all modules below a package's folder; each module, by its path, is a group.

    The files are read and never imported; one that cannot be parsed gives nothing.
    """
    for path in module_files(folder):
        try:
            with tokenize.open(path) as stream:  # honours the encoding that the file declares
                docstrings = list(docstrings_of(stream.read()))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        module = f"{name}/{path.relative_to(folder).as_posix()}"
        for docstring in docstrings:
            if (parts := summary_and_body(docstring)) is not None:
                summary, body = parts
                yield Pair((body,), summary, module)


def docstrings_of(source: str) -> Iterator[str]:
    """Every docstring of a module, its classes and its functions, in the order of `ast.walk`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings are not this program's news
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def summary_and_body(docstring: str) -> tuple[str, str] | None:
    """The first sentence and the text after it, both as prose; None where either is not fit to learn from."""
    lines = docstring.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
    if any(UNDERLINE.fullmatch(line) for line in lines[:end]):
        return None  # a title
    paragraph = inline(" ".join(lines[:end]))
    match = SENTENCE_END.search(paragraph)
    if match is None or not is_summary(paragraph[: match.end()]):
        return None
    words = f"{paragraph[match.end() :]} {prose(lines[end:])}".split()[:MAXIMUM_BODY_WORDS]
    body = " ".join(words)
    if len(words) < MINIMUM_BODY_WORDS or prose_share(words) < MINIMUM_BODY_PROSE or NO_BODY.search(body):
        return None
    return paragraph[: match.end()], body


def is_summary(sentence: str) -> bool:
    """Whether a first sentence sums up: of the right length, in words, and about what the docstring documents."""
    words = sentence.split()
    return (
        MINIMUM_SUMMARY_WORDS <= len(words) <= MAXIMUM_SUMMARY_WORDS
        and sentence[0].isupper()
        and NO_SUMMARY.match(sentence) is None
        and CODE.search(sentence) is None
        and prose_share(words) >= MINIMUM_SUMMARY_PROSE
    )


def prose_share(words: list[str]) -> float:
    """The share of plain words: letters only, but for hyphens, apostrophes and punctuation around them."""
    return sum(PLAIN_WORD.fullmatch(word) is not None for word in words) / len(words)


def without_repeats(pairs: Iterator[Pair]) -> list[Pair]:
    """Each summary once, and no pair of whose word runs more than half stand in earlier pairs that were kept."""
    kept: list[Pair] = []
    summaries: set[str] = set()
    known: set[tuple[str, ...]] = set()
    for pair in pairs:
        summary = " ".join(re.findall(r"\w+", pair.reference.lower()))
        runs = shingles(f"{pair.reference} {pair.source}")
        if summary not in summaries and 2 * len(runs & known) <= len(runs):
            summaries.add(summary)
            known |= runs
            kept.append(pair)
    return kept


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of `SHINGLE_WORDS` words; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))}
