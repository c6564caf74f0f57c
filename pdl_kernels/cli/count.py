"""pdl-kernels count: how often each token is a training target."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pdl_kernels.cli.arguments import (
    TOKENIZER_HELP,
    Overwrite,
    beside,
    check_output,
    load_tokenizer,
    tokenizer_fingerprint,
)
from pdl_kernels.data.corpora import Corpus, open_corpus
from pdl_kernels.data.tokenizers import vocab_size_of
from pdl_kernels.weights.counts import TokenCounts

TEXTS = "Columns of strings, and text files"
LABELS = "Columns of label ids"
IGNORE_INDEX = -100

# ---------------------------------------------------------------------------------------------------------------------
# The options

Files = Annotated[
    list[Path],
    typer.Argument(
        help="Files of one kind, by suffix: .jsonl or .json (one JSON object a line), .parquet, .txt (one text a "
        "line; empty lines are skipped), .csv, .arrow, and .json with one array of objects; .jsonl, .json and .txt "
        "also with .gz or .zst after it, .csv with .gz. Or globs of them in quotes, folders that save_to_disk of "
        "Hugging Face datasets made, or one data set on the hub, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option(help="Where the counts go, a .safetensors file.", show_default=False)]
Column = Annotated[str | None, typer.Option(help="The JSON key or the table's column to count.", show_default="text")]
VocabSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Width of the model's output layer, often a little more than the tokenizer has.",
        show_default="the tokenizer's length",
    ),
]
Shift = Annotated[
    bool,
    typer.Option(
        help="Leave out the first token of each text or label list, which a causal language model never predicts. "
        "--no-shift for the labels of encoder-decoder models."
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
Tokenizer = Annotated[str | None, typer.Option(help=TOKENIZER_HELP, show_default=False, rich_help_panel=TEXTS)]
AppendEos = Annotated[
    bool,
    typer.Option(
        "--append-eos",
        help="Count one end-of-text token after each text: for training that appends it where the tokenizer does not.",
        rich_help_panel=TEXTS,
    ),
]
SpecialTokens = Annotated[
    bool | None,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="Let the tokenizer add its own, such as a beginning-of-text token.",
        show_default="special-tokens",
        rich_help_panel=TEXTS,
    ),
]
IgnoreIndex = Annotated[
    int | None,
    typer.Option(
        help="The label of positions without a loss, such as prompts and padding.",
        show_default=str(IGNORE_INDEX),
        rich_help_panel=LABELS,
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def count(
    files: Files,
    output: Output,
    column: Column = None,
    vocab_size: VocabSize = None,
    shift: Shift = True,
    documents: Documents = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    tokenizer: Tokenizer = None,
    append_eos: AppendEos = False,
    special_tokens: SpecialTokens = None,
    ignore_index: IgnoreIndex = None,
) -> None:
    """Count how often each token is a training target.

    Count what training will learn: for fine-tuning on answers the answers, not the prompts. A column of strings is
    tokenized and needs --tokenizer; a column of integer lists is counted as labels and needs --vocab-size, or
    --tokenizer for the number.

    Examples:

        pdl-kernels count corpus.jsonl --tokenizer ./tokenizer.json --output counts.safetensors

        pdl-kernels count tokenized/*.parquet --column labels --vocab-size 50304 --output counts.safetensors

    Nothing is written to disk a second time: .arrow files and saved folders are mapped into memory, a .json array is
    read into it, and everything else is streamed. Only a name on the hub needs the network.
    """
    check_output(output, overwrite, ".safetensors")
    partial = beside(output, ".partial")
    if partial.exists() and not (resume or overwrite):
        raise ValueError(f"{partial} holds interrupted work; --resume goes on with it, --overwrite starts again")
    corpus = open_corpus(files, column)
    if corpus.holds == "labels":
        _refuse(corpus, {"--append-eos": append_eos, "--special-tokens": special_tokens is not None})
    else:
        _refuse(corpus, {"--ignore-index": ignore_index is not None})
    _check_what_is_needed(corpus, tokenizer, vocab_size)
    loaded = _load_tokenizer(tokenizer, append_eos)
    if partial.exists() and not resume:
        partial.unlink()

    started = time.monotonic()
    common = {
        "shift": shift,
        "documents": documents,
        "checkpoint": partial,
        "batch_size": corpus.batch_size,
        "progress": sys.stderr.isatty(),
    }
    with _work_kept(partial):
        if corpus.holds == "labels":
            counts = _count_labels(corpus, tokenizer, loaded, vocab_size, ignore_index, common)
        else:
            counts = _count_texts(corpus, loaded, vocab_size, special_tokens is not False, append_eos, common)
        counts.tokenizer = tokenizer
        counts.save(output)
    partial.unlink()
    _print_result(output, counts, time.monotonic() - started)


def _refuse(corpus: Corpus, given: dict[str, bool]) -> None:
    """ValueError for options of the other kind of column, which would have no effect."""
    for option, present in given.items():
        if present:
            accepted = "texts" if corpus.holds == "labels" else "label ids"
            raise ValueError(f"{option} is for {accepted}, and {corpus.name} holds {_held(corpus)}")


def _held(corpus: Corpus) -> str:
    return "label ids" if corpus.holds == "labels" else "texts"


def _check_what_is_needed(corpus: Corpus, tokenizer: str | None, vocab_size: int | None) -> None:
    """ValueError where texts come without a tokenizer, or labels without any way to know the vocabulary's size."""
    if tokenizer is not None:
        return
    if corpus.holds == "texts":
        raise ValueError(f"{corpus.name} holds texts, and --tokenizer is missing: a tokenizer.json, folder or name")
    if vocab_size is None:
        raise ValueError(f"{corpus.name} holds label ids, and --vocab-size is missing; --tokenizer gives it too")


def _load_tokenizer(name: str | None, append_eos: bool) -> Any:
    loaded = load_tokenizer(name)
    if append_eos and getattr(loaded, "eos_token_id", None) is None:
        raise ValueError(
            f"--append-eos: {name} names no end-of-text token; accepted are a folder, hub name or .gguf that does"
        )
    return loaded


def _count_labels(
    corpus: Corpus,
    tokenizer: str | None,
    loaded: Any,
    vocab_size: int | None,
    ignore_index: int | None,
    common: dict[str, Any],
) -> TokenCounts:
    return TokenCounts.from_dataset(
        corpus.rows,
        vocab_size_of(loaded) if vocab_size is None else vocab_size,
        corpus.column,
        tokenizer=tokenizer,
        ignore_index=IGNORE_INDEX if ignore_index is None else ignore_index,
        source=corpus.source,
        **common,
    )


def _count_texts(
    corpus: Corpus,
    tokenizer: Any,
    vocab_size: int | None,
    add_special_tokens: bool,
    append_eos: bool,
    common: dict[str, Any],
) -> TokenCounts:
    return TokenCounts.from_texts(
        corpus.rows,
        tokenizer,
        vocab_size=vocab_size,
        add_special_tokens=add_special_tokens,
        append_eos=append_eos,
        source=f"{corpus.name} of {corpus.source}, tokenizer {tokenizer_fingerprint(tokenizer)}",
        **common,
    )


def _print_result(output: Path, counts: TokenCounts, seconds: float) -> None:
    print(
        f"{output}: {counts.total:,} targets in {counts.sequences:,} sequences, {int((counts.counts > 0).sum()):,} of "
        f"{counts.vocab_size:,} types seen, {seconds:.1f} s"
    )
    if counts.total == 0:
        print("warning: no target was counted: with --shift the first token of each text or label list is none")
    print(f"next: pdl-kernels weights {output} --output {output.with_name('weights.safetensors')}")


@contextmanager
def _work_kept(partial: Path) -> Iterator[None]:
    """On an error or Ctrl-C, say what is left of the work; where nothing was counted, leave no file."""
    try:
        yield
    except BaseException:
        if partial.exists() and not _is_empty(partial):
            print(
                f"{partial} keeps the work so far; --resume goes on, with the same files and settings", file=sys.stderr
            )
        else:
            partial.unlink(missing_ok=True)
        raise


def _is_empty(partial: Path) -> bool:
    try:
        return TokenCounts.load(partial).sequences == 0
    except ValueError:  # damaged: for the user to look at
        return False
