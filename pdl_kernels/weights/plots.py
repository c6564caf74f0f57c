"""A picture of what a weight table does to a corpus. Importing this file needs matplotlib."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from torch import Tensor

from pdl_kernels.weights import files
from pdl_kernels.weights.checks import check_table_and_counts
from pdl_kernels.weights.counts import TokenCounts

WIDTH, HEIGHT = 1500, 500  # pixels
DOTS_PER_INCH = 100

# These colours can be told apart in grey, and by colour-blind readers.
BEFORE, AFTER, FITTED = "#999999", "#0072b2", "#d55e00"

# The line is fitted between these bounds: the few most frequent types lie off it, and at low counts many types tie.
FIRST_RANK = 10
SMALLEST_COUNT = 5
DRAWN_POINTS = 2000

Numbers = npt.NDArray[np.float64]


class ZipfFit(NamedTuple):
    """log10 count = intercept + slope * log10 rank, over ranks from `first` to `last`."""

    slope: float
    intercept: float
    first: int
    last: int


def zipf_fit(counts: Numbers) -> ZipfFit | None:
    """The line through counts against ranks, by least squares in log-log with weights 1 / rank.

    With these weights every decade of ranks counts the same. Without them the rare types, which hold nearly all ranks,
    would decide the fit. It uses the ranks from 10 to the last with a count of 5, or from 1 where these are fewer than
    ten; of fewer than three ranks there is no fit.

    Args:
        counts: (n,) in any order.
    """
    ordered = np.sort(counts)[::-1]
    last = int((ordered >= SMALLEST_COUNT).sum())
    first = FIRST_RANK if last >= 2 * FIRST_RANK else 1
    if last - first < 2:
        return None
    ranks = np.arange(first, last + 1)
    slope, intercept = np.polyfit(np.log10(ranks), np.log10(ordered[first - 1 : last]), 1, w=np.sqrt(1 / ranks))
    return ZipfFit(float(slope), float(intercept), first, last)


def shares_by_decade(weights: Numbers, counts: Numbers) -> tuple[list[int], Numbers, Numbers]:
    """Each decade of counts: its exponent, its share of the targets, its share of the weight.

    A type counted from 10 to 99 times is in decade 1. If every token were equally hard, these would be the shares of
    the loss without and with the weights.

    Args:
        weights: (n,) of types with counts >= 1.
        counts: (n,)
    """
    # log10 of a power of ten is exact, so rounding does not move 1000 from decade 3 to decade 2.
    decades = np.floor(np.log10(counts)).astype(int)
    mass = weights * counts
    before = np.bincount(decades, counts) / counts.sum()
    after = np.bincount(decades, mass) / max(mass.sum(), np.finfo(float).tiny)
    return list(range(len(before))), before, after


def plot(path: str | os.PathLike[str], table: Tensor, counts: Tensor | TokenCounts) -> None:
    """Write a PNG of 1500 x 500 pixels, whole or not at all: counts by rank, weights by count, shares of the loss.

    Args:
        path: the file to write.
        table: (V,) weights.
        counts: (n,) counts of training targets, n <= V, or `TokenCounts`.

    Raises:
        ValueError: more counts than weights; counts that are all 0; bad weights or counts.
    """
    weights, frequencies = (tensor.numpy() for tensor in check_table_and_counts(table, counts))
    seen = frequencies > 0

    layout = ConstrainedLayoutEngine(w_pad=0.12)  # inches
    figure = Figure(figsize=(WIDTH / DOTS_PER_INCH, HEIGHT / DOTS_PER_INCH), dpi=DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    by_rank, by_count, by_share = figure.subplots(1, 3)
    _draw_ranks(by_rank, frequencies[seen])
    _draw_weights(by_count, weights, frequencies)
    _draw_shares(by_share, *shares_by_decade(weights[seen], frequencies[seen]))
    for panel in (by_rank, by_count, by_share):
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(13)
        panel.xaxis.label.set_fontsize(12)
        panel.yaxis.label.set_fontsize(12)
        panel.tick_params(labelsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.replace_file(path, content.getvalue())


def _draw_ranks(panel: Any, counts: Numbers) -> None:
    ordered = np.sort(counts)[::-1]
    # Markers are even in log rank: one for every rank would put a hundred thousand on top of each other.
    ranks = np.unique(np.geomspace(1, len(ordered), DRAWN_POINTS).astype(int))
    panel.loglog(ranks, ordered[ranks - 1], ".", color=AFTER, markersize=5, label="token types")
    fit = zipf_fit(counts)
    if fit is None:
        panel.set_title("Frequency against rank")
    else:
        ends = np.array([fit.first, fit.last])
        label = f"least squares in log-log, ranks\n{fit.first:,} to {fit.last:,}, each decade alike"
        panel.loglog(ends, 10**fit.intercept * ends**fit.slope, "-", color=FITTED, linewidth=2, label=label)
        panel.set_title(f"Frequency against rank: Zipf slope {fit.slope:.2f}".replace("-", "\N{MINUS SIGN}"))
    panel.set_xlabel("rank of the token type")
    panel.set_ylabel("count (targets)")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=10, loc="lower left")


def _draw_weights(panel: Any, weights: Numbers, counts: Numbers) -> None:
    positive = weights > 0  # a weight of 0 has no place on a log axis
    pairs = np.unique(np.stack([counts, weights], axis=1)[(counts > 0) & positive], axis=0)
    panel.loglog(pairs[:, 0], pairs[:, 1], ".", color=AFTER, markersize=5, label="token types seen")
    unseen = weights[(counts == 0) & positive]
    if len(unseen):
        levels = np.unique([unseen.min(), unseen.max()])
        label = f"{len(unseen):,} types never counted"
        panel.loglog(np.full(len(levels), 0.3), levels, "D", color=FITTED, markersize=7, label=label)
    if zero := int((~positive).sum()):
        panel.plot([], [], " ", label=f"{zero:,} types of weight 0 not shown")
    panel.axhline(1, color="black", linewidth=1, linestyle="--", label="plain cross entropy")
    panel.set_title("Weight against frequency")
    panel.set_xlabel("count of the token type (targets)")
    panel.set_ylabel("weight (1: as plain cross entropy)")
    low, high = panel.get_ylim()
    if high / low < 1000:  # few powers of ten lie between the weights: label 2 and 5 of each too
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=10)


def _draw_shares(panel: Any, decades: list[int], before: Numbers, after: Numbers) -> None:
    position = np.arange(len(decades))
    for shares, color, offset, label in (
        (before, BEFORE, -0.2, "plain cross entropy"),
        (after, AFTER, 0.2, "with the weights"),
    ):
        bars = panel.bar(position + offset, shares, 0.4, color=color, label=label)
        panel.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=9, padding=2)
    panel.set_xticks(position, [_decade_name(decade) for decade in decades])
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_title("Share of the loss, if tokens are equally hard")
    panel.set_xlabel("count of the token type, by decade (targets)")
    panel.set_ylabel("share of the loss")
    panel.margins(y=0.15)
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)
    panel.legend(frameon=False, fontsize=10)


def _decade_name(decade: int) -> str:
    """The lower end of a decade: "1+", "10+", "100+", "1k+"."""
    thousands, rest = divmod(decade, 3)
    return f"{10**rest}{('', 'k', 'M', 'G', 'T', 'P', 'E')[thousands]}+"
