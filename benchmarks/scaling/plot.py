"""The plot of docs/performance.md: time against ranks, a panel for each vocabulary."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.scaling.hardware import DEVICES, FABRICS, GPUS_OF_A_NODE
from benchmarks.scaling.predictions import RANKS, VOCABULARIES, place
from benchmarks.scaling.schemes import OURS, REDUCTIONS
from pdl_kernels.weights.files import replace_file

DRAWN = {  # scheme: colour, width, dashes
    OURS: ("tab:blue", 2.4, "-"),
    REDUCTIONS: ("tab:blue", 1.4, ":"),
    "gathered logits": ("tab:brown", 1.4, "-"),
    "Liger-Kernel": ("tab:green", 1.4, "-"),
    "Megatron-LM, fused": ("tab:orange", 1.4, "-"),
    "torch loss_parallel": ("tab:red", 1.4, "-"),
}


def write_plot(record: dict[str, Any], path: Path) -> None:
    where = place(DEVICES[0], FABRICS[0])
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for axis, V in zip(axes.flat, VOCABULARIES, strict=True):
        rows = [row for row in record["on_logits"] if row["vocab_size"] == V]
        for scheme, (color, width, dashes) in DRAWN.items():
            times = [row["seconds"][where] * 1e3 for row in rows if row["scheme"] == scheme]
            axis.plot(RANKS, times, color=color, linewidth=width, linestyle=dashes)
            first, last = (RANKS[0], times[0]), (RANKS[-1], times[-1])
            if scheme == REDUCTIONS:
                axis.annotate(
                    "with two all-reduces", last, color=color, fontsize=8, ha="right", va="top",
                    xytext=(0, -14), textcoords="offset points",
                )  # fmt: skip
            else:
                axis.annotate(
                    scheme, first, color=color, fontsize=8, ha="right", va="center",
                    xytext=(-4, 0), textcoords="offset points", weight="bold" if scheme == OURS else "normal",
                )  # fmt: skip
        axis.margins(y=0.12)
        axis.axvline(GPUS_OF_A_NODE, color="black", linewidth=0.6, linestyle="--")
        axis.text(
            GPUS_OF_A_NODE * 1.1, 0.97, "several nodes", transform=axis.get_xaxis_transform(), fontsize=8, va="top"
        )  # fmt: skip
        axis.set_title(f"vocabulary {V}", fontsize=10)
        axis.set(xscale="log", yscale="log", ylabel="forward + backward, ms")
        axis.set_xlim(0.07, 1.3 * RANKS[-1])
        axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS], fontsize=8)
        axis.yaxis.set_major_formatter(lambda time, _: f"{time:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("ranks that share the vocabulary")
    figure.suptitle(
        f"Predicted, not measured: {record['tokens']} tokens, bfloat16, {where} on NVLink, InfiniBand between them"
    )
    content = BytesIO()
    figure.savefig(content, format="png", dpi=90)
    plt.close(figure)
    replace_file(path, content.getvalue())
