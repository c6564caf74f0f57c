"""pdl-kernels weights: from counts to a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from pdl_kernels.cli.arguments import CountsFile, Overwrite, Tokenizer, check_output, load_tokenizer, output_width
from pdl_kernels.data.tokenizers import special_token_ids
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.description import describe
from pdl_kernels.weights.power_law import PowerLawWeighting
from pdl_kernels.weights.recipes import weightings
from pdl_kernels.weights.saved import save_weights
from pdl_kernels.weights.weighting import Weighting

RECIPE = "The recipe"
AFTERWARDS = "What follows the formula, in this order"


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


# ---------------------------------------------------------------------------------------------------------------------
# The options

Output = Annotated[Path, typer.Option(help="Where the table goes, a .safetensors file.", show_default=False)]
VocabSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Length of the table: the width of the model's output layer. Entries beyond the counts are unseen.",
        show_default="the counts' length",
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        help="A model's folder, of which config.json is read: the table becomes as long as its output layer, and what "
        "does not fit the counts is said.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    Recipe | None,
    typer.Option(
        metavar="NAME",
        help="The formula for a token counted n times: power_law 1 / (n + eps)^alpha, Power-Law Decay Loss; "
        "inverse 1 / n; square_root_inverse 1 / sqrt(n); class_balanced (1 - beta) / (1 - beta^n); "
        "smoothed_inverse a / (a + n / total); idf ln((1 + D) / (1 + d)) + 1, d of D texts hold it.",
        show_default="power_law",
        rich_help_panel=RECIPE,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Of power_law: strength; 0 is plain cross entropy.",
        show_default="0.4",
        rich_help_panel=RECIPE,
    ),
]
Eps = Annotated[
    float | None,
    typer.Option(min=0.0, help="Of power_law: added to each count.", show_default="1.0", rich_help_panel=RECIPE),
]
Beta = Annotated[
    float | None,
    typer.Option(help="Of class_balanced: from 0 to below 1.", show_default="0.9999", rich_help_panel=RECIPE),
]
A = Annotated[
    float | None,
    typer.Option(
        "--a",
        help="Of smoothed_inverse: the share of the corpus at which a weight has halved.",
        show_default="0.001",
        rich_help_panel=RECIPE,
    ),
]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="The paper's own: power_law, alpha 1, eps 1e-7, and nothing after it. A token never counted then "
        "weighs 1e7. Takes no other option of the recipe.",
        rich_help_panel=RECIPE,
    ),
]
NormalizeBy = Annotated[
    Normalize | None,
    typer.Option(
        help="Divide by the mean over all targets (the loss is then on average as large as plain cross entropy's), "
        "the mean over the vocabulary, the largest weight, or nothing.",
        show_default="token_mean",
        rich_help_panel=AFTERWARDS,
    ),
]
Clip = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Bounds of the weights.", show_default=False, rich_help_panel=AFTERWARDS),
]
Unseen = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|formula|cap",
        help="Weight of tokens never counted: a number, what the formula gives, or the largest weight of a counted "
        "token.",
        show_default="1.0",
        rich_help_panel=AFTERWARDS,
    ),
]
NeutralSpecial = Annotated[
    bool,
    typer.Option(
        "--neutral-special",
        help="Special tokens of --tokenizer, such as end-of-text, weigh 1.",
        rich_help_panel=AFTERWARDS,
    ),
]
NeutralIds = Annotated[
    list[int] | None,
    typer.Option(
        "--neutral-id",
        min=0,
        help="This token id weighs 1; may be repeated.",
        show_default=False,
        rich_help_panel=AFTERWARDS,
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def weights(
    counts: CountsFile,
    output: Output,
    vocab_size: VocabSize = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    overwrite: Overwrite = False,
    recipe: RecipeName = None,
    alpha: Alpha = None,
    eps: Eps = None,
    beta: Beta = None,
    a: A = None,
    paper: Paper = False,
    normalize: NormalizeBy = None,
    clip: Clip = None,
    unseen: Unseen = None,
    neutral_special: NeutralSpecial = False,
    neutral_ids: NeutralIds = None,
) -> None:
    """Make a weight table from counts.

    Prints what training with the table would mean, and warns where that is unlikely to be wanted.

    Examples:

        pdl-kernels weights counts.safetensors --output weights.safetensors

        pdl-kernels weights counts.safetensors --output weights.safetensors --alpha 0.3 --clip 0.2 5 --vocab-size 50304
    """
    check_output(output, overwrite, ".safetensors")
    of_the_formula = _given(alpha=alpha, eps=eps, beta=beta, a=a)
    afterwards = _after_the_formula(normalize, clip, unseen)
    if neutral_special and tokenizer is None:
        raise ValueError("--neutral-special needs --tokenizer, whose special tokens it means")
    if paper:
        neutral = _given(neutral_special=neutral_special or None, neutral_id=neutral_ids or None)
        _refuse_beside_paper({**_given(recipe=recipe), **of_the_formula, **afterwards, **neutral})
    recipe = recipe or Recipe.power_law
    _check_options_of_the_formula(recipe, of_the_formula)

    loaded = load_tokenizer(tokenizer)
    token_counts = TokenCounts.load(counts)
    if recipe is Recipe.idf and token_counts.document_counts is None:
        raise ValueError(
            f"--recipe idf needs the texts that hold each token, and {counts} was made without; accepted are counts of "
            "`pdl-kernels count --documents`"
        )
    width = None if model is None else output_width(model)
    vocab_size, of_the_model = _fitted_to(width, model, token_counts.vocab_size, vocab_size)
    with _arguments_named_as_options():
        if paper:
            weighting: Weighting = PowerLawWeighting.paper()
        else:
            special = special_token_ids(loaded) if neutral_special else ()
            all_neutral = (*special, *(neutral_ids or ()))
            weighting = weightings()[recipe.value](neutral_ids=all_neutral, **afterwards, **of_the_formula)
        table = weighting.table(token_counts, vocab_size)
    description = describe(table, token_counts, loaded)
    save_weights(output, table, weighting, token_counts)
    print(f"{output}: {weighting!r}")
    print(description)
    for warning in [*_uncounted_eos(token_counts, loaded, table, weighting), *of_the_model]:
        print(f"warning: {warning}")


def _uncounted_eos(counts: TokenCounts, tokenizer: Any, table: Tensor, weighting: Weighting) -> list[str]:
    """A warning where EOS has weight 1 because it was never counted, and not because that was asked for."""
    eos = counts.eos_id if tokenizer is None else getattr(tokenizer, "eos_token_id", None)
    if eos is None or not eos < counts.vocab_size or counts.counts[eos] > 0:
        return []
    if table[eos] != 1 or eos in weighting.neutral_ids:
        return []  # `describe` has warned, or there is nothing to warn of
    return [
        f"EOS (id {eos}) was never counted: if training ends texts with it, these are not the counts of training; "
        "`pdl-kernels count --append-eos` counts it where the data do not hold it"
    ]


def _fitted_to(
    width: int | None, model: Path | None, counted: int, vocab_size: int | None
) -> tuple[int | None, list[str]]:
    """The length of the table, and warnings, for a model whose output layer has `width` entries."""
    if width is None:
        return vocab_size, []
    if counted > width:
        raise ValueError(
            f"--model {model} has an output layer of {width:,} entries, and the counts are of {counted:,}: they come "
            "from another tokenizer, or were counted with another --vocab-size"
        )
    warnings = []
    if counted < width:
        warnings.append(
            f"the counts end at {counted:,}, and the output layer of {model} has {width:,} entries: those beyond were "
            "never counted, which is right where they are padding"
        )
    if vocab_size is not None and vocab_size != width:
        comparison = "smaller" if vocab_size < width else "larger"
        warnings.append(
            f"--vocab-size is {vocab_size:,}, {comparison} than the output layer of {model}, {width:,}: the loss would "
            "refuse this table"
        )
    return (width if vocab_size is None else vocab_size), warnings


def _given(**options: Any) -> dict[str, Any]:
    """The options that are on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def _after_the_formula(
    normalize: Normalize | None, clip: tuple[float, float] | None, unseen: str | None
) -> dict[str, Any]:
    """Arguments of a `Weighting`, from the options that were given."""
    if clip is not None and not 0 <= clip[0] <= clip[1]:
        raise ValueError(f"--clip is {clip[0]:g} {clip[1]:g}; accepted are two numbers, 0 <= LOW <= HIGH")
    arguments = _given(clip=clip, unseen=None if unseen is None else _number_or_word(unseen))
    if normalize is not None:
        arguments["normalize"] = None if normalize is Normalize.none else normalize.value
    return arguments


def _number_or_word(unseen: str) -> float | str:
    if unseen in ("formula", "cap"):
        return unseen
    try:
        return float(unseen)
    except ValueError:
        raise ValueError(f"--unseen is {unseen!r}; accepted are a number >= 0, formula and cap") from None


def _refuse_beside_paper(options: dict[str, Any]) -> None:
    if options:
        option = next(iter(options)).replace("_", "-")
        raise ValueError(f"--paper is a whole recipe, and --{option} came with it; accepted is one of the two")


def _check_options_of_the_formula(recipe: Recipe, options: dict[str, float]) -> None:
    """ValueError for options of another recipe, which would have no effect."""
    accepted = {name: _own_options(kind) for name, kind in weightings().items()}
    for option in options:
        if option not in accepted[recipe.value]:
            owner = next(name for name, own in accepted.items() if option in own)
            takes = ", ".join(f"--{name}" for name in accepted[recipe.value]) or "no option of its own"
            raise ValueError(f"--{option} belongs to --recipe {owner}; --recipe {recipe.value} takes {takes}")


def _own_options(kind: type[Weighting]) -> list[str]:
    shared = Weighting.__dataclass_fields__
    return [name for name in kind.__dataclass_fields__ if name not in shared]


@contextmanager
def _arguments_named_as_options() -> Iterator[None]:
    """The package's messages begin with an argument's name; here they begin with that of the option."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in ("alpha", "eps", "beta", "a", "unseen", "vocab_size"):
            raise
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None
