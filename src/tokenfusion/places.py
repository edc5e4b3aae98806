"""What a command is given, looked at before anything heavy is imported: are data and run there, is a folder free.

A wrong path is then refused at once; what needs more than a look is refused where it is read.
"""

import difflib
import os
import shlex
from pathlib import Path

from tokenfusion.errors import InputError


def require_data(data: str) -> None:
    """Refuse DATA that is not there; addresses and patterns are looked at later.

    Raises:
        InputError: there is no such file or folder; the nearest names are offered.
    """
    if data != "digits" and not names_shards(data) and not os.path.exists(data):
        raise InputError(f"{data}: no such file or folder; {nearest(Path(data))}")


def require_files(paths: tuple[str, ...], option: str) -> None:
    """Refuse files of an option that are not there.

    Raises:
        InputError: naming the first of them, and what is near.
    """
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"{option} {path}: no such file; {nearest(Path(path))}")


def require_run(run: Path) -> None:
    """Refuse a folder that is no finished run; that of a hub, hf://, is looked at later.

    Raises:
        InputError: there is no such folder, training has not ended its first step, or it is another folder.
    """
    if str(run).startswith("hf:"):
        return
    if not run.exists():
        raise InputError(f"{run}: no such folder; {nearest(run)}; give the folder that `tokenfusion train --out` wrote")
    if not run.is_dir():
        raise InputError(f"{run} is not a folder; give the folder that `tokenfusion train --out` wrote")
    if (run / "model.json").exists():
        return
    if (run / "recipe.toml").exists():
        raise InputError(f"{run} ended before its first step; go on with `{resume_command(run)}`")
    raise InputError(f"{run} is not a run (it has no model.json); give the folder that `tokenfusion train --out` wrote")


def require_begun(run: Path) -> None:
    """Refuse a folder that training cannot go on with, as it holds no recipe.

    Raises:
        InputError: it does not.
    """
    if not (run / "recipe.toml").exists():
        raise InputError(
            f"{run} is not a run (it has no recipe.toml); give the folder that `tokenfusion train --out` wrote"
        )


def require_no_run(folder: Path) -> None:
    """Refuse a new run's folder that holds a run already, or is a file.

    Raises:
        InputError: it does.
    """
    if (folder / "model.json").exists():
        raise InputError(f"{folder} holds a run already; go on with `{resume_command(folder)}`, or give another --out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} exists and is not an empty folder; give another --out")


def names_shards(data: str) -> bool:
    """Whether DATA is a URL or a pattern in braces; a path that exists is neither."""
    return "://" in data or ("{" in data and not os.path.exists(data))


def nearest(path: Path) -> str:
    """A hint at what was meant: the names most like the missing one, in the deepest folder that does exist."""
    while not os.path.isdir(path.parent):
        path = path.parent
    found = sorted(os.listdir(path.parent))
    close = difflib.get_close_matches(path.name, found, n=3) or found[:3]
    names = ", ".join(repr(name[:200]) for name in close)
    return f"{path.parent} has: {names}" if close else f"{path.parent} is empty"


def resume_command(run: Path) -> str:
    """What to type to go on with a run."""
    return f"tokenfusion train --resume {shlex.quote(str(run))}"
