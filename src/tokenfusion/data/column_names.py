"""What columns of tables are called, by what they hold."""

import re
from collections.abc import Iterable, Mapping

KNOWN: Mapping[str, tuple[str, ...]] = {
    role: tuple(names.split())
    for role, names in {
        "path": "path file filename filepath image imagepath imagefile imagename imagefilename img imgpath imgfile "
        "imgname imageid imgid picture photo imageurl url filenames",
        "label": "label class category target classname labelname categoryname classlabel",
        "labels": "labels tags classes categories",
        "split": "split subset set partition phase dataset usage fold",
        "weight": "weight sampleweight weights",
        "group": "group groupid groups",
    }.items()
}
"""What columns are called, in small letters without spaces; a column of a role's own name is preferred."""
LESS_USUAL = {"path": ("fname",), "label": ("classid", "labelid", "y", "species")}
"""What they are also called, where no column has a better name."""


def plain(name: str) -> str:
    """A column's name in small letters, without spaces and signs."""
    return re.sub(r"[\W_]+", "", name.casefold())


def names_paths(cells: Iterable[str]) -> bool:
    """Whether one of the cells of a line is what a column of paths is called."""
    return any(plain(cell) in (*KNOWN["path"], *LESS_USUAL["path"]) for cell in cells)
