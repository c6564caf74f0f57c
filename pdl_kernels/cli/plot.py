"""pdl-kernels plot: what a table does to a corpus, in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdl_kernels.cli.arguments import CountsFile, Overwrite, WeightsFile, check_output
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.saved import load_weights


def plot(
    weights: WeightsFile,
    counts: CountsFile,
    output: Annotated[Path, typer.Option(help="Where the picture goes, a .png file.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Draw what a weight table does to a corpus: three panels in one PNG.

    How often the token of each rank occurs, with the slope of Zipf's law; the weight of a token by its count; and which
    share of the loss rare and frequent tokens hold under plain cross entropy and with the weights.

    Example:

        pdl-kernels plot weights.safetensors counts.safetensors --output plot.png
    """
    check_output(output, overwrite, ".png")
    saved = load_weights(weights)
    token_counts = TokenCounts.load(counts)
    from pdl_kernels.weights import plots  # this command alone needs matplotlib

    plots.plot(output, saved.table, token_counts)
    print(f"{output}: {plots.WIDTH} x {plots.HEIGHT} pixels")
