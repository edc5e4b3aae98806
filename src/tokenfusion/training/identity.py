"""What a run must be trained on and by to go on: its images and the fields of its recipe that decide the result."""

import json
from dataclasses import fields, make_dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from tokenfusion.data.decoded import Images
from tokenfusion.recipe import FIELDS, NO_LONGER_KNOWN, Reading, Recipe

Identity = dict[str, Any]

FREE_TO_CHANGE: dict[str, Any] = {
    "workers": 0,
    "save_minutes": 0.0,
    "cache_mb": 0,
    "every": 0,
    "loggers": (),
    "parallel": "ddp",
}
"""Fields that do not decide what a run ends with."""
TOLD_BY_THE_IMAGES = ("data", "exclude", *(field.name for field in fields(Reading)))
"""Fields that say where images lie: the images themselves are compared."""


def run_identity(recipe: Recipe, classes: tuple[str, ...], training: Images, held_out: Images) -> Identity:
    """All that decides what a run ends with, as JSON has it: fields by name, and short names of what images are."""
    images = {"classes": fingerprint(classes)}
    for part, some in (("training", training), ("held-out", held_out)):
        images |= {
            f"names of the {part} images": fingerprint(list(some.names)),
            f"labels of the {part} images": fingerprint(some.labels.tolist()),
            f"pixels of the {part} images": fingerprint(pixels_of(some)),
        }
    images["weights of the images"] = fingerprint(None if training.weights is None else training.weights.tolist())
    return {"recipe": deciding_fields(recipe), "images": images}


def deciding_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that decide what a run ends with, as JSON has them."""
    free = {*FREE_TO_CHANGE, *TOLD_BY_THE_IMAGES}
    values = {name: getattr(recipe, name) for name in FIELDS if name not in free}
    fields: dict[str, Any] = json.loads(json.dumps(values))
    return fields


def differences(began: Identity, now: Identity) -> list[str]:
    """What is not as it was when a run began, in words.

    A field that recipes did not have then was as it is by default; those that they no longer have are `load_recipe`'s.
    """
    fields = deciding_fields(Recipe()) | began["recipe"]
    changed = [
        f"{name}={value!r} (it was {fields[name]!r})" for name, value in now["recipe"].items() if fields[name] != value
    ]
    return changed + [f"the {what}" for what, value in now["images"].items() if began["images"].get(what) != value]


# Runs that began before there was an identity hold a fingerprint of everything, the recipe as Python printed it.


def first_key(recipe: Recipe, classes: tuple[str, ...], training: Images, held_out: Images) -> str:
    """The fingerprint that such a run holds if this is still its recipe, and these are its images."""
    weights = None if training.weights is None else training.weights.tolist()
    parts = [(list(some.names), some.labels.tolist(), pixels_of(some)) for some in (training, held_out)]
    return fingerprint(tuple(classes), *parts, weights, first_recipe(recipe))


FIRST_FIELDS = (
    "data model warm_start_from freeze epochs batch_size accumulate optimizer lr backbone_lr head_lr warmup_epochs "
    "weight_decay clip_grad on_bad_loss max_bad_steps ema patience img_size in_chans crop_scale crop_padding hflip "
    "trivial_augment mixup cutmix mix_prob label_smoothing balance drop_path seed precision parallel "
    "grad_checkpointing workers exclude val_fraction max_skipped max_pixels cache_mb save_minutes every loggers"
)
"""A recipe's fields at that time, in their order."""


def first_recipe(recipe: Recipe) -> object:
    """What Python prints as it printed a recipe then, with the fields that are free to change as they were counted."""
    values = {name: getattr(recipe, name, None) for name in FIRST_FIELDS.split()} | NO_LONGER_KNOWN | FREE_TO_CHANGE
    unmeasured = {"epochs": -(2**31), "batch_size": -(2**31), "lr": -(2.0**31)}  # what "auto" was
    values |= {name: number for name, number in unmeasured.items() if values[name] == "auto"}
    return make_dataclass("Recipe", FIRST_FIELDS.split())(**values)


def fingerprint(*parts: Any) -> str:
    """A short name of some values, equal only where they are."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def pixels_of(images: Images) -> list[int] | None:
    """By what pixels are told: their checksums, or of images that are not read before training, their shards' sizes."""
    if images.checksums is not None:
        return (images.checksums >> np.uint64(32)).tolist()  # the CRC-32 alone, as earlier versions had it
    return images.dataset.shard_sizes
