"""pdl-kernels weights: from counts to a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pdl_kernels.cli.arguments import Overwrite, Tokenizer, check_output, load_tokenizer
from pdl_kernels.data.tokenizers import special_token_ids
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.description import describe
from pdl_kernels.weights.power_law import PowerLawWeighting
from pdl_kernels.weights.recipes import weightings
from pdl_kernels.weights.saved import save_weights
from pdl_kernels.weights.weighting import Weighting

RECIPES = "The recipe"
AFTERWARDS = "What follows the formula, in this order"

COUNTS_HELP = "The counts that `pdl-kernels count` wrote."


class Recipe(str, Enum):
    """The names in `weightings()`."""

    power_law = "power_law"
    inverse = "inverse"
    square_root_inverse = "square_root_inverse"
    class_balanced = "class_balanced"
    smoothed_inverse = "smoothed_inverse"
    idf = "idf"


class Normalize(str, Enum):
    """What the weights are divided by."""

    token_mean = "token_mean"
    vocabulary_mean = "vocabulary_mean"
    max = "max"
    none = "none"


def weights(
    counts: Annotated[Path, typer.Argument(help=COUNTS_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="Where the table goes, a .safetensors file.", show_default=False)],
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the table: the width of the model's output layer. Entries beyond the counts are unseen.",
            show_default="the counts' length",
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    overwrite: Overwrite = False,
    recipe: Annotated[
        Recipe | None,
        typer.Option(
            metavar="NAME",
            help="The formula for a token counted n times: power_law 1 / (n + eps)^alpha, Power-Law Decay Loss; "
            "inverse 1 / n; square_root_inverse 1 / sqrt(n); class_balanced (1 - beta) / (1 - beta^n); "
            "smoothed_inverse a / (a + n / total); idf ln((1 + D) / (1 + d)) + 1, d of D texts hold it.",
            show_default="power_law",
            rich_help_panel=RECIPES,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Of power_law: strength; 0 is plain cross entropy.",
            show_default="0.4",
            rich_help_panel=RECIPES,
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of power_law: added to each count.", show_default="1.0", rich_help_panel=RECIPES),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Of class_balanced: from 0 to below 1.", show_default="0.9999", rich_help_panel=RECIPES),
    ] = None,
    a: Annotated[
        float | None,
        typer.Option(
            "--a",
            help="Of smoothed_inverse: the share of the corpus at which a weight has halved.",
            show_default="0.001",
            rich_help_panel=RECIPES,
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="The paper's own: power_law, alpha 1, eps 1e-7, and nothing after it. A token never counted then "
            "weighs 1e7. Takes no other option of the recipe.",
            rich_help_panel=RECIPES,
        ),
    ] = False,
    normalize: Annotated[
        Normalize | None,
        typer.Option(
            help="Divide by the mean over all targets (the loss is then on average as large as plain cross entropy's), "
            "the mean over the vocabulary, the largest weight, or nothing.",
            show_default="token_mean",
            rich_help_panel=AFTERWARDS,
        ),
    ] = None,
    clip: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Bounds of the weights.", show_default=False, rich_help_panel=AFTERWARDS),
    ] = None,
    unseen: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|formula|cap",
            help="Weight of tokens never counted: a number, what the formula gives, or the largest weight of a counted "
            "token.",
            show_default="1.0",
            rich_help_panel=AFTERWARDS,
        ),
    ] = None,
    neutral_special: Annotated[
        bool,
        typer.Option(
            "--neutral-special",
            help="Special tokens of --tokenizer, such as end-of-text, weigh 1.",
            rich_help_panel=AFTERWARDS,
        ),
    ] = False,
    neutral_id: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="This token id weighs 1; may be repeated.", show_default=False, rich_help_panel=AFTERWARDS
        ),
    ] = None,
) -> None:
    """Make a weight table from counts.

    Prints what training with the table would mean, and warns where that is unlikely to be wanted.

    Examples:

        pdl-kernels weights counts.safetensors --output weights.safetensors

        pdl-kernels weights counts.safetensors --output weights.safetensors --alpha 0.3 --clip 0.2 5 --vocab-size 50304
    """
    check_output(output, overwrite, ".safetensors")
    own: dict[str, Any] = {
        name: value for name, value in {"alpha": alpha, "eps": eps, "beta": beta, "a": a}.items() if value is not None
    }
    common: dict[str, Any] = {}
    if normalize is not None:
        common["normalize"] = None if normalize is Normalize.none else normalize.value
    if clip is not None:
        common["clip"] = _checked_clip(clip)
    if unseen is not None:
        common["unseen"] = _number_or_word(unseen)
    if neutral_special and tokenizer is None:
        raise ValueError("--neutral-special needs --tokenizer, whose special tokens it means")
    if paper:
        given = ["recipe"] if recipe is not None else []
        given += [
            *own,
            *common,
            *(["neutral-special"] if neutral_special else []),
            *(["neutral-id"] if neutral_id else []),
        ]
        if given:
            raise ValueError(f"--paper is a whole recipe, and --{given[0]} came with it; accepted is one of the two")
    else:
        _check_recipe_options(recipe or Recipe.power_law, own)

    loaded = load_tokenizer(tokenizer)
    token_counts = TokenCounts.load(counts)
    if recipe is Recipe.idf and token_counts.document_counts is None:
        raise ValueError(
            f"--recipe idf needs the texts that hold each token, and {counts} was made without; accepted are counts of "
            "`pdl-kernels count --documents`"
        )
    with _arguments_named_as_options():
        weighting: Weighting
        if paper:
            weighting = PowerLawWeighting.paper()
        else:
            special = special_token_ids(loaded) if neutral_special else ()
            neutral = (*special, *(neutral_id or ()))
            weighting = weightings()[(recipe or Recipe.power_law).value](neutral_ids=neutral, **common, **own)
        table = weighting.table(token_counts, vocab_size)
    description = describe(table, token_counts, loaded)
    save_weights(output, table, weighting, token_counts)
    print(f"{output}: {weighting!r}")
    print(description)


def _check_recipe_options(recipe: Recipe, own: dict[str, float]) -> None:
    """Options of another recipe, which would have no effect."""
    accepted = {name: _own_options(kind) for name, kind in weightings().items()}
    for option in own:
        if option not in accepted[recipe.value]:
            owner = next(name for name, options in accepted.items() if option in options)
            takes = ", ".join(f"--{name}" for name in accepted[recipe.value]) or "no option of its own"
            raise ValueError(f"--{option} belongs to --recipe {owner}; --recipe {recipe.value} takes {takes}")


@contextmanager
def _arguments_named_as_options() -> Iterator[None]:
    """The package's messages begin with the argument, which here is an option."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in ("alpha", "eps", "beta", "a", "unseen", "vocab_size"):
            raise
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None


def _own_options(kind: type[Weighting]) -> list[str]:
    shared = Weighting.__dataclass_fields__
    return [name for name in kind.__dataclass_fields__ if name not in shared]


def _checked_clip(clip: tuple[float, float]) -> tuple[float, float]:
    low, high = clip
    if not 0 <= low <= high:
        raise ValueError(f"--clip is {low:g} {high:g}; accepted are two numbers, 0 <= LOW <= HIGH")
    return clip


def _number_or_word(unseen: str) -> float | str:
    if unseen in ("formula", "cap"):
        return unseen
    try:
        return float(unseen)
    except ValueError:
        raise ValueError(f"--unseen is {unseen!r}; accepted are a number >= 0, formula and cap") from None
