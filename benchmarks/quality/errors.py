"""What one line explains to the person who started the program."""


class UserError(Exception):
    """A mistake in the call or the installation; the message says what to do."""
