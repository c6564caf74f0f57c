"""What docs/distributed.md shows, and what it says of FSDP2, with two processes."""

from pathlib import Path

from helpers.ranks import run_ranks

RANKS = Path(__file__).parent / "ranks"


def test_the_snippets_of_the_page():
    said = run_ranks(2, RANKS / "page_ranks.py")
    assert all("as on the page" in text for text in said)
