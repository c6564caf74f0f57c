"""The options of pdl-kernels count."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pdl_kernels.cli.arguments import TOKENIZER_HELP
from pdl_kernels.data.chats import IGNORED
from pdl_kernels.data.readings import CHATS, COMPLETIONS, LABELS, STREAM, TEXTS

DATA = "What the data are"
TRAINING = "What training does with them"
TOKENS = "Label ids and files of tokens"


class Kind(str, Enum):
    """How rows are read."""

    texts = TEXTS
    completions = COMPLETIONS
    chats = CHATS
    labels = LABELS
    stream = STREAM


class TruncationMode(str, Enum):
    """Which tokens of a longer sequence are kept."""

    keep_start = "keep_start"
    keep_end = "keep_end"


class Packing(str, Enum):
    """Strategies of TRL."""

    bfd = "bfd"
    bfd_split = "bfd_split"
    wrapped = "wrapped"


class Dtype(str, Enum):
    """Of ids in a file of tokens."""

    uint16 = "uint16"
    uint32 = "uint32"
    int32 = "int32"
    int64 = "int64"


# ---------------------------------------------------------------------------------------------------------------------
# The options

Files = Annotated[
    list[str],
    typer.Argument(
        help="Files of one form, by suffix: .jsonl or .json (one JSON object a line), .json with one array of objects, "
        ".txt (one text a line; empty lines are skipped), these also with .gz or .zst after it, .csv, .csv.gz, "
        ".parquet, .arrow, and .bin (token ids). Or globs of them in quotes, folders that save_to_disk of Hugging Face "
        "datasets made, one data set on the hub, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT, or - for standard input.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option(help="Where the counts go, a .safetensors file.", show_default=False)]
VocabSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Width of the model's output layer, often a little more than the tokenizer has.",
        show_default="the tokenizer's length",
    ),
]
Documents = Annotated[
    bool,
    typer.Option("--documents", help="Also count the texts that hold each token, for the recipe idf; slower."),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with interrupted work, kept in OUTPUT.partial; with the same files and settings.",
    ),
]
Tokenizer = Annotated[str | None, typer.Option(help=TOKENIZER_HELP, show_default=False)]
SkipEmpty = Annotated[
    bool,
    typer.Option(
        "--skip-empty",
        help="Leave out rows whose text is null, whose completion is empty or whose chat has no assistant's turn, and "
        "say how many. Otherwise they are an error.",
    ),
]
KindOption = Annotated[
    Kind | None,
    typer.Option(
        "--kind",
        help="texts: every token but a text's first is a target. completions: answers, each after its prompt. chats: "
        "what the assistant says. labels: label ids. stream: files of token ids.",
        show_default="what the columns' names say",
        rich_help_panel=DATA,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        help="The JSON key or the table's column with the texts, completions, messages or labels.",
        show_default="what the columns' names say",
        rich_help_panel=DATA,
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="The column before the completions, as it stands; or text with columns in braces, such as "
        "'Q: {question} A: '.",
        show_default="what the columns' names say",
        rich_help_panel=DATA,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="The suffix by which to read standard input, or files of other suffixes: .jsonl, .json, .txt, each also "
        "with .gz or .zst.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        help="A Jinja file in place of the tokenizer's chat template.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Roles = Annotated[
    list[str] | None,
    typer.Option(
        "--role",
        metavar="NAME=ROLE",
        help="How a role is called in the chat template, such as gpt=assistant; may be repeated.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Causal = Annotated[
    bool | None,
    typer.Option(
        "--causal/--encoder-decoder",
        help="Whether position 0 of a text or label list is never a target (causal language models, whose labels are "
        "shifted inside the model) or is one. Must be said for labels.",
        show_default="causal for texts",
        rich_help_panel=TRAINING,
    ),
]
AssistantOnlyLoss = Annotated[
    bool | None,
    typer.Option(
        "--assistant-only-loss/--whole-chats",
        help="Of chats, count what the assistant says, or everything. TRL's own default is whole chats.",
        show_default="assistant-only-loss",
        rich_help_panel=TRAINING,
    ),
]
CompletionOnlyLoss = Annotated[
    bool | None,
    typer.Option(
        "--completion-only-loss/--with-prompts",
        help="Of completions, leave the prompts out, or count them, too.",
        show_default="completion-only-loss",
        rich_help_panel=TRAINING,
    ),
]
AppendEos = Annotated[
    bool | None,
    typer.Option(
        "--append-eos/--no-append-eos",
        help="Count one end-of-text token after each text or completion: for training that appends it where the "
        "tokenizer does not.",
        show_default="append-eos for completions, no-append-eos for texts",
        rich_help_panel=TRAINING,
    ),
]
SpecialTokens = Annotated[
    bool | None,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="Let the tokenizer add its own to texts, such as a beginning-of-text token.",
        show_default="special-tokens",
        rich_help_panel=TRAINING,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens at which training cuts a sequence. TRL's own default is 1024.",
        show_default="nothing is cut",
        rich_help_panel=TRAINING,
    ),
]
TruncationModeOption = Annotated[
    TruncationMode | None,
    typer.Option(
        "--truncation-mode",
        help="Which tokens of a longer sequence are kept.",
        show_default="keep_start",
        rich_help_panel=TRAINING,
    ),
]
PackingOption = Annotated[
    Packing | None,
    typer.Option(
        "--packing",
        help="How TRL packs sequences to --max-length tokens.",
        show_default="no packing",
        rich_help_panel=TRAINING,
    ),
]
IgnoreIndex = Annotated[
    int | None,
    typer.Option(
        help="The label of positions without a loss, such as prompts and padding.",
        show_default=str(IGNORED),
        rich_help_panel=TOKENS,
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Of the ids in .bin files; those of llm.c, and those with an .idx of Megatron beside them, tell it.",
        show_default=False,
        rich_help_panel=TOKENS,
    ),
]
Separator = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="The id that ends a document in .bin files, to count documents; it is a target like others.",
        show_default=False,
        rich_help_panel=TOKENS,
    ),
]
