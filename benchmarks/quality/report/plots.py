"""The frontier and the NLL by frequency, from the same series as the tables."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import ALPHAS
from benchmarks.quality.intervals import estimate
from benchmarks.quality.report.comparisons import CROSS_ENTROPY, CURVES, DIVERSITY, MODES, QUALITY
from benchmarks.quality.report.evidence import Reading, TaskEvidence
from benchmarks.quality.scoring import BUCKETS
from benchmarks.quality.tasks import TASKS
from pdl_kernels.weights.files import replace_file

PDL = [Reading(f"pdl-{alpha:g}") for alpha in ALPHAS]
OTHERS = [Reading("pdl-paper"), Reading("inverse-square-root"), Reading("focal"), Reading("untouched")]
COLOURS = {"cross entropy": "black", "adjusted logits": "tab:blue", "temperature": "tab:orange", "PDL": "tab:red"}
LABELS_AT = {"adjusted logits": (4, 4), "temperature": (-4, -10), "PDL": (-4, 4)}  # points; elsewhere if taken
PLACES = ((4, 4), (-4, 4), (-4, -10), (4, -10), (7, -3), (-7, -3), (0, 8), (0, -14), (12, 10), (-12, 10), (12, -16))
MARKER_OF_ALPHA = {"pdl-0.25": "v", "pdl-0.4": "o", "pdl-1": "s"}
NLL_TICKS = (-1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3)
MARKERS = dict(zip((reading.arm for reading in OTHERS), "DsPX", strict=True))


def plot_frontier(evidences: Sequence[TaskEvidence], path: Path, modes: Sequence[str] = MODES) -> None:
    """Diversity against quality: to the upper right of a baseline's curve is what the baseline cannot give.

    Up is better as far as the line of the references: a person's texts are no more diverse.
    """
    figure, axes = _axes(len(modes), len(evidences))
    for row, mode in enumerate(modes):
        for column, evidence in enumerate(evidences):
            axis = axes[row][column]
            for name, points in CURVES.items():
                _curve(axis, evidence, points(mode), name, f"cross entropy, {name}")
            _curve(axis, evidence, [(one, mode) for one in (CROSS_ENTROPY, *PDL)], "PDL", "PDL, trained")
            people = evidence.of_references()[DIVERSITY]
            axis.axhline(100 * people, color="tab:green", linewidth=0.8, linestyle="--", label="the references")
            _point(axis, evidence, mode, CROSS_ENTROPY, "o", COLOURS["cross entropy"], "cross entropy")
            for reading in OTHERS:
                _point(axis, evidence, mode, reading, MARKERS[reading.arm], "tab:gray", reading.title)
            axis.set_title(f"{TASKS[evidence.name].title}, {mode}", fontsize=10)
            axis.set_xlabel("ROUGE-L above chance, %", fontsize=8)
            axis.set_ylabel(f"distinct ones of {evidence.pairs:,} word pairs, %", fontsize=8)
            axis.tick_params(labelsize=8)
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.16 / len(modes), 1, 1))
    for axis in axes.flat:
        _spread_labels(axis)
    _save(figure, path)


def plot_nll(evidences: Sequence[TaskEvidence], path: Path) -> None:
    """What each way to train or to read does to tokens by their frequency, less cross entropy as it is."""
    figure, axes = _axes(1, len(evidences), height=3.6)
    ways = [
        *((Reading(arm), "tab:red", "-", MARKER_OF_ALPHA[arm]) for arm in MARKER_OF_ALPHA),
        *((Reading(arm, "undone"), "tab:red", ":", MARKER_OF_ALPHA[arm]) for arm in MARKER_OF_ALPHA),
        *(
            (Reading("cross-entropy", f"adjusted-{tau}"), "tab:blue", "-", marker)
            for tau, marker in ((0.4, "o"), (1, "s"))
        ),
        (Reading("cross-entropy", "temperature-1.15"), "tab:orange", "-", "D"),
    ]
    for axis, evidence in zip(axes[0], evidences, strict=True):
        shown = [way for way in ways if way[0].arm in evidence.arms]
        for place, (reading, colour, line, marker) in enumerate(shown):
            changes = [
                estimate(evidence.nll(reading, bucket) - evidence.nll(CROSS_ENTROPY, bucket)) for bucket in BUCKETS
            ]
            at = [index + 0.04 * (place - len(shown) // 2) for index in range(len(BUCKETS))]
            margins = [change.high - change.value for change in changes]
            values = [change.value for change in changes]
            axis.errorbar(at, values, margins, color=colour, linestyle=line, marker=marker, label=reading.title, ms=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(BUCKETS)), BUCKETS)
        axis.set_yscale("symlog", linthresh=0.1)  # or alpha 1 leaves no room for the others
        axis.set_yticks(NLL_TICKS, [f"{tick:+g}" if tick else "0" for tick in NLL_TICKS])
        axis.set_title(TASKS[evidence.name].title, fontsize=10)
        axis.set_ylabel("NLL, less cross entropy's; logarithmic beyond 0.1", fontsize=8)
        axis.tick_params(labelsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    _save(figure, path)


def _curve(axis: Any, evidence: TaskEvidence, points: Sequence[tuple[Reading, str]], name: str, label: str) -> None:
    shown = [(one, mode) for one, mode in points if one.arm in evidence.arms and evidence.has_texts(one, mode)]
    if len(shown) < 2:
        return
    at = _bars(axis, evidence, shown, color=COLOURS[name], marker="o", ms=4, label=label)
    look = {"fontsize": 7, "color": COLOURS[name], "zorder": 6, "path_effects": [_outline()]}
    for (reading, mode), place in zip(shown, at, strict=True):
        dial = "greedy" if mode != points[-1][1] else _dial(reading)
        if dial:
            axis.annotate(dial, place, LABELS_AT[name], textcoords="offset points", **look)


def _spread_labels(axis: Any) -> None:
    """Each label stands inside the axes where there is neither a point nor a label; if nowhere, it is left out.

    The points of a curve are in the order of their dial, so that it can be read without.
    """
    from matplotlib.transforms import Bbox

    renderer = axis.figure.canvas.get_renderer()
    inside = axis.get_window_extent(renderer)
    marked = [line.get_xydata() for line in axis.get_lines() if line.get_marker() != "None"]
    points = axis.transData.transform([place for line in marked for place in line])
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in points]  # pixels
    for label in axis.texts:
        for place in (label.xyann, *PLACES):
            _move(label, place)
            box = label.get_window_extent(renderer)
            if inside.contains(*box.min) and inside.contains(*box.max) and box.count_overlaps(taken) == 0:
                taken.append(box)
                break
        else:
            label.set_visible(False)


def _move(label: Any, place: tuple[int, int]) -> None:
    """To so many points right of and above what it labels."""
    label.xyann = place
    label.set_ha("left" if place[0] > 0 else "right" if place[0] < 0 else "center")


def _point(
    axis: Any, evidence: TaskEvidence, mode: str, reading: Reading, marker: str, colour: str, label: str
) -> None:
    if reading.arm in evidence.arms and evidence.has_texts(reading, mode):
        look = {"marker": marker, "color": colour, "linestyle": "", "ms": 6, "zorder": 5}
        _bars(axis, evidence, [(reading, mode)], label=label, **look)


def _bars(
    axis: Any, evidence: TaskEvidence, points: Sequence[tuple[Reading, str]], **look: Any
) -> list[tuple[float, float]]:
    """Draws points with their intervals, in percent as in the tables, and tells where they are."""
    quality, diversity = (
        [estimate(100 * evidence.series(reading, mode, measure)) for reading, mode in points]
        for measure in (QUALITY, DIVERSITY)
    )
    x, y = ([one.value for one in found] for found in (quality, diversity))
    margins = ([one.high - one.value for one in found] for found in (quality, diversity))
    axis.errorbar(x, y, **dict(zip(("xerr", "yerr"), margins, strict=True)), elinewidth=0.4, **look)
    return list(zip(x, y, strict=True))


def _outline() -> Any:
    from matplotlib import patheffects

    return patheffects.withStroke(linewidth=2, foreground="white")


def _dial(reading: Reading) -> str:
    """The number that a point of a curve is set to."""
    name = reading.arm if reading.arm != "cross-entropy" else reading.variant
    return name.rsplit("-", 1)[-1] if "-" in name else ""


def _axes(rows: int, columns: int, height: float = 4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(4.2 * columns, height * rows + 0.6), squeeze=False)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    picture = BytesIO()
    figure.savefig(picture, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)
    replace_file(path, picture.getvalue())
