"""Which versions of the frameworks the tests ran with."""

import functools
import warnings
from importlib import metadata

# (oldest, newest) that `make test-trainers-oldest` and `make test-trainers` passed with.
TESTED = {
    "transformers": ("5.21", "5.24"),
    "trl": ("1.16", "1.16"),
    "lightning": ("2.6", "2.6"),
    "torchtitan": ("0.3", "0.3"),
}


@functools.cache
def warn_if_untested(framework: str) -> None:
    """Say once where the installed version is none that was tested."""
    installed = metadata.version(framework)
    oldest, newest = TESTED[framework]
    if not _parts(oldest) <= _parts(installed) <= _parts(newest):
        tried = oldest if oldest == newest else f"{oldest} to {newest}"
        warnings.warn(
            f"pdl_kernels was tested with {framework} {tried}, and {installed} is installed: let PDLCallback check the "
            "first steps, and compare the loss with weights=None to that of plain cross entropy",
            stacklevel=3,
        )


def _parts(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
