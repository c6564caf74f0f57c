"""What each alpha does to a corpus, as numbers and as a picture: where to start when choosing one.

    pdl-kernels count corpus.jsonl --tokenizer TOKENIZER --output counts.safetensors
    python examples/which_alpha.py counts.safetensors --output results/which_alpha

Writes OUTPUT.json and OUTPUT.png. Exit status: 0, 2 for a file that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from pdl_kernels import PowerLawWeighting, TokenCounts, describe
from pdl_kernels.weights.files import replace_file

ALPHAS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 1.0)


def rows_of(counts: TokenCounts, alphas: Sequence[float]) -> list[dict[str, float]]:
    """One row of numbers for each alpha, with the preset's other settings."""
    rows = []
    for alpha in alphas:
        found = describe(PowerLawWeighting(alpha=alpha).table(counts), counts)
        rows.append(
            {
                "alpha": alpha,
                "effective_sample": found.effective_sample,
                "frequent_share": found.frequent_share,
                "lightest": found.lightest,
                "heaviest": found.heaviest,
            }
        )
    return rows


def print_table(name: str, counts: TokenCounts, rows: Sequence[dict[str, float]]) -> None:
    print(f"{name}: {counts}")
    print("| alpha | effective sample size | weight in the 100 most frequent types | lightest | heaviest |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['alpha']:g} | {row['effective_sample']:.1%} | {row['frequent_share']:.1%} "
            f"| {row['lightest']:.3g} | {row['heaviest']:.3g} |"
        )


def save_plot(path: Path, corpora: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shown = (
        ("effective_sample", "effective sample size, % of the targets"),
        ("frequent_share", "weight in the 100 most frequent types, %"),
    )
    for panel, (key, label) in zip(panels, shown, strict=True):
        for name, rows in corpora.items():
            panel.plot([row["alpha"] for row in rows], [100 * row[key] for row in rows], marker="o", label=name)
        panel.axvline(0.4, color="grey", linestyle=":", label="preset")
        panel.set(xlabel="alpha", ylabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].legend()
    content = BytesIO()
    figure.savefig(content, dpi=150, format="png")
    replace_file(path, content.getvalue())
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("counts", nargs="+", type=Path, help="files written by `pdl-kernels count`")
    parser.add_argument("--output", type=Path, default=Path("results/which_alpha"), help="written: this .json and .png")
    options = parser.parse_args(arguments)
    corpora, record = {}, {}
    try:
        for path in options.counts:
            counts = TokenCounts.load(path)
            rows = rows_of(counts, ALPHAS)
            print_table(path.stem, counts, rows)
            corpora[path.stem] = rows
            record[path.stem] = {
                "targets": counts.total,
                "types_seen": int((counts.counts > 0).sum()),
                "vocab_size": counts.vocab_size,
                "counted": counts.counted,
                "rows": rows,
            }
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.output.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
    save_plot(options.output.with_suffix(".png"), corpora)
    return 0


if __name__ == "__main__":
    sys.exit(main())
