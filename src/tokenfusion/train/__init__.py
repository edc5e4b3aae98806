"""From a recipe to a run folder with a trained model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from tokenfusion.checkpoint import load_description, resume_command
from tokenfusion.classifier import Classifier
from tokenfusion.data.images import Images, Skipped, read_images, require_every_class, write_skipped
from tokenfusion.data.loader import TrainLoader
from tokenfusion.data.sources import Source, held_out_name, open_source, resolved
from tokenfusion.data.split import Split, choose_split, read_split, write_split
from tokenfusion.data.transforms import Augment
from tokenfusion.errors import InputError
from tokenfusion.files import write_text
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.models.token_fusion import PARENTS, TokenFusion
from tokenfusion.recipe import FIELDS, Recipe, dump_recipe, load_recipe
from tokenfusion.train.display import Display
from tokenfusion.train.fit import CHECKPOINT, Interrupted, Job, fit
from tokenfusion.train.log import Log
from tokenfusion.train.mixing import BatchMixing
from tokenfusion.train.optimizer import make_optimizer
from tokenfusion.train.state import TrainState, fingerprint
from tokenfusion.train.warm_start import refuse_seen, warm_start

__all__ = ["Interrupted", "resume", "start"]

FREE_TO_CHANGE: dict[str, Any] = {"workers": 0, "save_minutes": 0.0, "cache_mb": 0}
"""Fields that do not decide what a run ends with."""


def start(recipe: Recipe, run: Path, console: Console) -> None:
    """Train a new run.

    Args:
        recipe: what to train, on what, and how.
        run: folder to write; it must not hold a run or anything else.
        console: where to show progress.

    Raises:
        InputError: the folder is taken, or the recipe or its data cannot be used.
        Interrupted: Ctrl-C, once the state is saved.
    """
    if (run / "model.json").exists():
        raise InputError(f"{run} holds a run already; go on with `{resume_command(run)}`, or give another --out")
    if run.exists() and not (run.is_dir() and is_unused(run)):
        raise InputError(f"{run} exists and is not an empty folder; give another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        recipe = replace(recipe, data=resolved(recipe.data))  # so that the run can be resumed from anywhere
        write_text(run / "recipe.toml", dump_recipe(recipe))
    except OSError as error:
        raise InputError(f"{run} cannot be written: {error.strerror}; give another --out") from error
    for name in ("split.csv", "skipped.csv"):  # of a run that was refused before its first step
        (run / name).unlink(missing_ok=True)
    train(recipe, run, console)


def is_unused(run: Path) -> bool:
    """Whether a folder is empty, or holds no more than a run that was refused before its first step."""
    names = {path.name for path in run.iterdir()}
    if not names:
        return True
    ours = names <= {"recipe.toml", "split.csv", "skipped.csv"} and "recipe.toml" in names
    return ours and load_recipe(run / "recipe.toml").keys() == set(FIELDS)


def resume(run: Path, console: Console) -> None:
    """Go on with a run that was interrupted; one that is finished is left as it is.

    Args:
        run: the folder that `start` wrote.
        console: where to show progress.

    Raises:
        InputError: not a run, of a newer version, damaged, or its data has changed.
        Interrupted: Ctrl-C, once the state is saved.
    """
    if not (run / "recipe.toml").exists():
        raise InputError(
            f"{run} is not a run (it has no recipe.toml); give the folder that `tokenfusion train --out` wrote"
        )
    if (run / "model.json").exists():
        load_description(run)  # refuses a run of a newer version
    if (run / "model.safetensors").exists():
        console.print(f"{run} is finished already", highlight=False)
        return
    train(Recipe(**load_recipe(run / "recipe.toml")), run, console)


def train(recipe: Recipe, run: Path, console: Console) -> None:
    """Bring a run from whatever is saved of it to its end."""
    keep_freed_memory()
    source = open_source(recipe.data)
    split = split_of(source, recipe, run)
    classifier = build(recipe, source.classes)
    if recipe.warm_start_from and not (run / CHECKPOINT).exists():
        refuse_seen(recipe, source, split)
        warm_start(classifier, recipe.warm_start_from, console)
    training, held_out = read_both(source, split, recipe, run, console)
    state = TrainState(classifier.model, make_optimizer(classifier.model, recipe), recipe.ema, recipe.patience > 0)
    preprocess = classifier.preprocess
    augment = Augment(preprocess.img_size, preprocess.in_chans, recipe.crop_scale, recipe.hflip, recipe.trivial_augment)
    batch_size = recipe.batch_size_for(len(training))
    loader = TrainLoader(training, augment, batch_size=batch_size, seed=recipe.seed, workers=recipe.workers)
    console.print(f"{loader.steps_per_epoch:,} steps an epoch, of {batch_size} images each", highlight=False)
    job = Job(recipe, classifier, loader, BatchMixing(recipe, len(source.classes)), held_out, run)

    images = (source.classes, training.names, held_out.names, training.labels.tolist(), held_out.labels.tolist())
    key = fingerprint(*images, replace(recipe, **FREE_TO_CHANGE))
    job.checkpoint.parent.mkdir(exist_ok=True)
    if job.checkpoint.exists():
        state.load(job.checkpoint)
        if state.progress.key != key:
            raise InputError(
                f"the images of {recipe.data} or the fields of {run / 'recipe.toml'} are not those that the run began "
                "with; put them back, or train a new run"
            )
    else:
        state.progress.key = key
        classifier.save_description(run)

    log = Log(run, state.progress.records)
    steps = recipe.epochs * loader.steps_per_epoch
    try:
        with Display(console, recipe.epochs, steps) as display:
            fit(job, state, display, log)
    finally:
        loader.close()
        log.close()
    if state.best:
        state.shipped.load_state_dict(state.best)
    replace(classifier, model=state.shipped).save_weights(run)


def build(recipe: Recipe, classes: Sequence[str]) -> Classifier:
    """The recipe's model for these classes, from random weights, with the parents frozen that it says.

    Raises:
        InputError: the model cannot be built, or has no parents to freeze.
    """
    torch.manual_seed(recipe.seed)
    classifier = Classifier.create(
        recipe.model,
        classes,
        in_chans=recipe.in_chans,
        img_size=recipe.img_size or None,  # type: ignore[arg-type]
        precision=recipe.precision,
        drop_path=recipe.drop_path,
        crop_pct=recipe.crop_pct,
        max_pixels=recipe.max_pixels,
    )
    model = classifier.model
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]
    if recipe.freeze != "none":
        if not isinstance(model, TokenFusion):
            raise InputError(
                f"freeze={recipe.freeze} needs a CNN and a transformer that are fused, and {recipe.model} is no such "
                "model; leave out --freeze, or give --model fuse(CNN,VIT)"
            )
        model.freeze(*(PARENTS if recipe.freeze == "both" else (recipe.freeze,)))
    return classifier


def split_of(source: Source, recipe: Recipe, run: Path) -> Split:
    """The run's split: the one it wrote before, the data's own, or a new one that is written to the run folder."""
    path = run / "split.csv"
    if path.exists():
        return read_split(path, source)
    split = choose_split(source, recipe.val_fraction, recipe.seed)
    if held_out_name(source) is None:
        write_split(path, source, split)
    return split


def read_both(source: Source, split: Split, recipe: Recipe, run: Path, console: Console) -> tuple[Images, Images]:
    """Decode every image once; set the unreadable ones aside in `skipped.csv`.

    Raises:
        InputError: too many are unreadable, or all of a class.
    """
    console.print(f"reading {len(split.train) + len(split.val):,} images", highlight=False)
    images: list[Images] = []
    skipped: list[Skipped] = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for name, indices in (("train", split.train), ("val", split.val)):
            task = bar.add_task(f"reading {name} images", total=len(indices))
            some, bad = read_images(
                source,
                indices,
                max_pixels=recipe.max_pixels,
                cache_bytes=recipe.cache_mb * 2**20,
                progress=report_to(bar, task),
                split=name,
            )
            images.append(some)
            skipped += bad
    training, held_out = images
    if skipped:
        write_skipped(run / "skipped.csv", skipped)
        console.print(
            f"set aside {len(skipped)} unreadable images; they are listed in {run / 'skipped.csv'}", highlight=False
        )
    require_every_class(training, source.classes)
    refuse_damage(split, training, held_out, skipped, recipe)
    where = "kept in memory" if training.cached else f"over cache_mb={recipe.cache_mb}, so decoded anew each epoch"
    console.print(
        f"{source.ignored} other files ignored; " * bool(source.ignored)
        + f"{len(training):,} training and {len(held_out):,} held-out images of {len(source.classes)} classes, {where}",
        highlight=False,
        soft_wrap=True,
    )
    return training, held_out


def report_to(bar: Progress, task: int) -> Callable[[int, int], None]:
    """A callback that moves a task of a bar to (done, total)."""
    return lambda done, total: bar.update(task, completed=done, total=total)  # type: ignore[arg-type]


def refuse_damage(split: Split, training: Images, held_out: Images, skipped: list[Skipped], recipe: Recipe) -> None:
    """Refuse data of which too much cannot be read."""
    if not skipped:
        return
    first = f"the first is {skipped[0].path}: {skipped[0].reason}"
    unreadable = len(split.train) - len(training)
    if unreadable > recipe.max_skipped * len(split.train):
        raise InputError(
            f"{unreadable} of {len(split.train)} training images are unreadable, "
            f"more than max_skipped={recipe.max_skipped:g} allows ({first}); remove them or raise --max-skipped"
        )
    if not len(held_out):
        raise InputError(f"none of the {len(split.val)} held-out images is readable ({first}); mend or replace them")
