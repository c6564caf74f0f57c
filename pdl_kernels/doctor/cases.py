"""The cases of `pdl-kernels doctor --check`, chosen so that every kernel the planner can choose is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

VOCABULARIES = (1000, 32000, 50257, 128256, 151936, 262144)  # a short one; Llama-2, GPT-2, Llama-3, Qwen-2.5, Gemma
SMALL_VOCABULARIES = (130,)  # for Triton's interpreter, which needs a tenth of a second for a row
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HIDDEN_SIZE = 64
FEW_ROWS = 3  # on every device several programs then share a row
CPU_ROWS = 8
INTERPRETER_ROWS = 17  # from 16 on, one program takes a whole row there

EVERY_OPTION: dict[str, Any] = {
    "reduction": "token_mean",
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "softcap": 30.0,
    "logit_scale": 0.7,
    "return_stats": True,
}


class Recipe(NamedTuple):
    """One way to call the loss."""

    options: dict[str, Any] = {}  # noqa: RUF012 - read, never changed
    upstream: float | None = 1.0  # None: forward alone, under no_grad
    few_rows: bool = False
    inplace: bool = False
    expected: bool = False  # passed to the loss as expected_upstream
    read_twice: bool = False  # rows are read twice, as where the single-pass kernel does not compile
    layout: str = "rows"  # or "offset": the storage does not start on 16 bytes; or "columns": columns have a stride
    token_weights: bool = False
    linear: bool = False


RECIPES = {
    "plain": Recipe(),
    "upstream 0.25": Recipe(upstream=0.25),
    "upstream 0.25, expected": Recipe(upstream=0.25, expected=True),
    "in place": Recipe(inplace=True),
    "in place, upstream 0.25": Recipe(inplace=True, upstream=0.25),
    "read twice": Recipe(read_twice=True),
    "few rows": Recipe(few_rows=True, upstream=0.25),
    "few rows, in place": Recipe(few_rows=True, inplace=True),
    "per token": Recipe({"reduction": "none"}),
    "forward alone": Recipe(upstream=None),
    "statistics and z-loss": Recipe({"return_stats": True, "z_loss": 1e-3}),
    "every option": Recipe(EVERY_OPTION, upstream=0.25, token_weights=True),
    "every option, in place": Recipe(EVERY_OPTION, inplace=True, token_weights=True),
    "linear": Recipe(linear=True),
    "linear, every option": Recipe(EVERY_OPTION, upstream=0.25, token_weights=True, linear=True),
    "offset by one element": Recipe(layout="offset"),
    "columns with a stride": Recipe(layout="columns"),
}
LAYOUTS = ("offset by one element", "columns with a stride")  # tried on short rows alone: long ones use the same code
# Few, because the linear loss launches the same kernels and its products take time.
LINEAR_VOCABULARIES = {"cuda": (1000, 32000, 128256), "cpu": (1000, 32000)}
LINEAR_CPU_ROWS = 32  # with fewer rows, products sum V terms in one go, in torch's composition and here


class Case(NamedTuple):
    """One call on one device."""

    recipe: str
    rows: int
    vocab_size: int
    dtype: str

    @property
    def group(self) -> tuple[int, str]:
        """Cases of one group are reported together."""
        return self.vocab_size, self.dtype

    @property
    def kernels(self) -> tuple[int, str, str]:
        """Equal for cases that launch the same compiled kernels, each of which takes seconds to compile."""
        return *self.group, repr(RECIPES[self.recipe].options)

    def __str__(self) -> str:
        return f"{self.rows} x {self.vocab_size} {self.dtype}, {self.recipe}"


def check_cases(device: torch.device, vocabularies: Sequence[int] = (), *, interpreted: bool = False) -> list[Case]:
    """The cases of a device; those of one group stand side by side.

    Args:
        vocabularies: by default VOCABULARIES.
        interpreted: the Triton backend runs on the CPU, in Triton's interpreter.
    """
    if device.type == "cuda":
        return cases_for(torch.cuda.get_device_properties(device).multi_processor_count, vocabularies)
    if interpreted:
        sizes = tuple(vocabularies or SMALL_VOCABULARIES)
        return _cases(INTERPRETER_ROWS, INTERPRETER_ROWS, sizes, sizes)
    sizes = tuple(vocabularies or VOCABULARIES)
    return _cases(CPU_ROWS, LINEAR_CPU_ROWS, sizes, tuple(vocabularies or LINEAR_VOCABULARIES["cpu"]))


def cases_for(multiprocessors: int, vocabularies: Sequence[int] = ()) -> list[Case]:
    """The cases of a GPU, from its number of multiprocessors."""
    many = 2 * multiprocessors + 9  # from 2 * multiprocessors on one program takes a whole row
    sizes = tuple(vocabularies or VOCABULARIES)
    return _cases(many, many, sizes, tuple(vocabularies or LINEAR_VOCABULARIES["cuda"]))


def _cases(
    many_rows: int, linear_rows: int, vocabularies: tuple[int, ...], linear_vocabularies: tuple[int, ...]
) -> list[Case]:
    found = []
    for vocab_size in vocabularies:
        for dtype in DTYPES:
            for name, recipe in RECIPES.items():
                if name in LAYOUTS and vocab_size != vocabularies[0]:
                    continue
                if recipe.linear and vocab_size not in linear_vocabularies:
                    continue
                rows = FEW_ROWS if recipe.few_rows else linear_rows if recipe.linear else many_rows
                found.append(Case(name, rows, vocab_size, dtype))
    return found
