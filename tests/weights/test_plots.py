"""What the plots show: the fit of Zipf's law and the shares by decade; and pictures of odd tables."""

import pytest
import torch
from helpers.pictures import png_size

plots = pytest.importorskip("pdl_kernels.weights.plots", exc_type=ImportError)


def test_zipf_fit():
    ranks = torch.arange(1, 20001).double().numpy()
    counts = 1e7 / ranks**1.25
    counts[:5] = 1e7  # the most frequent types are not on the line, and are left out
    fit = plots.zipf_fit(counts)
    assert fit.slope == pytest.approx(-1.25, abs=1e-6)
    assert fit.first == 10
    assert fit.last == 20000
    # Each decade of ranks counts alike: two slopes that meet at rank 1000 give about their mean over 10 to 100,000.
    ranks = torch.arange(1, 100001).double().numpy()
    bent = 1e12 * ranks**-1.0
    bent[999:] = 1e9 * (ranks[999:] / 1000) ** -2.0
    assert plots.zipf_fit(bent).slope == pytest.approx(-1.5, abs=0.05)
    assert plots.zipf_fit(counts[:2]) is None


def test_shares_by_decade():
    counts = torch.tensor([1, 9, 10, 99, 1000, 10**15]).double().numpy()
    weights = torch.tensor([1, 1, 2, 0, 0.5, 0]).double().numpy()
    decades, before, after = plots.shares_by_decade(weights, counts)
    assert decades == list(range(16))
    assert before[[0, 1, 2, 3, 15]].tolist() == pytest.approx([10 / 1e15, 109 / 1e15, 0, 1000 / 1e15, 1], rel=1e-6)
    assert after[[0, 1, 2, 3]].tolist() == pytest.approx([10 / 530, 20 / 530, 0, 500 / 530])


@pytest.mark.parametrize(
    ("table", "counts"), [([1.0], [1]), ([0.0, 0.0], [3, 4]), ([1.0, 1e7, 2.0], [5, 0, 4]), ([0.5] * 40, [1] * 30)]
)
def test_plot_of_odd_tables(tmp_path, table, counts):
    plots.plot(tmp_path / "plot.png", torch.tensor(table), torch.tensor(counts))
    assert png_size(tmp_path / "plot.png") == (plots.WIDTH, plots.HEIGHT)


def test_plot_refuses(tmp_path):
    with pytest.raises(ValueError, match="counts are all 0"):
        plots.plot(tmp_path / "plot.png", torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="accepted are at most 2"):
        plots.plot(tmp_path / "plot.png", torch.ones(2), torch.ones(3))
