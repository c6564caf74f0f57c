"""What the progress bar says, in rows or, where their number is not known, in bytes."""

import pytest

from pdl_kernels import TokenCounts

ROWS = ["ab", "c", "def"]


class Unsized:
    """Rows of a file that tells how many bytes it has, and how many of them were read."""

    size = 2048
    read = 0

    def __iter__(self):
        for row in ROWS:
            self.read += 512
            yield row

    def bytes_read(self):
        return self.read


def count(rows, **options):
    return TokenCounts.from_texts(rows, lambda text: [0] * len(text), vocab_size=1, batch_size=1, **options)


@pytest.mark.parametrize(("rows", "total"), [(ROWS, "3/3"), (Unsized(), "1.50k/2.00k")], ids=["rows", "bytes"])
def test_rows_targets_and_rate_are_shown(rows, total, capsys):
    assert count(rows).total == 3
    shown = capsys.readouterr().err
    assert total in shown
    assert "3 texts, 3 targets, " in shown
    assert "targets/s" in shown
    assert "?" not in shown.rsplit("\r", 1)[1].split("[")[0], "how much is left is known"


def test_nothing_is_shown_unless_it_is_asked_for(capsys):
    assert count(ROWS, progress=False).total == 3
    assert capsys.readouterr() == ("", "")


def test_rows_that_were_counted_before_are_behind_the_bar(tmp_path, capsys):
    count(ROWS, checkpoint=tmp_path / "c", progress=False)
    count([*ROWS, "xyz"], checkpoint=tmp_path / "c")
    shown = capsys.readouterr().err
    assert "| 3/4 [" in shown, "it starts where counting goes on"
    assert "4 texts, 2 targets" in shown, "the rate is of this run"
