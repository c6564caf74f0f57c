"""What an adapter of a peer provides, and what adapters share."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX, Inputs
from pdl_kernels.errors import first_line

Loss = Callable[..., Tensor]  # (rows, V) logits, or (rows, H) hidden states and (V, H) head -> the mean loss, ()


def runs_anywhere(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way of computing the loss, as the suite times it.

    Attributes:
        name: in the table and in recorded results.
        peer: what `--peers` calls it; several contenders may share one.
        build: binds targets and weights, whose preparation is not timed, and the upstream gradient where it is of use.
        weighted: False where the implementation takes no class weights; it computes the plain mean then.
        overwrites: what the logits held is gone afterwards; they are restored before every run, untimed.
        problem: why it cannot run on a device, or None. It may import the peer.
        packages: distributions whose versions are recorded.
        not_quick: why --quick leaves it out, or None.
        linear: it takes hidden states and the output layer instead of logits.
    """

    name: str
    peer: str
    build: Callable[[Inputs], Loss]
    weighted: bool = True
    overwrites: bool = False
    problem: Callable[[torch.device], str | None] = field(default=runs_anywhere)
    packages: tuple[str, ...] = ()
    not_quick: str | None = None
    linear: bool = False

    @property
    def loss(self) -> str:
        """What `--loss` calls it."""
        return "linear" if self.linear else "logits"


def gpu_only(module: str) -> Callable[[torch.device], str | None]:
    """A `problem` for packages whose kernels run on GPUs and whose import may be slow or fail."""

    def problem(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels run on a GPU (Triton's interpreter runs them too, but its time means nothing)"
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return "not installed"
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a package does on import is a reason to leave it out
            return f"{module} cannot be imported: {named_error(error)}"
        return None

    return problem


def named_error(error: BaseException) -> str:
    """Its type and the first line of its message."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error)}" if str(error).strip() else kind


def mean_over_counted(row_losses: Tensor, targets: Tensor) -> Tensor:
    """The plain mean of (rows,) losses that are 0 where ignored, as unweighted peers leave it to the caller."""
    return row_losses.sum() / (targets != IGNORE_INDEX).sum()
