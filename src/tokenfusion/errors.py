"""The one error that a user's mistake raises; the runtime package, which raises it too, has it."""

from tokenfusion_runtime.errors import InputError

__all__ = ["InputError"]
