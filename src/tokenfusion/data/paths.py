"""Paths as lists have them: from other systems, other folders and other forms of Unicode; looked at before decoding."""

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenfusion.data.dataset import quoted
from tokenfusion.data.decode import is_image
from tokenfusion.data.readers import Paths
from tokenfusion.errors import InputError


@dataclass(frozen=True, eq=False)
class ListedPaths(Paths):
    """Image files that a list names, which need not be there."""

    where: str = ""
    missing: tuple[str, ...] = ()

    def require_there(self) -> None:
        """Refuse a list of whose files most are not there.

        Raises:
            InputError: with the first three, and what would be there.
        """
        if 2 * len(self.missing) <= len(self.paths):
            return
        first = quoted(self.missing[:3])
        raise InputError(
            f"{self.where}: {len(self.missing):,} of {len(self.paths):,} paths do not exist, the first "
            f"{'are' if len(self.missing) > 1 else 'is'} {first}, seen from {self.root}; {self.hint(self.missing[0])}"
        )

    def hint(self, path: str) -> str:
        """What there is in place of a path."""
        found = find_alike(self.root, path)
        stem, ending = os.path.splitext(found)
        if found and stem == path:
            return f"{path!r} exists with {ending}: write the file names' endings into the list"
        if found and stem == os.path.splitext(path)[0]:
            return f"{found!r} exists: mend the file names' endings in the list"
        if found:
            return f"{found!r} exists: write the paths in the list in the same small and capital letters"
        return "give the folder that they start at by --root DIR, or mend the paths"


def find_alike(root: str | Path, path: str) -> str:
    """The image file whose path differs by small and capital letters or by its ending alone; "" where there is none."""
    found = os.sep if os.path.isabs(path) else ""
    *folders, name = parts_of(path)
    for folder in folders:
        entries = [entry for entry in entries_of(root, found) if entry.casefold() == folder.casefold()]
        if not entries:
            return ""
        found = os.path.join(found, folder if folder in entries else min(entries))
    wanted = {name.casefold(), os.path.splitext(name)[0].casefold()}
    images = [entry for entry in entries_of(root, found) if is_image(entry)]
    close = [entry for entry in images if {entry.casefold(), os.path.splitext(entry)[0].casefold()} & wanted]
    return os.path.join(found, min(close)) if close else ""


def entries_of(root: str | Path, folder: str) -> list[str]:
    """What lies in a folder below a root; nothing where it cannot be read."""
    try:
        return os.listdir(os.path.join(root, folder))
    except OSError:
        return []


def resolve_paths(where: str, root: Path, paths: list[tuple[str, str]], rooted: bool) -> tuple[list[str], list[str]]:
    """Paths relative to a root, as the file system has them.

    `file://` says nothing. Backslashes are read where the path does not exist with them, and so is the other form of
    Unicode. With a root that was given, paths of another machine are read from the part on that exists below it.

    Args:
        where: the list, for messages.
        root: the folder that paths start at.
        paths: each with its place in the list.
        rooted: whether the root was given by --root.

    Returns:
        the paths, and a line of what was done to them.

    Raises:
        InputError: a path is a URL, or leaves the root.
    """
    paths = [(place, path.removeprefix("file://")) for place, path in paths]
    urls = [path for _, path in paths if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path)]
    if urls:
        raise InputError(
            f"{where}: {len(urls):,} of {len(paths):,} paths are URLs, the first is {urls[0]!r}; download the images "
            "and list their files (only shards are read from URLs)"
        )
    result, changed = [], dict.fromkeys(("backslashes read as /", "read in the other form of Unicode"), 0)
    cut = foreign_part(root, (path for _, path in paths)) if rooted else None
    for place, path in paths:
        text = path[2:] if path.startswith(("./", ".\\")) else path
        if cut is not None:
            text = "/".join(parts_of(text)[cut:]) or text
        normal = inside(text, path, place, rooted)
        if not exists(root, normal):
            slashed = inside(text.replace("\\", "/"), path, place, rooted) if "\\" in text else normal
            forms = [(unicodedata.normalize(form, some), some) for some in (normal, slashed) for form in ("NFC", "NFD")]
            for other, some in [(slashed, slashed), *forms]:
                if exists(root, other):
                    changed["backslashes read as /"] += some is not normal
                    changed["read in the other form of Unicode"] += other != some
                    normal = other
                    break
        result.append(normal)
    notes = [f"paths: {count:,} {what}" for what, count in changed.items() if count]
    if cut is not None:
        without = f" without their first {cut} folders" if cut else ""
        notes.append(f"paths: read below {root}{without}, as {result[0]!r}")
    return result, notes


def parts_of(path: str) -> list[str]:
    """A path's folders and file, of any system: `C:\\photos\\a.jpg` and `/photos/a.jpg`."""
    return [part for part in re.split(r"[/\\]", path) if part not in ("", ".")]


def foreign_part(root: Path, paths: Iterable[str]) -> int | None:
    """How many folders at the beginning of the paths belong to another machine: what is left exists below the root.

    0 where a path begins at the root with a slash; None where the paths are below the root as they are, or none is.
    """
    for path in paths:
        if os.path.isabs(path) and Path(path).resolve().is_relative_to(root.resolve()):
            return len(parts_of(path)) - len(parts_of(os.path.relpath(Path(path).resolve(), root.resolve())))
        parts = parts_of(path)
        if os.path.lexists(os.path.join(root, path)) and not os.path.isabs(path) and ".." not in parts:
            return None
        for cut in range(len(parts)):
            rest = parts[cut:]
            if ".." not in rest and exists(root, "/".join(rest)):
                return cut
    return None


def exists(root: Path, path: str) -> bool:
    try:
        return os.path.exists(os.path.join(root, path))
    except ValueError:  # a name that no file can have
        return False


def inside(text: str, path: str, place: str, rooted: bool) -> str:
    """The path, normalised; refused when it leaves the root."""
    normal = os.path.normpath(text)
    windows = re.match(r"[a-zA-Z]:[\\/]|\\\\", text)
    if os.path.isabs(normal) or windows or normal.split(os.sep)[0] == os.pardir:
        remedy = "mend it" if rooted else "give the folder that holds the images by --root DIR, or paths below the list"
        whose = "--root" if rooted else "the list's folder"
        raise InputError(f"{place}: path={path!r} leaves {whose}; {remedy}")
    return normal
