"""Draws docs/one_call.png, the way of one call through the package:  python docs/draw_one_call.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from draw_single_pass import arrow, box

TEXT = {"ha": "center", "va": "center", "fontsize": 9}
USER, ROOM, KEPT = "#eeeeee", "#cfe3f3", "#f2d7b6"
LEFT, RIGHT, WIDTH = 0.2, 6.6, 4.2  # of forward's and backward's boxes
MIDDLE_OF_FORWARD, MIDDLE_OF_BACKWARD = LEFT + WIDTH / 2, RIGHT + WIDTH / 2


def draw() -> None:
    figure, axis = plt.subplots(figsize=(11, 7), layout="constrained")
    axis.set(xlim=(0, 11), ylim=(0, 7.6))
    axis.axis("off")
    box(axis, LEFT, 6.9, WIDTH, 0.5, "pdl_cross_entropy(logits, targets, weights, ...)", USER)
    box(axis, RIGHT, 6.9, WIDTH, 0.5, "loss.backward()", USER)
    box(
        axis, LEFT, 5.3, WIDTH, 0.9,
        "CHECK   losses/functional.py, losses/checks.py\n"
        "options, shapes, dtypes, devices:\nLossInputs, LossOptions",
        ROOM,
    )  # fmt: skip
    box(
        axis, LEFT, 3.4, WIDTH, 1.4,
        "DIFFERENTIATE   ops/cross_entropy.py\n"
        "traced? (then an operator)   a transform? (refused)\n"
        "which backend?\nlogits as rows; memory for the gradient",
        ROOM,
    )  # fmt: skip
    box(
        axis, RIGHT, 3.4, WIDTH, 1.4,
        "ops/cross_entropy.py\nfirst time: hand over the gradient\n"
        "another upstream gradient, or a second time:\nform it again from the logits",
        ROOM,
    )  # fmt: skip
    box(axis, 4.85, 3.5, 1.3, 1.2, "kept:\ngradient,\nlogits,\nrow_state,\nscalars", KEPT)
    box(axis, LEFT, 2.0, RIGHT + WIDTH - LEFT, 0.95, "the six functions\nof either backend", ROOM)
    axis.text(MIDDLE_OF_FORWARD, 2.475, "forward = denominators,\nloss_rows (and the gradient), reduce_rows", **TEXT)
    axis.text(MIDDLE_OF_BACKWARD, 2.475, "backward: from the logits\nscale: where they are gone", **TEXT)
    box(
        axis, LEFT, 0.2, 6.4, 1.3,
        "PLAN AND LAUNCH in Triton   kernels/launch.py: plan cache, launches\n"
        "kernels/planner.py: which kernel, in which shape\n"
        "kernels: single_pass.py, row_kernels.py, reductions.py\n"
        "device functions that they share: row_math.py, tiles.py",
        ROOM,
    )  # fmt: skip
    box(axis, 7.2, 0.2, 3.6, 1.3, "or in plain torch\neager/cross_entropy.py\nsome rows at a time", ROOM)
    for top, bottom in ((6.85, 6.25), (5.25, 4.85), (3.35, 3.0)):
        arrow(axis, (MIDDLE_OF_FORWARD, top), (MIDDLE_OF_FORWARD, bottom))
    for top, bottom in ((6.85, 4.85), (3.35, 3.0)):
        arrow(axis, (MIDDLE_OF_BACKWARD, top), (MIDDLE_OF_BACKWARD, bottom))
    for x in (3.4, 9.0):
        arrow(axis, (x, 1.95), (x, 1.55))
    arrow(axis, (LEFT + WIDTH + 0.05, 4.1), (4.8, 4.1))
    arrow(axis, (6.2, 4.1), (RIGHT - 0.05, 4.1))
    figure.savefig(Path(__file__).with_name("one_call.png"), dpi=110)


if __name__ == "__main__":
    draw()
