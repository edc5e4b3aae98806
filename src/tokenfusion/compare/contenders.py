"""Who is compared: models by name, means of their predictions, and the controls of fused models."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenfusion.errors import InputError
from tokenfusion.names import split_names
from tokenfusion.recipe import Recipe

ROLES = {
    "cnn": "CNN parent",
    "vit": "transformer parent",
    "wide_cnn": "widened CNN parent",
    "wide_vit": "widened transformer parent",
}
"""Fields of `Controls` and what they are called."""
Remark = dict[str, str]
"""What is said of a control: `model`, `role`, `reason`."""


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        name: as `create_model` takes it, or `mean(A,B)`.
        role: "model", or which control of which model it is.
        members: of a mean of predictions, which is not trained itself; empty for a model.
    """

    name: str
    role: str
    members: tuple[str, ...] = ()


def members_of(name: str) -> tuple[str, ...]:
    """The models whose predictions `mean(A,B)` averages; none for the name of a model.

    Raises:
        InputError: fewer than two, or one that is a mean itself.
    """
    inner = re.fullmatch(r"mean\((.*)\)", name)
    members = tuple(split_names([inner[1]])) if inner else ()
    if inner and (len(members) < 2 or any(members_of(member) for member in members)):
        raise InputError(f"{name} is no mean of two or more models; give mean(A,B) with the names of models")
    return members


def slug(name: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name).rstrip("-")


def choose_contenders(
    names: Sequence[str], recipe: Recipe, num_classes: int, controls: bool
) -> tuple[tuple[Contender, ...], list[Remark], list[Remark]]:
    """The models asked for, then what they must be compared with; each once, with all the roles that it has.

    Args:
        names: of models, or means of them.
        recipe: gives the images' channels and size.
        num_classes: of the data.
        controls: whether to add the parents of fused models, the parents widened to the fused model's cost, and the
            mean of the parents' predictions.

    Returns:
        The contenders; the controls that are missing; what is to be said of others. The last two as `Remark`.

    Raises:
        InputError: no name, two names that give one folder, a mean that is none, or controls of no fused model.
    """
    if not names:
        raise InputError("models is empty; name at least one, such as --models tokenfusion_early_micro,resnet_micro")
    roles: dict[str, list[str]] = {name: ["model"] for name in names}

    def add(name: str, role: str) -> None:
        known = roles.setdefault(name, [])
        if role not in known and "model" not in known:
            known.append(role)

    missing: list[Remark] = []
    notes: list[Remark] = []
    fused = False
    for name in names:
        for member in members_of(name):
            add(member, f"member of {name}")
    for name in names if controls else ():
        found, absent, said = find_controls(name, recipe, num_classes)
        for role, control in found.items():
            add(control, f"{role} of {name}")
        missing, notes, fused = missing + absent, notes + said, fused or bool(found)
    if controls and not fused:
        raise InputError(f"{', '.join(names)}: none of these fuses two parents; leave out --controls")
    folders: dict[str, str] = {}
    for name in roles:
        other = folders.setdefault(slug(name), name)
        if other != name:
            raise InputError(f"{other} and {name} would share the folder {slug(name)}; compare them in two comparisons")
    return tuple(Contender(name, "; ".join(role), members_of(name)) for name, role in roles.items()), missing, notes


def find_controls(name: str, recipe: Recipe, num_classes: int) -> tuple[dict[str, str], list[Remark], list[Remark]]:
    """A model's controls by role, those that are missing, and notes on others; nothing where it fuses no parents."""
    from tokenfusion.models.controls import controls_of

    if members_of(name):
        return {}, [], []
    size: Any = recipe.img_size or None
    controls = controls_of(name, num_classes=num_classes, in_chans=recipe.in_chans, img_size=size)
    found = {role: getattr(controls, field) for field, role in ROLES.items() if getattr(controls, field)}
    if controls.cnn and controls.vit:
        found["mean of the parents"] = f"mean({controls.cnn},{controls.vit})"
    missing, notes = (
        [{"model": name, "role": ROLES[field], "reason": reason} for field, reason in remarks.items() if found]
        for remarks in (controls.missing, controls.notes)
    )
    return found, missing, notes
