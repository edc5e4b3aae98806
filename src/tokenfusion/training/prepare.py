"""From a recipe to all that the loop needs, a function a step: data, split, model, weights, images, loader, objective,
optimizer. The model comes before the images are decoded, so that one that cannot be built is refused in seconds."""

import copy
import shlex
from dataclasses import replace
from functools import partial

import numpy as np

from tokenfusion.checkpoint import load_description, value_range_of, weights_in_words
from tokenfusion.classifier import Classifier
from tokenfusion.compiled import compiled
from tokenfusion.data.augment import Augment
from tokenfusion.data.dataset import Dataset, held_out_name, quoted
from tokenfusion.data.decode import damaged_in_words
from tokenfusion.data.decoded import (
    Images,
    Skipped,
    read_images,
    read_skipped,
    require_every_class,
    unread_images,
    write_skipped,
)
from tokenfusion.data.describe import describe
from tokenfusion.data.exclude import EXCLUDED, keep_list
from tokenfusion.data.loader import TrainLoader, as_it_is
from tokenfusion.data.open import open_dataset
from tokenfusion.data.sampler import Share
from tokenfusion.data.split import Split, choose_split, never_held_out, read_split, write_split
from tokenfusion.data.value_range import with_value_range
from tokenfusion.errors import InputError
from tokenfusion.features import FeatureClassifier, FeatureHead
from tokenfusion.files import write_text
from tokenfusion.formatting import bars, counted
from tokenfusion.hardware import as_dtype
from tokenfusion.models.deepvit import maps_in_words
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.recipe import Recipe, dump_recipe
from tokenfusion.training.auto.batch_size import choose_batch_size, more_than_there_are
from tokenfusion.training.auto.depth import choose_depth
from tokenfusion.training.auto.rate import choose_lr
from tokenfusion.training.distributed.ddp import average_gradients
from tokenfusion.training.distributed.fsdp import shard
from tokenfusion.training.distributed.sync_norm import globalize_norms
from tokenfusion.training.identity import Identity
from tokenfusion.training.linear_start import require_tunable
from tokenfusion.training.model import build
from tokenfusion.training.objective import (
    BatchMixing,
    asked,
    balance_in_words,
    image_weights,
    make_loss,
    refuse_balance,
)
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.recovery import Unreadable
from tokenfusion.training.saved import is_saved
from tokenfusion.training.setup import Run, Setup, begun
from tokenfusion.training.state import SpreadState, TrainState
from tokenfusion.training.warm_start import refuse_seen, warm_start
from tokenfusion.training.watch import Measure, make_watch, require_measurable


def prepare(recipe: Recipe, run: Run, measure: Measure | None) -> Setup:
    """All steps but the last, `make_state`, which comes once what is saved of the run was compared.

    Args:
        recipe: what to train, on what, and how.
        run: its folder holds the recipe, and what an earlier call wrote there.
        measure: what `Recipe.every` is about.

    Raises:
        InputError: the data or the model cannot be used.
    """
    source = open_data(recipe, run)
    parts = settle_split(source, recipe, run)
    source = settle_values(source, parts, recipe, run)
    classifier = build_model(source, recipe, run, measure)
    require_tunable(classifier, source, recipe, run)
    begin_weights(classifier, source, parts, recipe, run)
    training, held_out = decode_images(source, parts, recipe, run)
    balance(training, recipe, run)
    settled = choose_depth(recipe, classifier, training, len(held_out), run) if recipe.tune == "auto" else recipe
    settled, batches = make_loader(training, classifier, settled, run)
    if not recipe.tune:
        say_batches(batches, run)
    setup = make_setup(batches, held_out, classifier, settled, run, measure)
    if "lr" in recipe.autos:
        setup = replace(setup, recipe=choose_lr(setup))
    if setup.recipe != recipe:
        write_text(run.folder / "recipe.toml", dump_measured(setup.recipe, recipe))
    return setup


def dump_measured(recipe: Recipe, given: Recipe) -> str:
    """A recipe as TOML, with a first line that says which of its numbers were chosen by measuring."""
    measured = ", ".join([name for name in given.autos if name not in recipe.autos] + ["tune"] * (given.tune == "auto"))
    return f"# Chosen by measuring: {measured}.\n{dump_recipe(recipe)}"


def open_data(recipe: Recipe, run: Run) -> Dataset:
    """The labelled images, without those that are to be left out."""
    if recipe.exclude and run.world.is_first and not (run.folder / EXCLUDED).exists():
        keep_list(run.folder, recipe.exclude)
    source = open_dataset(recipe.data, recipe.exclude, run.folder, recipe.reading)
    for line in describe(source):
        run.say(line)
    run.say(source.excluded)
    refuse_balance(recipe, source)
    return source


def settle_split(source: Dataset, recipe: Recipe, run: Run) -> Split:
    """Which images are held out: as the run wrote before, as the data says, or newly chosen and written."""
    path = run.folder / "split.csv"
    if path.exists():
        return read_split(path, source)
    parts = choose_split(source, recipe.val_fraction, recipe.seed, recipe.rare_classes)
    if held_out_name(source) is None and run.world.is_first:
        write_split(path, source, parts)
    run.say(never_held_out(source, parts) * (recipe.rare_classes == "train"))
    return parts


def settle_values(source: Dataset, parts: Split, recipe: Recipe, run: Run) -> Dataset:
    """The images with one range of values where they have more than 8 bits: as the run began, or found anew."""
    if begun(run):
        return replace(source, value_range=value_range_of(run.folder))
    source, line = with_value_range(source, parts.train, recipe.value_range, recipe.max_pixels)
    run.say(line)
    return source


def build_model(source: Dataset, recipe: Recipe, run: Run, measure: Measure | None) -> Classifier:
    """The model with random or pretrained weights, BatchNorm over all processes."""
    begins = not begun(run)
    classifier = build(recipe, source.classes, source.multi_label, loaded=begins)
    preprocess = replace(classifier.preprocess, value_range=source.value_range)
    classifier = replace(classifier, preprocess=preprocess)
    if recipe.pretrained and not begins:
        classifier = replace(classifier, began_with=tuple(load_description(run.folder)["began_with"]))
    elif recipe.pretrained:
        run.say(f"starts from {weights_in_words(classifier.began_with)}; a head for other classes starts at random")
    require_measurable(recipe, measure, classifier)
    if run.world.size > 1:
        globalize_norms(classifier.model)
    kind = as_dtype(recipe.precision, classifier.device)
    run.say(maps_in_words(classifier.model, kind, classifier.device))
    return classifier


def begin_weights(classifier: Classifier, source: Dataset, parts: Split, recipe: Recipe, run: Run) -> None:
    """The parents' trained weights in the place of random ones, before the first step."""
    if recipe.warm_start_from and not begun(run):
        refuse_seen(recipe, source, parts)
        warm_start(classifier, recipe.warm_start_from, run.say)


def decode_images(source: Dataset, parts: Split, recipe: Recipe, run: Run) -> tuple[Images, Images]:
    """Training and held-out images: each is decoded once, and the unreadable ones are set aside in `skipped.csv`.

    Training images in shards are left for later: they may be more than can be looked at before training.

    Raises:
        InputError: too many are unreadable, or all of a class.
    """
    run.say(f"reading {counted(len(parts.train) + len(parts.val), 'image')}")
    limits = {"max_pixels": recipe.max_pixels, "cache_bytes": recipe.cache_mb * 2**20}
    images: list[Images] = []
    skipped: list[Skipped] = []
    with bars(run.console) as show:
        for name, indices in (("train", parts.train), ("val", parts.val)):
            if name == "train" and source.shards is not None:
                source.reader.require_room()
                images.append(unread_images(source, indices, recipe.max_pixels))
                continue
            progress = partial(show, f"reading {name} images")
            some, bad = read_images(source, indices, **limits, progress=progress, split=name)
            images.append(some)
            skipped += bad
    training, held_out = images
    if not training.checked:
        met_before = read_skipped(run.folder / "skipped.csv")
        skipped += [image for image in met_before if image.split == "train"]
    if skipped and run.world.is_first:
        write_skipped(run.folder / "skipped.csv", skipped)
        run.say(f"set aside {counted(len(skipped), 'unreadable image')}, listed in {run.folder / 'skipped.csv'}")
    run.say(damaged_in_words(training.damaged | held_out.damaged))
    run.say(copies_in_words(training, held_out))
    require_every_class(training, source.classes, skipped)
    refuse_damage(parts, training, held_out, skipped, recipe)
    where = "kept in memory" if training.cached else f"over cache_mb={recipe.cache_mb}, so decoded anew each epoch"
    where = where if training.checked else "in shards, decoded as they are drawn"
    numbers = f"{len(training):,} training and {counted(len(held_out), 'held-out image')}"
    run.say(f"{numbers} of {counted(len(source.classes), 'class')}, {where}")
    return training, held_out


def copies_in_words(training: Images, held_out: Images) -> str:
    """A warning of held-out images that have the very pixels of training images, which flatters all figures; "" where
    there are none, or training images lie in shards and are not looked at before."""
    if training.checksums is None or held_out.checksums is None:
        return ""
    same = np.flatnonzero(np.isin(held_out.checksums, training.checksums))
    if not len(same):
        return ""
    names = quoted(held_out.names[index] for index in same[:3])
    return (
        f"warning: {counted(len(same), 'held-out image')} with the very pixels of a training image, which flatters the "
        f"result: {names}{', ...' * (len(same) > 3)}; `tokenfusion check` finds these and nearly alike ones, and its "
        "list leaves them out by --exclude"
    )


def refuse_damage(parts: Split, training: Images, held_out: Images, skipped: list[Skipped], recipe: Recipe) -> None:
    """Refuse data of which too much cannot be read."""
    if not skipped:
        return
    first = "; ".join(f"{image.path}: {image.reason}" for image in skipped[:5]) + " ..." * (len(skipped) > 5)
    unreadable, allowed = len(parts.train) - len(training), recipe.may_skip(len(parts.train))
    if unreadable > allowed:
        raise InputError(
            f"{unreadable} of {len(parts.train):,} training images are unreadable, more than the {allowed} that "
            f"max_skipped={recipe.max_skipped:g} allows ({first}); mend them, or leave out with --exclude "
            f"what `tokenfusion check {shlex.quote(recipe.data)}` finds, or raise --max-skipped"
        )
    if not len(held_out):
        raise InputError(f"none of the {len(parts.val)} held-out images is readable ({first}); mend or replace them")


def balance(training: Images, recipe: Recipe, run: Run) -> None:
    """How much each training image's loss counts, by its own weight and the recipe's balance of classes."""
    for line in balance_in_words(training, recipe):
        run.say(line)
    training.weights = image_weights(training, recipe)


def make_loader(training: Images, classifier: Classifier, recipe: Recipe, run: Run) -> tuple[Recipe, TrainLoader]:
    """Augmented batches, this process's share of each, and the recipe with their size."""
    if "batch_size" in recipe.autos:
        recipe = choose_batch_size(recipe, len(classifier.classes), len(training), run.say)
    batch_size = recipe.batch_size_for(len(training), run.world.size)
    batches = TrainLoader(
        training,
        as_it_is
        if isinstance(classifier, FeatureClassifier)
        else Augment.from_recipe(recipe, classifier.preprocess.img_size),
        batch_size=batch_size,
        seed=recipe.seed,
        workers=recipe.workers,
        balanced=recipe.balance == "sampling",
        repeats=recipe.repeats,
        share=Share(run.world.rank, run.world.size, recipe.accumulate, before=bool(recipe.mixup or recipe.cutmix)),
        on_unreadable=Unreadable(run, training, recipe),
    )
    if batch_size > len(training) and not recipe.tune:
        run.say(more_than_there_are(batch_size, len(training)))
    return recipe, batches


def say_batches(batches: TrainLoader, run: Run) -> None:
    """How long an epoch is."""
    each = counted(batches.batch_size, "image")
    run.say(f"{counted(batches.steps_per_epoch, 'step')} an epoch, of {each} each")


def make_setup(
    batches: TrainLoader,
    held_out: Images,
    classifier: Classifier,
    recipe: Recipe,
    run: Run,
    measure: Measure | None,
) -> Setup:
    """How batches are mixed, what is minimised, and what is measured beside it."""
    mixing = BatchMixing(recipe, len(classifier.classes))
    loss = make_loss(batches.images, recipe)
    watch = make_watch(recipe, measure, classifier, held_out)
    return Setup(recipe, run, classifier, batches, mixing, loss, held_out, watch)


def make_state(setup: Setup) -> TrainState:
    """The last step: the optimiser and the average beside the model, before the first step.

    Processes spread the model over themselves, or exchange gradients; all of them come here together.
    """
    recipe, network = setup.recipe, setup.classifier.model
    world = setup.run.world
    keep_best = recipe.patience > 0 and recipe.epochs != "auto"  # an open end ships what its final decay ends with
    if recipe.parallel == "fsdp" and world.store is not None:
        spread = shard(copy.deepcopy(network))
        optimizer = make_optimizer(spread, recipe)
        return SpreadState(spread, optimizer, recipe.ema, keep_best, spread, world, whole_model=network)
    called = (
        FeatureHead(network)
        if isinstance(network, ProbeFusion) and isinstance(setup.classifier, FeatureClassifier)
        else average_gradients(asked(network, recipe), setup.classifier, world)
    )
    called = compiled(called) if recipe.compile else called
    return TrainState(network, make_optimizer(network, recipe), recipe.ema, keep_best, called, world)


def begin(setup: Setup, identity: Identity) -> TrainState:
    """A run's state: what is saved of it, or else its first; all processes make it together."""
    run, state = setup.run, make_state(setup)
    run.checkpoint.parent.mkdir(exist_ok=True)
    if is_saved(run.checkpoint):
        state.load(run.checkpoint)
        run.say(state.change_processes())
    elif run.world.is_first:
        setup.classifier.save_description(run.folder)
    state.progress.identity, state.progress.key = identity, ""
    return state
