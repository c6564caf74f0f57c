"""pdl-kernels count: how often each token is a training target."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdl_kernels.cli import count_options as options
from pdl_kernels.cli.arguments import Overwrite, beside, check_output, load_tokenizer
from pdl_kernels.cli.counting import OF_KINDS, Settings, Work, option
from pdl_kernels.data.corpora import Corpus, open_corpus
from pdl_kernels.data.readings import COMPLETIONS, LABELS, STREAM
from pdl_kernels.weights.counts import TokenCounts

# How arguments in messages of the package are called here.
OPTIONS = {
    "skip_empty": "--skip-empty",
    "append_eos=False": "--no-append-eos",
    "assistant_only_loss=False": "--whole-chats",
    "assistant_only_loss": "--assistant-only-loss",
    "(chat_template)": "(--chat-template)",
    "or chat_template": "or --chat-template",
    "roles says": "--role says",
}
# ---------------------------------------------------------------------------------------------------------------------
# The command


def count(
    files: options.Files,
    output: options.Output,
    tokenizer: options.Tokenizer = None,
    vocab_size: options.VocabSize = None,
    documents: options.Documents = False,
    skip_empty: options.SkipEmpty = False,
    resume: options.Resume = False,
    overwrite: Overwrite = False,
    kind: options.KindOption = None,
    column: options.Column = None,
    prompt: options.PromptOption = None,
    format_: options.Format = None,
    chat_template: options.ChatTemplateFile = None,
    roles: options.Roles = None,
    causal: options.Causal = None,
    assistant_only_loss: options.AssistantOnlyLoss = None,
    completion_only_loss: options.CompletionOnlyLoss = None,
    append_eos: options.AppendEos = None,
    special_tokens: options.SpecialTokens = None,
    max_length: options.MaxLength = None,
    truncation_mode: options.TruncationModeOption = None,
    packing: options.PackingOption = None,
    ignore_index: options.IgnoreIndex = None,
    dtype: options.DtypeOption = None,
    separator: options.Separator = None,
) -> None:
    """Count how often each token is a training target.

    What the data are is found from the names of their columns and said before counting starts; where they can be read
    in several ways, the command stops and names them. Texts, completions and chats need --tokenizer; labels and files
    of tokens need --vocab-size, or --tokenizer for the number.

    Examples:

        pdl-kernels count chats.jsonl --tokenizer ./model --output counts.safetensors

        pdl-kernels count corpus.jsonl --kind texts --tokenizer ./model --append-eos --output counts.safetensors

        pdl-kernels count 'tokenized/*.parquet' --column labels --causal --vocab-size 50304 --output counts.safetensors

    Chats and completions are counted as TRL's SFTTrainer trains on them, with options of the same names as its own.
    Nothing is written to disk a second time: .arrow files, .bin files and saved folders are mapped into memory, and
    everything else is streamed. Only a name on the hub needs the network.
    """
    check_output(output, overwrite, ".safetensors")
    partial = beside(output, ".partial")
    if partial.exists() and not (resume or overwrite):
        raise ValueError(f"{partial} holds interrupted work; --resume goes on with it, --overwrite starts again")
    corpus = open_corpus(
        files,
        column,
        kind=None if kind is None else kind.value,
        prompt=prompt,
        form=None if format_ is None else _suffix(format_),
        dtype=None if dtype is None else dtype.value,
        separator=separator,
    )
    if resume and not corpus.resumable:
        raise ValueError("standard input comes once, and nothing tells whether it is the same: accepted is no --resume")
    given = Settings(
        skip_empty=skip_empty or None,
        chat_template=chat_template,
        roles=roles,
        causal=causal,
        assistant_only_loss=assistant_only_loss,
        completion_only_loss=completion_only_loss,
        append_eos=append_eos,
        special_tokens=special_tokens,
        max_length=max_length,
        truncation_mode=None if truncation_mode is None else truncation_mode.value,
        packing=None if packing is None else packing.value,
        ignore_index=ignore_index,
    )
    _check_options(corpus, given)
    _check_what_is_needed(corpus, tokenizer, vocab_size)
    loaded = load_tokenizer(tokenizer)
    work = Work(corpus, loaded, tokenizer, vocab_size, given, documents, partial if corpus.resumable else None)
    if partial.exists() and not resume:
        partial.unlink()

    started = time.monotonic()
    with _arguments_named_as_options(), _work_kept(partial):
        counts = work.count()
        counts.tokenizer = tokenizer
        counts.save(output)
    partial.unlink(missing_ok=True)
    _print_result(output, counts, time.monotonic() - started)


def _suffix(text: str) -> str:
    return text if text.startswith(".") else f".{text}"


def _check_options(corpus: Corpus, given: Settings) -> None:
    """ValueError for options of other kinds of data, which would have no effect, and for a kind that is not said."""
    for name, kinds in OF_KINDS.items():
        if getattr(given, name) is not None and corpus.kind not in kinds:
            hint = ""
            if corpus.kind == COMPLETIONS and name == "causal":
                column = corpus.reading.column
                hint = f"; for encoder-decoder models the answers are texts: --kind texts --column {column}"
            raise ValueError(
                f"{option(name)} is for {' and '.join(kinds)}, and {corpus.name} holds {corpus.kind}{hint}"
            )
    if corpus.kind == LABELS and given.causal is None:
        raise ValueError(
            f"{corpus.name} holds labels, and nothing says whether position 0 of each is a target: --causal (it is "
            "none, because the model shifts the labels) or --encoder-decoder (it is one)"
        )
    if given.truncation_mode is not None and (given.max_length is None or given.packing is not None):
        raise ValueError("--truncation-mode is for sequences that --max-length cuts, without --packing")
    if given.packing is not None and given.max_length is None:
        raise ValueError(f"--packing is {given.packing}, and --max-length is missing: to how many tokens")
    if given.packing is not None and given.causal is False:
        raise ValueError("--packing is for causal models, and --encoder-decoder came with it")


def _check_what_is_needed(corpus: Corpus, tokenizer: str | None, vocab_size: int | None) -> None:
    """ValueError where texts come without a tokenizer, or labels without any way to know the vocabulary's size."""
    if tokenizer is not None:
        return
    if corpus.kind not in (LABELS, STREAM):
        raise ValueError(
            f"{corpus.name} holds {corpus.kind}, and --tokenizer is missing: a tokenizer.json, folder or name"
        )
    if vocab_size is None:
        raise ValueError(f"{corpus.name} holds label ids, and --vocab-size is missing; --tokenizer gives it too")


def _print_result(output: Path, counts: TokenCounts, seconds: float) -> None:
    left_out = f", {counts.left_out:,} left out" if counts.left_out else ""
    print(
        f"{output}: {counts.total:,} targets in {counts.sequences:,} sequences{left_out}, "
        f"{int((counts.counts > 0).sum()):,} of {counts.vocab_size:,} types seen, {seconds:.1f} s"
    )
    if counts.total == 0:
        print("warning: no target was counted: the first token of a text or of causal labels is none")
    print(f"next: pdl-kernels weights {output} --output {output.with_name('weights.safetensors')}")


@contextmanager
def _arguments_named_as_options() -> Iterator[None]:
    """The package's messages name arguments; here they name the options."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        for argument, option in OPTIONS.items():
            message = message.replace(argument, option)
        raise ValueError(message) from None


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
        return TokenCounts.load(partial).rows_read == 0
    except ValueError:  # damaged: for the user to look at
        return False
