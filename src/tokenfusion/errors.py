"""The one error that a user's mistake raises, which the runtime package has, and what others say in a line."""

from tokenfusion_runtime.errors import InputError

__all__ = ["InputError", "first_line", "how_to_install"]


def how_to_install(extra: str) -> str:
    """What to do where packages of an extra are missing; no package index has this package."""
    return f"pip install '.[{extra}]' in a copy of tokenfusion's repository"


def first_line(error: BaseException) -> str:
    """What an error says, in a line without its full stop; its name where it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
