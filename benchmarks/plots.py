"""Plots of a results document, as PNG beside it."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.operations import TITLES
from benchmarks.results import Key, summary, timed
from pdl_kernels.weights.files import replace_file

DTYPE_PREFERENCE = ("bfloat16", "float32", "float16")


def write_plots(document: dict[str, Any], path: Path) -> list[Path]:
    """<stem>-bandwidth.png, -rows.png, -memory.png and -linear.png for the document at `path`, where there is data."""
    everything = timed(document)
    linear = {key: record for key, record in everything.items() if key.case.linear}
    samples = {key: record for key, record in everything.items() if not key.case.linear}
    written = []
    drawings = (("bandwidth", _bandwidth, samples), ("rows", _rows, samples), ("memory", _memory, samples))
    for name, draw, shown in (*drawings, ("linear", _linear, linear)):
        dtype = next((dtype for dtype in DTYPE_PREFERENCE if any(key.case.dtype == dtype for key in shown)), None)
        if dtype is None:
            continue
        figure = draw({key: record for key, record in shown.items() if key.case.dtype == dtype}, document)
        if figure is None:
            continue
        figure.suptitle(f"{document['environment']['device']}, {dtype}, commit {document['environment']['commit']}")
        target = path.with_name(f"{path.stem}-{name}.png")
        content = BytesIO()
        figure.savefig(content, format="png", dpi=110, bbox_inches="tight")
        replace_file(target, content.getvalue())
        plt.close(figure)
        written.append(target)
    return written


def _panels(titles: list[str]) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, len(titles), figsize=(5.5 * len(titles), 4.5), squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def _line_style(name: str) -> dict[str, Any]:
    ours = name.startswith("pdl")
    return {
        "label": name,
        "marker": "o",
        "linewidth": 2.2 if ours else 1.2,
        "linestyle": "--" if name.endswith("in place") else "-",
    }


def _bandwidth(samples: dict[Key, dict[str, Any]], document: dict[str, Any]) -> plt.Figure | None:
    """Achieved GB/s against V at the most rows measured there; the right scale is the share of the copy bandwidth."""
    operations = list(dict.fromkeys(key.operation for key in samples))
    figure, axes = _panels([TITLES.get(operation, operation) for operation in operations])
    copy = document["bandwidth"].get("copy")
    for axis, operation in zip(axes, operations, strict=True):
        for contender in dict.fromkeys(key.contender for key in samples):
            best: dict[int, tuple[int, float]] = {}  # by V: rows, GB/s
            for key, record in samples.items():
                if (key.operation, key.contender) == (operation, contender):
                    rate = record["floor_bytes"] / summary(record).median / 1e9
                    best[key.case.vocab_size] = max(best.get(key.case.vocab_size, (0, 0.0)), (key.case.rows, rate))
            if best:
                vocabularies = sorted(best)
                axis.plot(vocabularies, [best[V][1] for V in vocabularies], **_line_style(contender))
        axis.set(xlabel="vocabulary", ylabel="GB/s that had to be moved", xscale="log")
        ticks = sorted({key.case.vocab_size for key in samples})
        axis.set_xticks(ticks, [str(V) for V in ticks], fontsize=7, rotation=30)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        if copy:
            axis.axhline(copy / 1e9, color="black", linewidth=0.8, linestyle=":")
            share = axis.secondary_yaxis(
                "right", functions=(lambda rate: rate * 1e9 / copy, lambda share: share * copy / 1e9)
            )
            share.set_ylabel("fraction of the copy bandwidth")
    axes[0].legend(fontsize=7)
    return figure


def _rows(samples: dict[Key, dict[str, Any]], document: dict[str, Any]) -> plt.Figure | None:
    """Time against rows, for every vocabulary that was measured at more than one number of rows."""
    operation = "forward-backward" if any(key.operation == "forward-backward" for key in samples) else "forward"
    chosen = {key: record for key, record in samples.items() if key.operation == operation}
    rows: dict[int, set[int]] = {}
    for key in chosen:
        rows.setdefault(key.case.vocab_size, set()).add(key.case.rows)
    vocabularies = sorted(V for V, numbers in rows.items() if len(numbers) > 1)
    if not vocabularies:
        return None
    figure, axes = _panels([f"{TITLES[operation]}, vocabulary {V}" for V in vocabularies])
    for axis, V in zip(axes, vocabularies, strict=True):
        for contender in dict.fromkeys(key.contender for key in chosen):
            points = sorted(
                (key.case.rows, *summary(record))
                for key, record in chosen.items()
                if key.contender == contender and key.case.vocab_size == V
            )
            if points:
                numbers, medians, lows, highs = zip(*points, strict=True)
                (line,) = axis.plot(numbers, [m * 1e3 for m in medians], **_line_style(contender))
                axis.fill_between(
                    numbers, [t * 1e3 for t in lows], [t * 1e3 for t in highs], alpha=0.15, color=line.get_color()
                )
        axis.set(xlabel="rows", ylabel="ms (band: p20 to p80)", xscale="log", yscale="log")
    axes[0].legend(fontsize=7)
    return figure


def _memory(samples: dict[Key, dict[str, Any]], document: dict[str, Any]) -> plt.Figure | None:
    """Peak extra memory as a multiple of the logits, at the largest case that has it."""
    measured = {key: record for key, record in samples.items() if record["peak_extra_bytes"] is not None}
    if not measured:
        return None
    case = max((key.case for key in measured), key=lambda case: case.logits_bytes)
    operations = list(dict.fromkeys(key.operation for key in measured))
    figure, axes = _panels([TITLES.get(operation, operation) for operation in operations])
    for axis, operation in zip(axes, operations, strict=True):
        bars = {
            key.contender: record["peak_extra_bytes"] / case.logits_bytes
            for key, record in measured.items()
            if key.operation == operation and key.case == case
        }
        bar = axis.barh(list(bars), list(bars.values()))
        axis.bar_label(bar, fmt="%.2f", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel(f"peak extra memory, in logits of {case.rows} x {case.vocab_size}")
    return figure


def _linear(samples: dict[Key, dict[str, Any]], document: dict[str, Any]) -> plt.Figure | None:
    """Time and peak extra memory of forward + backward of the linear loss, a group of bars per shape."""
    chosen = {key: record for key, record in samples.items() if key.operation == "forward-backward"}
    if not chosen:
        return None
    cases = list(dict.fromkeys(key.case for key in chosen))
    contenders = list(dict.fromkeys(key.contender for key in chosen))
    figure, axes = _panels(["time, ms", "peak extra memory, MB"])
    measures = (
        lambda record: summary(record).median * 1e3,
        lambda record: None if record["peak_extra_bytes"] is None else record["peak_extra_bytes"] / 1e6,
    )
    for axis, measure in zip(axes, measures, strict=True):
        for number, contender in enumerate(contenders):
            height = 0.8 / len(contenders)
            places, values = [], []
            for position, case in enumerate(cases):
                record = chosen.get(Key("forward-backward", case, contender))
                value = None if record is None else measure(record)
                if value is not None:
                    places.append(position + number * height)
                    values.append(value)
            bars = axis.barh(places, values, height=height * 0.9, label=contender)
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_yticks([position + 0.4 for position in range(len(cases))], [str(case) for case in cases], fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.15)
    axes[0].legend(fontsize=7)
    return figure
