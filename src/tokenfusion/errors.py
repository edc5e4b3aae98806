"""The one error that a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says the value, the reason and the remedy.

    The command prints it without a traceback and exits with 2.
    """
