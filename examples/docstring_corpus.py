"""English text that every Python installation carries: the docstrings of its standard library.

Nothing is downloaded, and the same Python version gives the same documents in the same order.

    python examples/docstring_corpus.py docstrings.jsonl     # one {"text": ...} a line, the demo's training part
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from text_files import write_texts

# Tests, bundled third-party code and programs that are not library code: their docstrings are few, odd or not the
# standard library's own.
EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
HELD_OUT_FRACTION = 0.1  # of the module files
MINIMUM_CHARACTERS = 80
MAXIMUM_CHARACTERS = 4000
SHINGLE_WORDS = 5


@dataclass(frozen=True)
class Document:
    """One docstring and the module file it comes from, as a path below the standard library's folder."""

    text: str
    module_file: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents; no module file gives documents to both."""

    training: list[Document]
    held_out: list[Document]
    near_duplicates_dropped: int


def module_files(library: Path) -> list[Path]:
    """The standard library's Python files in a fixed order, without the excluded folders."""
    return sorted(
        path for path in library.rglob("*.py") if EXCLUDED_FOLDERS.isdisjoint(path.relative_to(library).parts[:-1])
    )


def docstrings_of(source: str) -> Iterator[str]:
    """Every docstring of a module, its classes and its functions, in the order of `ast.walk`."""
    with warnings.catch_warnings():
        # Invalid escapes in somebody else's strings are not this program's news.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def collect_documents(library: Path | None = None) -> list[Document]:
    """Docstrings of reasonable length, each text once (the first file in order keeps it).

    `library` is the folder to search; by default the running interpreter's standard library.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    documents, seen = [], set()
    for path in module_files(library):
        try:
            with tokenize.open(path) as stream:  # honours the encoding that the file declares
                texts = list(docstrings_of(stream.read()))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for text in texts:
            normalised = " ".join(text.split())
            if MINIMUM_CHARACTERS <= len(text) <= MAXIMUM_CHARACTERS and normalised not in seen:
                seen.add(normalised)
                documents.append(Document(text, path.relative_to(library).as_posix()))
    return documents


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of `SHINGLE_WORDS` words; a shorter text is one run."""
    words = text.lower().split()
    return {tuple(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def without_near_duplicates(candidates: Sequence[Document], others: Iterable[Document]) -> list[Document]:
    """The candidates of which at most half the word runs also occur in the other documents."""
    known = set().union(*(shingles(document.text) for document in others))
    return [candidate for candidate in candidates if 2 * len(known & (runs := shingles(candidate.text))) <= len(runs)]


def split_by_module(documents: Sequence[Document], held_out_fraction: float, seed: int) -> Corpus:
    """Shuffle the module files and hold out whole files, then shuffle the documents of each part.

    Neighbours in a file repeat each other, so a split by document would leak. Twins in different files (posixpath and
    ntpath) would leak as well: held-out documents that mostly repeat training text are dropped.
    """
    files = sorted({document.module_file for document in documents})
    generator = random.Random(seed)
    generator.shuffle(files)
    held_out_files = set(files[: round(held_out_fraction * len(files))])
    training = [document for document in documents if document.module_file not in held_out_files]
    candidates = [document for document in documents if document.module_file in held_out_files]
    held_out = without_near_duplicates(candidates, training)
    generator.shuffle(training)
    generator.shuffle(held_out)
    return Corpus(training, held_out, near_duplicates_dropped=len(candidates) - len(held_out))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the demo's training documents as JSON lines.")
    parser.add_argument("output", type=Path, help="the file to write; an old one is replaced")
    output = parser.parse_args(arguments).output
    documents = split_by_module(collect_documents(), HELD_OUT_FRACTION, seed=0).training
    write_texts(output, (document.text for document in documents))
    print(f"{output}: {len(documents)} documents")


if __name__ == "__main__":
    main()
