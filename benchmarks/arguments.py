"""What the programs' arguments have in common."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: an integer that is not smaller."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: at least {least} is accepted")
        return value

    return integer
