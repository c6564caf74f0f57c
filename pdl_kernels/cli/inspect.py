"""pdl-kernels inspect: what a table does to a corpus, in tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdl_kernels.cli.arguments import CountsFile, Tokenizer, WeightsFile, load_tokenizer
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.description import MOST_FREQUENT_TYPES, Description, WeightedType, describe
from pdl_kernels.weights.saved import SavedWeights, load_weights


def inspect(
    weights: WeightsFile,
    counts: CountsFile,
    tokenizer: Tokenizer = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for programs.")] = False,
) -> None:
    """Show what training with a weight table would mean for a corpus.

    How many targets the weights leave in effect, which tokens weigh most and least, which hold the largest share of
    the loss, and warnings in plain words. Shares are of the weight: of the loss, if every token were equally hard.

    Example:

        pdl-kernels inspect weights.safetensors counts.safetensors --tokenizer ./tokenizer.json
    """
    saved = load_weights(weights)
    token_counts = TokenCounts.load(counts)
    found = describe(saved.table, token_counts, load_tokenizer(tokenizer))
    warnings = (*found.warnings, *_other_counts(saved, token_counts))
    found = dataclasses.replace(found, warnings=warnings)
    if as_json:
        recipe = None if saved.weighting is None else saved.weighting.recipe()
        facts = {"recipe": recipe, "counted": token_counts.counted, **dataclasses.asdict(found)}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(_numbers(found, saved, token_counts))
    for title, types in (
        ("Heaviest types", found.heaviest_types),
        ("Lightest types seen", found.lightest_types),
        ("Largest shares of the weight", found.largest_types),
    ):
        console.print(_types(title, types, found.targets))
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)


def _other_counts(saved: SavedWeights, counts: TokenCounts) -> Sequence[str]:
    made_of = saved.facts.get("tokens")
    if made_of in (None, counts.total):
        return []
    return [f"the weights were made from counts of {made_of:,} targets, and these are counts of {counts.total:,}"]


def _numbers(found: Description, saved: SavedWeights, counts: TokenCounts) -> Table:
    table = Table(title="Weights and corpus", title_justify="left", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    unseen_heaviest = "-" if found.unseen_heaviest is None else f"up to {found.unseen_heaviest:.4g}"
    rows = {
        "recipe": "unknown" if saved.weighting is None else repr(saved.weighting),
        "counted": counts.counted or "unknown",
        "tokenizer": counts.tokenizer or "unknown",
        "targets": f"{found.targets:,} in {counts.sequences:,} sequences",
        "types seen": f"{found.types_seen:,} of {found.vocab_size:,}",
        "effective sample size": f"{found.effective_sample:.1%} of the targets",
        "mean weight of a target": f"{found.mean_weight:.4g}",
        "weights of types seen": f"{found.lightest:.4g} to {found.heaviest:.4g}",
        "weights of types never counted": unseen_heaviest,
        f"weight in the {MOST_FREQUENT_TYPES} most frequent types": (
            f"{found.frequent_share:.1%} (plain cross entropy: {found.frequent_share_unweighted:.1%})"
        ),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _types(title: str, types: Sequence[WeightedType], targets: float) -> Table:
    table = Table(title=title, title_justify="left")
    with_text = any(entry.text is not None for entry in types)
    table.add_column("id", justify="right")
    if with_text:
        table.add_column("token", overflow="fold")
    for name in ("count", "weight", "share of weight", "plain cross entropy"):
        table.add_column(name, justify="right")
    for entry in types:
        # A Python literal shows spaces and line ends; a Text is not searched for markup such as [red].
        token = [Text("" if entry.text is None else repr(entry.text))] if with_text else []
        share, plain = (f"{100 * part:.3g} %" for part in (entry.share, entry.count / targets))
        table.add_row(str(entry.id), *token, f"{entry.count:,}", f"{entry.weight:.4g}", share, plain)
    return table
