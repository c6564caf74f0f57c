"""The application: its help, its exit codes, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pdl_kernels

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# What the package and the commands raise about what the user gave: the message is enough, and no traceback is shown.
USER_ERRORS = (ValueError, TypeError, IndexError, FileNotFoundError, IsADirectoryError, NotADirectoryError)

EXTRA = ("accelerate", "datasets", "gguf", "huggingface_hub", "matplotlib", "pyarrow", "tokenizers", "transformers")

EXIT_CODES = (
    "Exit codes: 0 done; 1 the work could not be finished, such as a full disk; 2 an option or a file is not as it has "
    "to be; 130 interrupted."
)


class Commands(TyperGroup):
    """The commands, which end with one line and an exit code where they raise an exception."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has gone, as in `| head`; typer then ends without a word
            raise
        except (*USER_ERRORS, OSError, MemoryError, ModuleNotFoundError, KeyboardInterrupt) as error:
            if ctx.params.get("traceback"):
                raise
            message, code = report(error)
            print(message, file=sys.stderr)
            raise typer.Exit(code) from None


def report(error: BaseException) -> tuple[str, int]:
    """What to print for an exception, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").split(".")[0]
        remedy = ": pip install 'pdl-kernels[cli]'" if missing in EXTRA else ""
        return f"error: {missing} is not installed{remedy}", USER_ERROR
    if isinstance(error, MemoryError):
        return "error: out of memory", FAILED
    return f"error: {error}", USER_ERROR if isinstance(error, USER_ERRORS) else FAILED


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pdl-kernels {pdl_kernels.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog=EXIT_CODES,
)


@app.callback()
def describe_application(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose, to report a bug.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """From a corpus to the weights of Power-Law Decay Loss, a cross entropy that counts rare tokens more.

    Three steps: **count** how often each token is a training target, make **weights** from the
    counts, and **inspect** or **plot** what they do to the corpus before training with them:

        pdl-kernels count corpus.jsonl --tokenizer ./tokenizer --output counts.safetensors

        pdl-kernels weights counts.safetensors --output weights.safetensors

        pdl-kernels inspect weights.safetensors counts.safetensors --tokenizer ./tokenizer

    In training, `pdl_kernels.load_weights("weights.safetensors").table` is what PDLCrossEntropyLoss takes.
    """
