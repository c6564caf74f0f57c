"""Draws docs/single_pass.png, the data flow of the single-pass kernel:  python docs/draw_single_pass.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

BLOCKS = 4  # drawn; the row of the caption has 8
MEMORY, CHIP, EXCHANGE = "#f2d7b6", "#cfe3f3", "#d8efd3"


def box(axis, x, y, width, height, text, colour, size=9):
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="0.4"))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axis, start, end):
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "0.3", "lw": 1.2})


def draw():
    figure, axis = plt.subplots(figsize=(9.5, 5.6), layout="constrained")
    axis.set(xlim=(0, 10), ylim=(0, 6))
    axis.axis("off")
    box(axis, 0.4, 5.25, 9.2, 0.5, "one row of logits in memory, read once, 16 bytes per thread and load", MEMORY)
    exchanged = "one exchange in the cluster: (max, sum) of all warps, packed in 64 bits"
    box(axis, 0.4, 2.35, 9.2, 0.55, exchanged, EXCHANGE)
    box(axis, 0.4, 0.2, 9.2, 0.5, "the row's gradient in memory, written once", MEMORY)
    width = 9.2 / BLOCKS - 0.2
    for block in range(BLOCKS):
        x = 0.4 + block * (width + 0.2) + 0.1
        middle = x + width / 2
        name = f"block {block}" if block < BLOCKS - 1 else "block 7"
        held = "128 threads\n148 columns each,\nheld in registers;\nmax, sum of exp"
        box(axis, x, 3.35, width, 1.4, f"{name}: {held}", CHIP)
        box(axis, x, 1.15, width, 0.75, "scale * exp(z - max)\nof the same columns", CHIP)
        for top, bottom in ((5.25, 4.78), (3.33, 2.93), (2.33, 1.93), (1.13, 0.73)):
            arrow(axis, (middle, top), (middle, bottom))
    title = "V = 151936, bfloat16: a cluster of 8 blocks, 4 bytes moved per logit"
    axis.text(0.4, 5.86, title, fontsize=10, weight="bold")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("single_pass.png"), dpi=110)
