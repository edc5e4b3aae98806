"""Which column of a table holds what, by its name and, where that does not tell, by its type."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokenfusion.data.column_names import KNOWN, LESS_USUAL, plain
from tokenfusion.data.dataset import quoted
from tokenfusion.data.decode import is_image
from tokenfusion.data.split_names import FALSE, FLAGS, TRUE, split_flagged, split_named
from tokenfusion.data.table import Table
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

NO_CLASS = frozenset(
    {"verified", "reviewed", "checked", "approved", "confirmed", "annotated", "labelled", "labeled", "flagged", "done"}
    | {"difficult", "truncated", "occluded", "crowd", "duplicate", "augmented", "synthetic", "generated"}
    | {"val", "valid", "train", "test", "used", "usable", "ignore", "ignored", "exclude", "excluded", "skip", "skipped"}
)
"""Columns of 0 and 1 that say something else than a class, by `plain` name without `is`, `was` or `has`."""
THINGS = frozenset(
    {"patient", "subject", "person", "participant", "animal", "individual", "specimen", "plant", "identity"}
    | {"study", "series", "session", "sequence", "video", "clip", "scene", "site", "location"}
)
"""What columns are about that may tell pictures of one thing, by `plain` name without `id`."""
NEEDS = "an image's path and its label, as in path,label[,split][,weight][,group], or labels (a|b) in place of label"


@dataclass(frozen=True)
class Columns:
    """The columns of a table by what they hold; "" where there is none."""

    path: str
    label: str = ""
    labels: str = ""
    one_hot: tuple[str, ...] = ()
    """Classes whose columns hold 0 or 1, in place of a label."""
    split: str = ""
    weight: str = ""
    group: str = ""
    left: tuple[str, ...] = ()
    """Those that are not read."""

    @property
    def usual(self) -> bool:
        """Whether nothing was guessed: all are called what they are called here."""
        return not self.one_hot and all(
            getattr(self, role) in ("", role) for role in ("path", "label", "labels", "split", "weight", "group")
        )

    def in_words(self) -> str:
        """What was taken for what, and what was left."""
        taken = [f"{getattr(self, role)!r} is the {role}" for role in KNOWN if getattr(self, role)]
        taken += [f"{quoted(self.one_hot[:5])}{', ...' * (len(self.one_hot) > 5)} are classes of 0 and 1"] * bool(
            self.one_hot
        )
        return f"columns: {', '.join(taken)}" + f"; not read: {quoted(self.left[:8])}" * bool(self.left)


def choose(names: Sequence[str], role: str) -> list[str]:
    """The columns that may have a role: that of its own name alone where there is one."""
    own = [name for name in names if name == role] or [name for name in names if plain(name) == role]
    return own[:1] or [name for name in names if plain(name) in KNOWN[role]]


def choose_any(names: Sequence[str], role: str) -> list[str]:
    """As `choose`, or by a less usual name where no column has a usual one."""
    return choose(names, role) or [name for name in names if plain(name) in LESS_USUAL[role]]


def choose_columns(table: Table, reading: Reading) -> Columns:
    """The columns of a list.

    Raises:
        InputError: which one is meant is not clear; with the choices.
    """
    if not table.header and not reading.path_column:
        return columns_by_content(table)
    where, names = table.where, [name for name in table.columns if name]
    split = split_column(where, [n for n in names if n != reading.label_column], table.texts)
    path = asked(where, names, reading.path_column, "--path-column") or path_by_name(
        table, [n for n in names if n != reading.label_column]
    )
    rest = [name for name in names if name not in (path, split)]
    label, labels = asked(where, names, reading.label_column, "--label-column"), ""
    one_hot: tuple[str, ...] = ()
    if label and plain(label).endswith(KNOWN["labels"]):
        label, labels = "", label
    if not label and not labels:
        label, labels, one_hot = label_columns(table, rest)
    used = {path, label, labels, split, *one_hot}
    weight, group = (next((n for n in choose(rest, role) if n not in used), "") for role in ("weight", "group"))
    left = tuple(name for name in names if name not in used | {weight, group})
    refuse_doubtful(where, left, table.texts)
    refuse_misspelt(where, left, {"split": split, "weight": weight, "group": group})
    return Columns(path, label, labels, one_hot, split, weight, group, left)


def asked(where: str, names: Sequence[str], name: str, option: str) -> str:
    """The column that an option names, "" where it is not given."""
    if name and name not in names:
        raise InputError(f"{where}: there is no column {name!r} for {option}; it has {quoted(names)}")
    return name


def only(where: str, names: Sequence[str], found: Sequence[str], role: str, option: str) -> str:
    """The one column that was found for a role."""
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{where}: which of {quoted(found)} is the {role}? Say so by {option} {found[0]}")
    refuse_misspelt(where, names, {role: ""})
    raise InputError(
        f"{where}: its columns are {quoted(names)}, none of which is known as the {role}; say which by "
        f"{option} NAME. A list needs {NEEDS}"
    )


def label_columns(table: Table, names: list[str]) -> tuple[str, str, tuple[str, ...]]:
    """The column of one label, or that of several, or the classes that have a column of 0 and 1 each."""
    one, several = choose(names, "label"), choose(names, "labels")
    if "label" in one and "labels" in several:
        raise InputError(f"{table.where}: has columns label and labels; keep one")
    if "labels" in several and "label" not in one:
        return "", "labels", ()
    if "label" in one or (one and not several):
        return only(table.where, names, one, "label", "--label-column"), "", ()
    if several and not one:
        return "", only(table.where, names, several, "labels", "--label-column"), ()
    if not one:
        refuse_unsure(table.where, names, table.texts)
        flags = [name for name in names if may_be_class(name) and are_hot(table.texts(name))]
        hot = class_columns({n: np.array([is_true(row.get(n)) for _, row in table.rows]) for n in flags})
        if len(hot) > 1:
            return "", "", hot
        one = choose_any(names, "label")
    return only(table.where, table.columns, [*one, *several], "label", "--label-column"), "", ()


def may_be_class(name: str) -> bool:
    """Whether a column of 0 and 1 may be a class of this name, and is called neither as labels are nor as anything else
    that is read."""
    others = (*KNOWN["weight"], *KNOWN["group"], *KNOWN["split"], *FLAGS)
    return plain(name) not in others and not plain(name).endswith((*KNOWN["label"], *KNOWN["labels"]))


def class_columns(flags: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Which columns of 0 and 1 are classes: those of which each row has exactly one 1, where there are such.

    One or two columns that stand in the way of that are none; else a row has any number of classes. Columns whose
    names mean something else, such as `verified`, are none but where that alone makes the classes.

    Args:
        flags: the columns, bool (N,) each.
    """
    numbers = {name: column.astype(np.int64) for name, column in flags.items()}
    said = {name: column for name, column in numbers.items() if not says_else(name)}
    for some in (said, numbers):
        if len(some) > 1 and np.all(sum(some.values()) == 1):
            return tuple(some)
    if sum(column.any() for column in said.values()) < 2:
        return ()
    more = sum(said.values()) - np.int64(1)  # of each row, what columns that are no classes hold
    named = {column.tobytes(): name for name, column in said.items()}
    alone = {frozenset({name}) for name, column in said.items() if np.array_equal(column, more)}
    pairs = {frozenset({n, other}) for n, c in said.items() if (other := named.get((more - c).tobytes(), n)) != n}
    others = next((found for found in (alone, pairs) if found), set())
    without = next(iter(others)) if len(others) == 1 else frozenset()
    return tuple(name for name in said if name not in without or len(said) < len(without) + 2)


def are_hot(texts: set[str]) -> bool:
    """Whether the values of a column say of each image whether it has a class: 0 and 1, yes and no, or -1 and 1."""
    return are_flags(texts) or (bool(texts) and {text.removesuffix(".0") for text in texts} <= {"-1", "1"})


def refuse_unsure(where: str, names: Iterable[str], texts: Callable[[str], set[str]]) -> None:
    """Refuse columns of -1 beside 0 and 1 or nothing, as of CheXpert: where -1 may stand for unsure or no.

    Args:
        where, texts: as in `split_column`.
        names: the columns that may be classes.
    """
    unsure = []
    for name in filter(may_be_class, names):
        values = {text.removesuffix(".0") for text in texts(name)}
        if "-1" in values and values <= {"-1", "0", "1", ""} and not values <= {"-1", "1"}:
            unsure.append(name)
    if len(unsure) > 1:
        raise InputError(
            f"{where}: {quoted(unsure[:3])} hold -1 beside 0, 1 or empty cells, and -1 may stand for unsure, for no or "
            "for not known; write 0 or 1 in each, or name a column of labels by --label-column"
        )


def says_else(name: str) -> bool:
    """Whether a column of 0 and 1 says something else than a class by its name, such as `is_verified`."""
    return re.sub("^(is|was|has)", "", plain(name)) in NO_CLASS


def warn_of_no_classes(hot: Sequence[str], left: Iterable[str], texts: Callable[[str], set[str]]) -> list[str]:
    """A warning of columns of 0 and 1 that are no classes only because the others have one 1 a row.

    Args:
        hot: the classes.
        left, texts: as in `refuse_doubtful`.
    """
    others = [name for name in left if hot and may_be_class(name) and not says_else(name) and are_hot(texts(name))]
    return [
        f"warning: {quoted(others)} of 0 and 1 is taken for no class, for the others have exactly one 1 a row; where "
        "images have several labels, write these in a column labels (a|b)"
    ] * bool(others)


def warn_of_groups(left: Iterable[str], texts: Callable[[str], Sequence[str]]) -> list[str]:
    """A warning where a column that is not read may tell pictures of one thing, such as `patient_id`.

    Args:
        left: the columns that are not read.
        texts: gives the values in a column, one a row.
    """
    suspects = [name for name in left if plain(name).removesuffix("id") in THINGS]
    several = [name for name in suspects if 1 < len(set(values := texts(name))) < len(values)]
    return [
        f"warning: {quoted(several)} may tell pictures of one thing, which must not stand on both sides of a split; if "
        "so, call the column group"
    ] * bool(several)


def split_column(where: str, names: Sequence[str], texts: Callable[[str], set[str]]) -> str:
    """The column of splits: called so, or by another usual name if all its values name splits; a flag; or the one
    column of another name whose values all name splits, two or more.

    Args:
        where: the file, for messages.
        names: of the columns.
        texts: gives the values in a column, "" for none.

    Raises:
        InputError: several flags tell splits, or one holds something else than yes and no.
    """
    for name in choose(names, "split"):
        if plain(name) == "split" or name_splits(texts(name)):
            return name
    flags = [name for name in names if plain(name) in FLAGS and texts(name) - {""}]
    if len(flags) > 1:
        raise InputError(f"{where}: {quoted(flags)} all tell splits; keep one, or give a column split")
    for name in flags:
        if wrong := sorted(value for value in texts(name) if split_flagged(plain(name), value) is None):
            raise InputError(f"{where}: {name}={wrong[0]!r} is neither yes nor no; give True or False, or leave it out")
        return name
    known = {word for words in KNOWN.values() for word in words}
    others = [name for name in names if plain(name) not in known]
    several = [n for n in others if name_splits(texts(n)) and len({*map(split_named, texts(n) - {""})}) > 1]
    if len(several) == 1:
        return several[0]
    return ""


def refuse_doubtful(where: str, left: Iterable[str], texts: Callable[[str], set[str]]) -> None:
    """Refuse a column of yes and no that is called as a split and was taken for nothing, such as `valid` or `test`: it
    may tell the held-out images.

    Args:
        where, texts: as in `split_column`.
        left: the columns that are not read.
    """
    for name in left:
        if (split := split_named(name)) and are_flags(texts(name)):
            what = {"train": "training", "val": "held-out", "test": "test"}[split]
            raise InputError(
                f"{where}: does {name!r}, of yes and no, tell the {what} images? Call it "
                f"is_{'valid' if split == 'val' else split} if so, else take it away"
            )


def name_splits(texts: set[str]) -> bool:
    """Whether all values that there are name splits."""
    return bool(texts - {""}) and all(map(split_named, texts - {""}))


def is_true(value: object) -> bool:
    """Whether a cell of 0 and 1 says yes."""
    return str(value).strip().casefold() in TRUE


def are_flags(texts: set[str]) -> bool:
    """Whether values are nothing but 0 and 1, or yes and no."""
    return bool(texts) and {text.casefold() for text in texts} <= (TRUE | FALSE) - {""}


def columns_by_content(table: Table) -> Columns:
    """The columns of a list without a header: paths end like an image's, splits name splits, the one left is the label.

    A column that numbers the rows, as in MXNet's lists, is left.
    """
    cells = cells_of(table)
    paths = columns_of_paths(cells)
    splits = [name for name, values in cells.items() if values and all(map(split_named, values))]
    rest = [name for name in table.columns if name not in paths and name not in splits]
    counters = [n for n in rest if len(set(cells[n])) == len(table.rows) > 1 and all(v.isdecimal() for v in cells[n])]
    rest = [name for name in rest if name not in counters[:1]]
    if len(paths) != 1 or len(rest) != 1 or len(splits) > 1:
        first = ", ".join(map(str, table.rows[0][1].values()))
        raise InputError(
            f"{table.where}: its first line is {first!r}, which names no columns, and which is the label is not clear; "
            f"write a first line such as path,label. A list needs {NEEDS}"
        )
    left = tuple(name for name in table.columns if name not in (*paths, *splits, *rest))
    return Columns(paths[0], rest[0], split=splits[0] if splits else "", left=left)


def path_column(table: Table, given: str) -> str:
    """The column of a list that names the images, whatever else it has.

    Args:
        table: the list.
        given: by `--path-column`; "" to find it by its name or, without a header, by its content.

    Raises:
        InputError: there is none, or several might be.
    """
    if table.header or given:
        names = [name for name in table.columns if name]
        return asked(table.where, names, given, "--path-column") or path_by_name(table, names)
    return only(table.where, table.columns, columns_of_paths(cells_of(table)), "path", "--path-column")


def path_by_name(table: Table, names: Sequence[str]) -> str:
    """The column of paths by its name or, where none has such a name, the one of image files, as fastai's `name`."""
    found = choose_any(names, "path")
    if not found:
        refuse_misspelt(table.where, names, {"path": ""})
        found = [name for name in columns_of_paths(cells_of(table)) if name in names]
    return only(table.where, names, found, "path", "--path-column")


def cells_of(table: Table) -> dict[str, list[str]]:
    """The texts in each column."""
    return {name: [str(row.get(name) or "").strip() for _, row in table.rows] for name in table.columns}


def columns_of_paths(cells: Mapping[str, Sequence[str]]) -> list[str]:
    """The columns most of whose cells end as an image's name does, or are URLs."""
    return [name for name, values in cells.items() if sum(is_image(v) or "://" in v for v in values) > len(values) / 2]


def refuse_misspelt(where: str, names: Sequence[str], roles: Mapping[str, str]) -> None:
    """Refuse a column that is almost one of the known ones which are missing; others are no concern.

    The first letters must agree, for a height is no weight.
    """
    missing = [role for role, found in roles.items() if not found]
    missing += ["label"] * ("path" in missing)
    for name in names:
        for role in difflib.get_close_matches(name.lower(), missing, n=1, cutoff=0.8):
            if name[:1].lower() == role[0] and not any(plain(name) in known for known in KNOWN.values()):
                raise InputError(f"{where}: column {name!r} is not known; did you mean {role}?")
