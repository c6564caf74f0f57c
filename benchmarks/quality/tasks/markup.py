"""Readable English out of a docstring's markup: reStructuredText, numpydoc's sections, doctests."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Sections of code, names and numbers.
DROPPED_SECTIONS = frozenset(
    ("example", "examples", "reference", "references", "see also", "methods", "attributes", "links", "doctests")
)
# Headings that say nothing about the text below them. Others, "Parameters" say, stay with a colon.
SILENT_HEADINGS = frozenset(("description", "details", "explanation", "introduction", "note", "notes", "overview"))
# Directives whose block is code, a formula, a picture or history.
DROPPED_DIRECTIVES = frozenset(
    {
        "autoclass",
        "autofunction",
        "automodule",
        "autosummary",
        "bibliography",
        "code",
        "code-block",
        "contents",
        "currentmodule",
        "deprecated",
        "figure",
        "function",
        "highlight",
        "image",
        "include",
        "index",
        "ipython",
        "list-table",
        "math",
        "module",
        "only",
        "parsed-literal",
        "plot",
        "sectionauthor",
        "sourcecode",
        "table",
        "testcode",
        "toctree",
        "versionadded",
        "versionchanged",
    }
)
UNDERLINE = re.compile(r"\s*([=\-~^\"'*+#`_])\1{2,}\s*")
TABLE_RULE = re.compile(r"\s*[|+=\-][|+=\- ]{3,}\s*|\s*\|.*\|\s*")
DIRECTIVE = re.compile(r"\.\.\s+([\w:-]+?)::\s*(.*)")
LINE = (  # what marks the beginning of a line
    (re.compile(r"^:(?:rtype|type)\b[^:]*:.*"), ""),
    (re.compile(r"^:(?:param|parameter|arg|key|keyword|raises?|var|ivar)\s+([^:]+):"), r"\1:"),
    (re.compile(r"^:returns?:"), "Returns:"),
    (re.compile(r"^(\*{0,2}\w[\w, *]*?) : "), r"\1: "),  # numpydoc's "name : type"
)
INLINE = (  # what may run over the end of a line
    (re.compile(r":math:`([^`]*)`"), r"\1"),
    (re.compile(r":[\w:+-]+:`~([^`<]*\.)?([^`<]*)`"), r"\2"),  # :func:`~package.name` shows the name alone
    (re.compile(r":[\w:+-]+:`!?([^`<]*?)(?:\s*<[^`]*>)?`"), r"\1"),
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),
    (re.compile(r"`([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"\s*\[[\w.]+\]_"), ""),  # citations
    (re.compile(r"\s+\([\s,;]*\)"), ""),  # what citations leave
    (re.compile(r"(?<![\w*])\*\*(\w(?:[^*]*\w)?)\*\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\w(?:[^*]*\w)?)\*(?![\w*])"), r"\1"),
    (re.compile(r"%\(\w+\)s"), ""),  # places that decorators fill
    (re.compile(r"\\([*_`|\\ ])"), r"\1"),
)
USER_GUIDE = re.compile(r"(?:Read|See) more in the [^.]*?\.")


def inline(text: str) -> str:
    """A text without the marks for code, emphasis, links and citations, on one line."""
    return " ".join(_replaced(" ".join(text.split()), INLINE).split())


def prose(lines: Sequence[str]) -> str:
    """The sentences of a docstring's lines in one paragraph: no code, no formulas on lines of their own, no tables."""
    kept: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        following = position + 1
        if _is_heading(lines, position):
            heading = line.strip().rstrip(":")
            following += 1
            if heading.lower() in DROPPED_SECTIONS:
                while following < len(lines) and not _is_heading(lines, following):
                    following += 1
            elif heading.lower() not in SILENT_HEADINGS:
                kept.append(heading + ":")
        elif line.lstrip().startswith(">>>"):
            while following < len(lines) and lines[following].strip():  # the output ends at an empty line
                following += 1
        elif line.lstrip().startswith(".."):
            directive = DIRECTIVE.match(line.strip())
            if directive and directive[1] not in DROPPED_DIRECTIVES:
                kept.append(directive[2])
            else:
                following = _end_of_block(lines, position)
        elif not UNDERLINE.fullmatch(line) and not TABLE_RULE.fullmatch(line):
            text = _replaced(line.strip(), LINE)
            if text.endswith("::"):
                text = text[:-1] if len(text) > 2 else ""
                following = _end_of_block(lines, position)
            kept.append(text)
        position = following
    return " ".join(USER_GUIDE.sub("", inline(" ".join(kept))).split())


def _replaced(text: str, replacements: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in replacements:
        text = pattern.sub(replacement, text)
    return text


def _is_heading(lines: Sequence[str], position: int) -> bool:
    """Whether the line has an underline beneath it."""
    below = lines[position + 1] if position + 1 < len(lines) else ""
    return bool(lines[position].strip()) and UNDERLINE.fullmatch(below) is not None


def _end_of_block(lines: Sequence[str], position: int) -> int:
    """The first line after `position` that is neither empty nor deeper than the line there."""
    depth = len(lines[position]) - len(lines[position].lstrip())
    end = position + 1
    while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > depth):
        end += 1
    return end
