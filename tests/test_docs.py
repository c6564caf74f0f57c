"""What the documentation shows runs as written, and what it names exists."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import pdl_kernels

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "pdl_kernels").rglob("*.py"))
    if "    >>> " in path.read_text()
]
FOLDERS = ("benchmarks", "docs", "examples", "pdl_kernels", "reference", "scripts", "tests")  # of the repository
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md"))
}
README_LINES = 140
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What the snippets of a page differentiate: a page whose snippets run and compute nothing shows nothing.
DIFFERENTIATED = {
    "README.md": "hidden",
    "docs/linear.md": "hidden",
    "docs/loss.md": "logits",
    "docs/training.md": "model.lm_head.weight",
    "docs/weights.md": "logits",
}
# In tests/integrations/test_accelerate.py, and in tests/distributed/test_distributed_page.py.
RUN_ELSEWHERE = {"docs/training_accelerate.md", "docs/distributed.md"}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {**vars(pdl_kernels), "torch": torch}
    results = doctest.testmod(module, extraglobs=names)
    assert results.attempted > 0
    assert results.failed == 0


def test_pages_with_snippets_are_known():
    assert {page for page, text in PAGES.items() if "```python" in text} == set(DIFFERENTIATED) | RUN_ELSEWHERE


@pytest.mark.parametrize("page", DIFFERENTIATED)
def test_snippets(page, tmp_path, monkeypatch):
    """Each runs as written, one after the other in one namespace per page."""
    monkeypatch.chdir(tmp_path)
    snippets = SNIPPET.findall(PAGES[page])
    assert len(snippets) == PAGES[page].count("```python") > 0
    names: dict[str, object] = {"__name__": "snippet"}
    for snippet in snippets:
        exec(snippet, names)
    assert eval(DIFFERENTIATED[page], names).grad.abs().sum() > 0


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= README_LINES


def code(text):
    """The words of code: of spans in backticks, of fenced blocks and of indented lines, each span or line a list."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", text)
    lines = [line for block in fenced for line in block.splitlines()] + re.findall(r"^ {4}(.+)$", text, re.MULTILINE)
    return [words for words in map(str.split, spans + lines) if words]


def make_targets(text):
    """X of every `make X` in code."""
    return {
        words[1] for words in code(text) if words[0] == "make" and len(words) > 1 and re.fullmatch(r"[\w.-]+", words[1])
    }


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert make_targets(PAGES[page]) <= targets


def test_readme_names_both_commands():
    assert {"demo", "test"} <= make_targets(PAGES["README.md"])


def missing_links(page, text):
    """Relative links of a page to files or headings that are not there."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.MULTILINE)
    missing = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (heading and heading not in headings(file.read_text())):
            missing.append(target)
    return missing


def headings(text):
    """As GitHub names them in links."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert missing_links(page, PAGES[page]) == []


def missing_files(text):
    """Names of the repository's files that are not there: paths that begin with one of its folders, and bare or partial
    names of sources and pages, which may end any path (`ops/chunks.py`)."""
    paths = set(re.findall(rf"(?<![\w./<-])((?:{'|'.join(FOLDERS)})/[\w./*-]*)", text))
    missing = [path for path in paths if not list(ROOT.glob(path.rstrip("./*") or "."))]
    sources = [path.as_posix() for path in repository_files() if path.suffix in (".py", ".md")]
    for words in code(text):
        for word in words:
            partial = re.fullmatch(r"[\w-]+(?:/[\w-]+)*\.(?:py|md)", word)
            if partial and not any(f"/{source}".endswith(f"/{word}") for source in sources):
                missing.append(word)
    return sorted(missing)


def repository_files():
    yield from (path.relative_to(ROOT) for path in ROOT.glob("*.*"))
    for folder in FOLDERS:
        yield from (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.*"))


# Records name the commands of their day.
@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("benchmarks/results/")])
def test_files_that_are_named_exist(page):
    assert missing_files(PAGES[page]) == []


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/index.md"])) | {"index.md"}
    assert listed == {Path(page).name for page in PAGES if page.startswith("docs/")}


class TestTheChecksThemselves:
    """What each of them is there to find."""

    def test_a_make_target_is_found_in_code_alone(self):
        assert make_targets("make sense, `make nothing`\n\n    make demo  # this\n") == {"nothing", "demo"}

    def test_a_file_that_is_not_there(self):
        assert missing_files("see tests/no_such_file.py, and `ops/no_such.py`") == [
            "ops/no_such.py",
            "tests/no_such_file.py",
        ]

    def test_a_file_that_is_there(self):
        assert missing_files("see tests/test_docs.py, `ops/cross_entropy.py`, `results/x.json`, `x.json`") == []

    def test_a_link_to_a_page_or_a_heading_that_is_not_there(self):
        text = "# A title: two\n\n[a](no.md) [b](#a-title-two) [c](#other) [d](README.md) [e](https://x.org)"
        page = "no_such_page.md"
        assert missing_links(page, text.replace("(#", "(CHANGELOG.md#")) == [
            "no.md",
            "CHANGELOG.md#a-title-two",
            "CHANGELOG.md#other",
        ]
