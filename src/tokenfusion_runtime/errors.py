"""The errors that a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says the value, the reason and the remedy.

    The command prints it without a traceback and exits with 2.
    """


class UnreadableImage(InputError):  # noqa: N818 - says what the image is
    """One image cannot be used. The message is the reason alone: which image it is, its source knows."""
