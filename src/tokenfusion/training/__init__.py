"""From a recipe to a run folder with a trained model."""

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenfusion.checkpoint import load_description, resume_command
from tokenfusion.data.augment import Augment
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images
from tokenfusion.data.exclude import EXCLUDED, keep_list
from tokenfusion.data.loader import TrainLoader
from tokenfusion.data.open import open_dataset, resolved
from tokenfusion.data.sampler import Share
from tokenfusion.errors import InputError
from tokenfusion.evaluate import with_tuned_thresholds
from tokenfusion.files import write_text
from tokenfusion.formatting import counted
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.models import require_known
from tokenfusion.recipe import AUTO, FIELDS, Recipe, dump_recipe, load_recipe
from tokenfusion.training.auto import choose_batch_size, choose_lr, dump_chosen, more_than_there_are
from tokenfusion.training.balance import balance_in_words, image_weights, positive_weights, refuse_balance
from tokenfusion.training.build import build
from tokenfusion.training.display import Display
from tokenfusion.training.distributed import READ, World, average_gradients, processes, refuse_alone, versions
from tokenfusion.training.ending import epochs_ahead
from tokenfusion.training.fit import CHECKPOINT, Interrupted, Job, fit
from tokenfusion.training.global_norm import globalize_norms
from tokenfusion.training.log import Log, send_rest
from tokenfusion.training.loggers import require_installed
from tokenfusion.training.mixing import BatchMixing
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.reading import read_both, split_of
from tokenfusion.training.sharded import is_saved, shard
from tokenfusion.training.state import Progress, TrainState, fingerprint
from tokenfusion.training.unreadable import Unreadable
from tokenfusion.training.warm_start import refuse_seen, warm_start
from tokenfusion.training.watch import Measure, Watch, require_measurable

__all__ = ["Interrupted", "build", "resume", "start"]

FREE_TO_CHANGE: dict[str, Any] = {
    "workers": 0,
    "save_minutes": 0.0,
    "cache_mb": 0,
    "every": 0,
    "loggers": (),
    "parallel": "ddp",
}
"""Fields that do not decide what a run ends with."""
BEFORE_THE_FIRST_STEP = ("split.csv", "skipped.csv", "lr_range.json", EXCLUDED)
"""What a run folder may hold beside its recipe when training begins."""
SAME_COMMAND = "start every process with the same command and the same installation"
SAME_DATA = "let every process see the same data and the same run folder"


def start(recipe: Recipe, run: Path, console: Console, measure: Measure | None = None) -> None:
    """Train a new run.

    Args:
        recipe: what to train, on what, and how.
        run: folder to write; it must not hold a run or anything else.
        console: where to show progress.
        measure: what `Recipe.every` is about, such as `analyze.watch.watch_collapse`.

    Raises:
        InputError: the folder is taken, or the recipe or its data cannot be used.
        Interrupted: Ctrl-C, once the state is saved.
    """
    with processes() as world:
        console.quiet = console.quiet or not world.is_first
        world.require_same("recipe", versions() | vars(recipe), SAME_COMMAND)
        with world.together("folder"):
            require_known(recipe.model)
            recipe = replace(recipe, data=resolved(recipe.data))  # so that the run can be resumed from anywhere
            if world.is_first:
                claim(run, recipe)
        train(recipe, run, world, console, measure)


def claim(run: Path, recipe: Recipe) -> None:
    """Make a new run's folder and write the recipe into it.

    Raises:
        InputError: it is taken, or cannot be written.
    """
    if (run / "model.json").exists():
        raise InputError(f"{run} holds a run already; go on with `{resume_command(run)}`, or give another --out")
    if run.exists() and not (run.is_dir() and is_unused(run)):
        raise InputError(f"{run} exists and is not an empty folder; give another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name in BEFORE_THE_FIRST_STEP:  # of a run that was refused
            (run / name).unlink(missing_ok=True)
        write_text(run / "recipe.toml", dump_recipe(recipe))
    except OSError as error:
        raise InputError(f"{run} cannot be written: {error.strerror}; give another --out") from error


def is_unused(run: Path) -> bool:
    """Whether a folder is empty, or holds no more than a run that was refused before its first step."""
    ours = {"recipe.toml", *BEFORE_THE_FIRST_STEP}
    names = {path.name for path in run.iterdir()} - {f".{name}.tmp" for name in ours}  # left where a write was cut off
    if not names:
        return True
    refused = names <= ours and "recipe.toml" in names
    return refused and load_recipe(run / "recipe.toml").keys() == set(FIELDS)


def resume(run: Path, console: Console, measure: Measure | None = None) -> None:
    """Go on with a run that was interrupted; of one that is finished, send its `loggers` what they lack.

    Args:
        run: the folder that `start` wrote.
        console: where to show progress.
        measure: as in `start`.

    Raises:
        InputError: not a run, of a newer version, damaged, or its data has changed.
        Interrupted: Ctrl-C, once the state is saved.
    """
    with processes() as world:
        console.quiet = console.quiet or not world.is_first
        with world.together("folder"):
            recipe = recipe_of(run)
        finished = (run / "model.safetensors").exists()
        world.require_same("recipe", versions() | vars(recipe) | {"finished": finished}, SAME_COMMAND)
        if finished:
            console.print(f"{run} is finished already", highlight=False)
            if world.is_first:
                send_rest(run, asdict(recipe), partial(console.print, highlight=False, soft_wrap=True))
        else:
            train(recipe, run, world, console, measure)


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run that this version can go on with.

    Raises:
        InputError: it is no run, or one of a newer version.
    """
    if not (run / "recipe.toml").exists():
        raise InputError(
            f"{run} is not a run (it has no recipe.toml); give the folder that `tokenfusion train --out` wrote"
        )
    if (run / "model.json").exists():
        load_description(run)  # refuses a run of a newer version
    return Recipe(**load_recipe(run / "recipe.toml"))


def train(recipe: Recipe, run: Path, world: World, console: Console, measure: Measure | None = None) -> None:
    """Bring a run from whatever is saved of it to its end."""
    keep_freed_memory()
    require_installed(recipe.loggers)
    refuse_alone(world, recipe)
    with world.together("data", READ):
        job, key = prepare(recipe, run, world, console, measure)
    world.require_same("images", {"a checkpoint": is_saved(job.checkpoint)} | contents(job), SAME_DATA)
    state = begin(job, key, world, console)
    world.require_same("checkpoint", {"steps done": state.progress.step}, SAME_DATA)
    say = partial(console.print, highlight=False, soft_wrap=True)
    log = Log(run, state.progress.records, asdict(job.recipe), say) if world.is_first else None
    epochs = epochs_ahead(job.recipe, Progress())
    try:
        with Display(console, epochs, epochs * job.loader.steps_per_epoch, job.loss.train_score) as display:
            fit(job, state, display, log)
    except Interrupted:
        if world.is_first:
            raise
        raise SystemExit(130) from None  # the first process says it
    finally:
        job.loader.close()
        if log:
            log.close(state.progress.finished)
    ship(job, state)


def contents(job: Job) -> dict[str, str]:
    """Short names of the images' paths and labels."""
    parts = {"training": job.loader.images, "held-out": job.held_out}
    return {f"{part} images": fingerprint(some.names, some.labels.tolist()) for part, some in parts.items()}


def prepare(recipe: Recipe, run: Path, world: World, console: Console, measure: Measure | None) -> tuple[Job, str]:
    """Read the data and build the model.

    Returns:
        What is trained, and a fingerprint of the data and the recipe.

    Raises:
        InputError: the data or the model cannot be used.
    """
    if recipe.exclude and world.is_first and not (run / EXCLUDED).exists():
        keep_list(run, recipe.exclude)
    source = open_dataset(recipe.data, recipe.exclude, run)
    if source.excluded:
        console.print(source.excluded, highlight=False)
    refuse_balance(recipe, source)
    split = split_of(source, recipe, run, world)
    classifier = build(recipe, source.classes, source.multi_label)
    require_measurable(recipe, measure, classifier)
    augment = Augment.from_recipe(recipe, classifier.preprocess.img_size)
    if recipe.warm_start_from and not is_saved(run / CHECKPOINT):
        refuse_seen(recipe, source, split)
        warm_start(classifier, recipe.warm_start_from, console)
    if world.size > 1:
        globalize_norms(classifier.model)
    training, held_out = read_both(source, split, recipe, run, world, console)
    asked, say = recipe, partial(console.print, highlight=False, soft_wrap=True)
    for line in balance_in_words(training, recipe):
        say(line)
    training.weights = image_weights(training, recipe)
    if "batch_size" in recipe.autos:
        recipe = choose_batch_size(recipe, len(source.classes), len(training), say)
    loader = make_loader(recipe, augment, training, run, world, console)
    watch = Watch.of(recipe, measure, classifier, held_out)
    mixing, positive = BatchMixing(recipe, len(source.classes)), positive_weights(training, recipe)
    job = Job(recipe, classifier, loader, mixing, held_out, run, watch=watch, positive_weights=positive)
    if "lr" in recipe.autos:
        recipe = choose_lr(job, say)
        job = replace(job, recipe=recipe)
    if recipe != asked:
        write_text(run / "recipe.toml", dump_chosen(recipe, asked))
    return job, key_of(source, training, held_out, recipe)


def make_loader(
    recipe: Recipe, augment: Augment, training: Images, run: Path, world: World, console: Console
) -> TrainLoader:
    """The loader of this process's share of every batch."""
    batch_size = recipe.batch_size_for(len(training), world.size)
    loader = TrainLoader(
        training,
        augment,
        batch_size=batch_size,
        seed=recipe.seed,
        workers=recipe.workers,
        balanced=recipe.balance == "sampling",
        share=Share(world.rank, world.size, recipe.accumulate, before=bool(recipe.mixup or recipe.cutmix)),
        on_unreadable=Unreadable(run, training, recipe.max_skipped, world.rank, console),
    )
    if batch_size > len(training):
        console.print(more_than_there_are(batch_size, len(training)), highlight=False, soft_wrap=True)
    each = counted(min(batch_size, len(training)), "image")
    console.print(f"{counted(loader.steps_per_epoch, 'step')} an epoch, of {each} each", highlight=False)
    return loader


def key_of(source: Dataset, training: Images, held_out: Images, recipe: Recipe) -> str:
    """A fingerprint of all that decides what a run ends with."""
    weights = None if training.weights is None else training.weights.tolist()
    parts = [
        (some.names, some.labels.tolist(), source.shard_sizes if some.checksums is None else some.checksums.tolist())
        for some in (training, held_out)
    ]
    return fingerprint(source.classes, *parts, weights, replace(recipe, **FREE_TO_CHANGE))


def begin(job: Job, key: str, world: World, console: Console) -> TrainState:
    """A run's state: what is saved of it, or else its first; all processes make it together.

    Raises:
        InputError: what is saved is damaged, or of other data or another recipe.
    """
    recipe, model = job.recipe, job.classifier.model
    keep_best = recipe.patience > 0 and recipe.epochs != AUTO  # an open end ships what its final decay ends with
    if recipe.parallel == "fsdp" and world.store is not None:
        spare, model = model, shard(copy.deepcopy(model))
        network = model
    else:
        spare, network = None, average_gradients(job.classifier, world)
    state = TrainState(model, make_optimizer(model, recipe), recipe.ema, keep_best, network, world, spare)
    job.checkpoint.parent.mkdir(exist_ok=True)
    state.progress.key = key
    if is_saved(job.checkpoint):
        state.load(job.checkpoint)
        console.print(state.change_processes(), end="", highlight=False, soft_wrap=True)
    elif world.is_first:
        job.classifier.save_description(job.run)
    return state


def ship(job: Job, state: TrainState) -> None:
    """Write the weights that a run ends with."""
    shipped = replace(job.classifier, model=state.shipped)
    if state.best:
        shipped.model.load_state_dict(state.best)
    if not state.world.is_first:
        return
    if shipped.multi_label:
        shipped = with_tuned_thresholds(shipped, job.held_out, job.recipe.workers)
        shipped.save_description(job.run)
    shipped.save_weights(job.run)
