"""What several commands take: files of counts and weights, output files, and tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pdl_kernels.errors import first_line

CountsFile = Annotated[Path, typer.Argument(help="The counts that `pdl-kernels count` wrote.", show_default=False)]
WeightsFile = Annotated[Path, typer.Argument(help="The table that `pdl-kernels weights` wrote.", show_default=False)]
TOKENIZER_HELP = (
    "A tokenizer.json, a folder with a transformers tokenizer, a .gguf model file, or a name on the Hugging Face hub "
    "(needs the network the first time)."
)
Tokenizer = Annotated[str | None, typer.Option(help=f"To show tokens as text. {TOKENIZER_HELP}", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


def check_output(output: Path, overwrite: bool, suffix: str) -> None:
    """ValueError, before any work is done, where `output` cannot be written."""
    if output.suffix.lower() != suffix:
        raise ValueError(f"--output is {output}; accepted are names that end in {suffix}")
    if output.is_dir():
        raise ValueError(f"--output is {output}, a folder; accepted is a file")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {output}, and there is no folder {output.parent}; make it first")
    if output.exists() and not overwrite:
        raise ValueError(f"--output is {output}, which exists; --overwrite replaces it")


def load_tokenizer(name: str | None) -> Any:
    """A `transformers` tokenizer, or a `tokenizers.Tokenizer` from a tokenizer.json; None for None."""
    if name is None:
        return None
    path = Path(name)
    if path.is_file():
        if path.suffix == ".json":
            return _tokenizer_from_json(path)
        if path.suffix == ".gguf":
            return _pretrained(name, str(path.parent), gguf_file=path.name)
        raise ValueError(f"--tokenizer is {name}; accepted are a folder, a hub name, and files .json and .gguf")
    if path.is_dir():
        return _pretrained(name, name)
    if path.suffix in (".json", ".gguf") or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"--tokenizer is {name}, and there is no such file or folder")
    return _from_hub(name)


def _tokenizer_from_json(path: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception and no class of its own
        raise ValueError(f"--tokenizer is {path}, which is no tokenizer.json ({first_line(error)})") from None


def _pretrained(name: str, folder: str, **options: Any) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file makes the library raise
        raise ValueError(f"--tokenizer is {name}, which cannot be read ({first_line(error)})") from None


def _from_hub(name: str) -> Any:
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # otherwise it reports each attempt to connect
    try:
        # First what was downloaded before: without a network the hub's retries take most of a minute.
        return transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:
        print(f"asking the Hugging Face hub for the tokenizer {name}", file=sys.stderr)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"--tokenizer is {name}: there is no such file or folder, and the Hugging Face hub did not give it "
            f"({first_line(error)})"
        ) from None


def output_width(model: Path) -> int:
    """The number of entries of a model's output layer, by its config.json; `model` is its folder or that file."""
    path = model / "config.json" if model.is_dir() else model
    if not path.is_file():
        raise FileNotFoundError(f"--model is {model}, and there is no file {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        width = config.get("text_config", config).get("vocab_size", config.get("vocab_size"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--model is {model}, and {path} is no config.json ({first_line(error)})") from None
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"--model is {model}, and {path} says vocab_size {width!r}; accepted is an integer >= 1")
    return width


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The same for tokenizers that do the same, wherever they were read from.

    Take it before the tokenizer's first use, which may alter it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        description = backend.to_str()
    else:
        description = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(description.encode()).hexdigest()[:16]


def beside(output: Path, suffix: str) -> Path:
    """The file whose name is that of `output` with `suffix` after it."""
    return output.with_name(os.fspath(output.name) + suffix)
