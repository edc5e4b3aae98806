"""What a command is given, looked at before anything heavy is imported: are data and run there, is a folder free.

A wrong path is then refused at once; what needs more than a look is refused where it is read.
"""

import difflib
import glob
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from tokenfusion.errors import InputError


def require_data(data: str) -> None:
    """Refuse DATA that is not there, or is no images but a run; addresses and patterns are looked at later.

    Raises:
        InputError: there is no such file or folder, and the nearest are offered; or `train` or `compare` wrote it.
    """
    if data == "digits" or names_shards(data):
        return
    if not os.path.exists(data):
        raise InputError(f"{data}: no such file or folder; {nearest(Path(data))}")
    refuse_run(data, "DATA is a folder of images with a subfolder per class, or a list of them")


RUNS = {"model.json": "a run folder, which `train` wrote", "comparison.json": "a comparison, which `compare` wrote"}
"""What a folder with a recipe and such a file is."""


def refuse_run(place: str, wanted: str) -> None:
    """Refuse a run's folder where images are wanted, and say where those that it was trained on are named.

    Raises:
        InputError: it is one.
    """
    recipe = os.path.join(place, "recipe.toml")
    for file, what in RUNS.items():
        if os.path.isfile(recipe) and os.path.isfile(os.path.join(place, file)):
            raise InputError(f"{place} is {what}; {wanted}: `data` in {recipe} names those that it was trained on")


def require_sources(sources: Sequence[str]) -> None:
    """Refuse images to predict of which none is there, or one is a run; what is not there beside others is said later.

    Raises:
        InputError: they are; the names nearest to the first are offered.
    """
    for source in sources:
        refuse_run(source, "SOURCE is image files, or folders of them")
    later = (source in ("-", "digits") or names_shards(source) for source in sources)
    if any(later) or any(os.path.lexists(source) or found(source) for source in sources):
        return
    more = f", and {len(sources) - 1} more" * (len(sources) > 1)
    raise InputError(f"{sources[0]}{more}: no such file or folder; {nearest(Path(sources[0]))}")


def found(pattern: str) -> bool:
    """Whether a glob finds anything."""
    return next(glob.iglob(pattern, recursive=True), None) is not None


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
    """A hint at what was meant: the paths most like the missing one in the deepest folder that does exist, or what else
    is there, folders first. Hidden files and what systems leave behind are not offered."""
    from tokenfusion_runtime.walk import DROPPINGS

    while not os.path.isdir(path.parent):
        path = path.parent
    there = sorted(os.listdir(path.parent), key=lambda name: (not os.path.isdir(path.parent / name), name))
    offered = [name for name in there if name[0] != "." and name.casefold() not in DROPPINGS]
    if close := difflib.get_close_matches(path.name, offered, n=3):
        return f"did you mean {' or '.join(str(path.parent / name)[:200] for name in close)}?"
    if not offered:
        return f"{path.parent} is empty" if not there else f"{path.parent} has hidden files alone"
    names = ", ".join(repr(name[:200]) for name in offered[:3]) + f" and {len(offered) - 3:,} more" * (len(offered) > 3)
    where = "this folder" if path.parent == Path() else path.parent
    return f"{where} has: {names}"


def resume_command(run: Path) -> str:
    """What to type to go on with a run."""
    return f"tokenfusion train --resume {shlex.quote(str(run))}"
