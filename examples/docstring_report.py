"""What the fine-tuning example shows: tables in the terminal, a plot and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from frequency_buckets import BUCKET_DEFINITION, BUCKETS, Score

from pdl_kernels.weights.files import replace_file

ROWS = (*BUCKETS, "overall")
COLOURS = ("#999999", "#0072b2", "#d55e00")  # told apart in grey and by colour-blind readers
MEANING = (
    "What to look for: cross entropy aims at p(token | context), PDL at p / (count + eps)**alpha, renormalised, so PDL "
    "raises natural perplexity (the overall NLL) by construction; what it buys, if anything, is in the medium and rare "
    "rows. One seed, one split and a short run: small differences mean nothing."
)

Scores = Mapping[str, Mapping[str, Score]]  # model -> row -> score


def facts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What a reader must know beside the scores, from the record that goes into the JSON file."""
    text, environment = record["text"], record["environment"]
    return {
        "model": record["model"],
        "loss backend": f"{record['loss_backend']}, on {environment['device']}",
        "settings": ", ".join(f"{name} {value}" for name, value in record["settings"].items()),
        "text": (
            f"docstrings of Python {environment['python']}, split by module file: "
            f"{text['training_documents']:,} training documents of {text['training_files']} files, "
            f"{text['held_out_documents']:,} held-out documents of {text['held_out_files']} others; "
            f"{text['held_out_near_duplicates_dropped']} held-out documents dropped that mostly repeat training text"
        ),
        "seconds": ", ".join(f"{part} {seconds:.0f}" for part, seconds in record["seconds"].items()),
        "peak memory": ", ".join(
            f"{where} {size / 2**30:.1f} GiB" for where, size in record["peak_memory_bytes"].items()
        ),
    }


def print_tables(scores: Scores, buckets: Mapping[str, Mapping[str, float]], facts: Mapping[str, str]) -> None:
    """The buckets, the held-out scores, how the run went, and how to read the numbers."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    about_buckets = Table(title="Buckets by frequency in the training part")
    about_buckets.add_column("bucket")
    for heading in (
        "types",
        "of these\nnever seen",
        "training\ntargets",
        "held-out\ntargets",
        "mean PDL weight\nin training",
    ):
        about_buckets.add_column(heading, justify="right")
    for name, row in buckets.items():
        sizes = (row["types"], row["types_never_seen"], row["training_tokens"], row["held_out_tokens"])
        about_buckets.add_row(name, *(f"{size:,}" for size in sizes), f"{row['mean_weight']:.3f}")

    results = Table(title="Held-out documents, unweighted")
    for heading in ("", "bucket", "tokens", *scores):
        results.add_column(heading, justify="left" if heading in ("", "bucket") else "right")
    for quantity, value_of in (("NLL", "{0.nll:.3f}"), ("accuracy", "{0.accuracy:.1%}")):
        for name in ROWS:
            by_model = [by_row[name] for by_row in scores.values()]
            results.add_row(
                quantity if name == ROWS[0] else "",
                name,
                f"{by_model[0].tokens:,}",
                *(value_of.format(score) for score in by_model),
                end_section=name == ROWS[-1],
            )
    console.print("", about_buckets, BUCKET_DEFINITION, "", results, "NLL in nats per token.", "", sep="\n")
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", markup=False)
    console.print("", MEANING, sep="\n")


def save_plot(path: Path, scores: Scores, title: str) -> None:
    """Grouped bars: NLL and accuracy by bucket, one colour per model."""
    from matplotlib.figure import Figure  # without pyplot: savefig then draws with Agg and needs no display
    from matplotlib.ticker import PercentFormatter

    tokens = [next(iter(scores.values()))[row].tokens for row in ROWS]
    group_labels = [f"{row}\n{count:,} tokens" for row, count in zip(ROWS, tokens, strict=True)]
    panels: tuple[tuple[str, str, Callable[[Score], float], str], ...] = (
        ("Unweighted NLL (lower is better)", "nats per held-out token", lambda score: score.nll, "{:.2f}"),
        ("Accuracy (higher is better)", "held-out tokens predicted", lambda score: 100 * score.accuracy, "{:.1f}"),
    )
    bar_width = 0.8 / len(scores)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (panel_title, y_label, value_of, number) in zip(axes, panels, strict=True):
        for index, (model, by_row) in enumerate(scores.items()):
            offset = (index - (len(scores) - 1) / 2) * bar_width
            bars = axis.bar(
                [group + offset for group in range(len(ROWS))],
                [value_of(by_row[row]) for row in ROWS],
                bar_width,
                label=model,
                color=COLOURS[index % len(COLOURS)],
            )
            axis.bar_label(bars, fmt=number, fontsize=8, padding=2)
        axis.set_title(panel_title)
        axis.set_xlabel("token frequency in the training part")
        axis.set_ylabel(y_label)
        axis.set_xticks(range(len(ROWS)), group_labels)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.1)
    axes[1].yaxis.set_major_formatter(PercentFormatter(decimals=0))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(scores), frameon=False)
    figure.suptitle(title)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def save_json(path: Path, record: Mapping[str, Any]) -> None:
    """All numbers of the run; a nan or an infinity is an error, because JSON has no word for it."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())
