"""What other libraries' errors say, for messages of our own."""


def first_line(error: BaseException) -> str:
    """The first line of the message that is not empty, or the error's type where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
