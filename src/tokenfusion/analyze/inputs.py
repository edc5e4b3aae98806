"""What is analysed: a trained run or an untrained name, and the images to look at it with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tokenfusion.classifier import Classifier
from tokenfusion.data.decoded import Images
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError
from tokenfusion.evaluate import output_of_class
from tokenfusion.files import refuse_inside
from tokenfusion.judged import open_judged, read_part
from tokenfusion.recipe import Recipe, load_recipe


def output_folder(run_or_model: str, data: str | None, out: Path | None, name: str) -> Path:
    """Where results go: `out` where given, else RUN/name, or `name` for a model's name.

    Raises:
        InputError: it lies inside the images.
    """
    run = Path(run_or_model)
    folder = out or (run / name if run.is_dir() else Path(name))
    refuse_inside_images(folder, run)
    if data:
        refuse_inside(folder, data)
    return folder


def refuse_inside_images(folder: Path, run: Path) -> None:
    """Refuse to write into the images that a run was trained on, InputError."""
    if (run / "recipe.toml").exists():
        refuse_inside(folder, str(load_recipe(run / "recipe.toml").get("data", "")))


def refuse_multi_label(multi_label: bool, name: str) -> None:
    """Refuse images with any number of classes: what is analysed is the decision for one of them.

    Raises:
        InputError: it is such a run, or such data.
    """
    if multi_label:
        raise InputError(
            f"{name} has any number of classes an image, and an analysis is of the decision for one; "
            "give a run, or data, of one class an image"
        )


def open_run_or_model(
    run_or_model: str, data: str | None, num_images: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Classifier, Images]:
    """A classifier and some images for it, spread evenly over the data and in random order, always the same.

    Labels are numbers of the model's outputs.

    Args:
        run_or_model: a run folder, or a model's name, which is built with random weights for the data's classes.
        data: labelled images; of a run its own held-out ones when not given.
        num_images: how many to read; all if there are fewer.
        progress: called with (images read, images in all).

    Raises:
        InputError: no such run or model, no data for a bare name, or data of classes that a run does not know.
    """
    if num_images < 1:
        raise InputError(f"num_images={num_images} shows nothing; give 1 or more")
    run = Path(run_or_model)
    if run.is_dir():
        classifier, recipe = Classifier.load(run), Recipe(**load_recipe(run / "recipe.toml"))
        refuse_multi_label(classifier.multi_label, run_or_model)
        source, _, own = open_judged(run, recipe, data)
    elif data:
        own, recipe, source = False, Recipe(), open_dataset(data)
        refuse_multi_label(source.multi_label, data)
        classifier = Classifier.create(run_or_model, source.classes)
    else:
        raise InputError(f"DATA is missing: {run_or_model} is no run folder and has no images of its own; name some")
    to_output = output_of_class(source, classifier.classes)
    images, _, _ = read_part(source, run, recipe, own=own, most=num_images, progress=progress)
    images = images.subset(np.random.default_rng(0).permutation(len(images)))  # the first few are of any class
    images.labels = to_output[images.labels]
    return classifier, images
