"""Draws docs/weights.png, what the weights do to a corpus, from docs/docstring_counts.json:

    python docs/draw_weights.py

The counts are those of `make weights`: docstrings of Python's standard library, with SmolLM2's tokenizer. After another
count, `python docs/draw_weights.py results/weights/counts.safetensors` writes the JSON again before it draws.
"""

import json
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pdl_kernels import PowerLawWeighting, TokenCounts

FOLDER = Path(__file__).parent
COUNTS = FOLDER / "docstring_counts.json"
PICTURE = FOLDER / "weights.png"
ALPHA = 0.4  # the preset's
PLAIN, WEIGHTED = "#999999", "#0072b2"  # told apart in grey and by colour-blind readers


def write_counts(path: Path) -> None:
    """Keep, of a file of counts, what the picture needs: how many token types have each count."""
    counts = TokenCounts.load(path)
    values, types = counts.counts[counts.counts > 0].unique(return_counts=True)
    kept = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    kept |= {"counted": counts.counted, "types_by_count": dict(zip(values.tolist(), types.tolist(), strict=True))}
    COUNTS.write_text(json.dumps(kept, indent=0) + "\n")


def draw() -> None:
    kept = json.loads(COUNTS.read_text())
    pairs = sorted((int(count), types) for count, types in kept["types_by_count"].items())
    counts = torch.tensor([count for count, types in pairs for _ in range(types)])  # of each type that was seen
    weights = PowerLawWeighting(alpha=ALPHA).table(counts).double()

    figure, (by_count, by_share) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_count.loglog(counts, weights, ".", color=WEIGHTED, markersize=5)
    by_count.axhline(1, color="black", linewidth=1, linestyle="--")
    by_count.text(1, 0.93, "cross entropy: all weigh 1", fontsize=9, va="top", color="0.35")
    for name, count in kept["named"].items():
        weight = weights[counts == count][0].item()
        times = "once" if count == 1 else f"{count:,} times"
        label = f"“{name}”, {times}: {weight:.2g}"
        by_count.annotate(label, (count, weight), (8, 3), textcoords="offset points", fontsize=9)
    by_count.set(title="What a token weighs", xlabel="how often the token is a target in the corpus", ylabel="weight")
    by_count.set_xlim(0.8, 2e6)
    by_count.set_xticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
    by_count.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    by_count.minorticks_off()

    decades = counts.double().log10().floor().long()
    names = ["1 to 9", "10 to 99", "100 to 999", "1,000 to\n9,999", "10,000\nand more"]
    for mass, offset, colour, label in (
        (counts.double(), -0.2, PLAIN, "cross entropy"),
        (counts * weights, 0.2, WEIGHTED, f"PDL, alpha = {ALPHA:g}"),
    ):
        shares = torch.bincount(decades, mass) / mass.sum()
        bars = by_share.bar(torch.arange(len(shares)) + offset, shares, 0.4, color=colour, label=label)
        by_share.bar_label(bars, [f"{share:.0%}" for share in shares.tolist()], fontsize=9, padding=2)
    by_share.set(
        title="Who owns the loss, if all tokens are equally hard",
        xlabel="how often the token is a target in the corpus",
        ylabel="share of the loss",
    )
    by_share.set_xticks(range(len(names)), names)
    by_share.set_yticks([])
    by_share.legend(frameon=False)
    for panel in (by_count, by_share):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:]:
        write_counts(Path(sys.argv[1]))
    draw()
