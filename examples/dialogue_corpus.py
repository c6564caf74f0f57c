"""Human-human chat from the pip package chitchat-dataset (0.9.0, MIT, uncurated), as texts to count.

    pip install --no-deps chitchat-dataset==0.9.0
    python examples/dialogue_corpus.py replies.jsonl      # one {"text": ...} a line: every turn but the first

A dialogue model learns the replies, so these are what PDL's frequencies are of; the first turn is only ever context.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from text_files import write_texts


def replies() -> Iterator[str]:
    """Each turn after a conversation's first; a turn is one speaker's messages in a row, a line each."""
    import chitchat_dataset

    for conversation in chitchat_dataset.Dataset().values():
        turns = ["\n".join(m["text"].strip() for m in turn if m.get("text")) for turn in conversation["messages"]]
        yield from [turn for turn in turns if turn][1:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, help="the file to write; an old one is replaced")
    output = parser.parse_args(arguments).output
    try:
        texts = list(replies())
    except ModuleNotFoundError:
        print("error: pip install --no-deps chitchat-dataset==0.9.0", file=sys.stderr)
        return 2
    write_texts(output, texts)
    print(f"{output}: {len(texts)} replies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
