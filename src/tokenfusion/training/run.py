"""A run from its first call to its weights: start or resume, prepare, loop, ship."""

from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from tokenfusion.checkpoint import load_description, load_tensors
from tokenfusion.classifier import Classifier
from tokenfusion.compiled import require_compiler
from tokenfusion.data.decode import damaged_in_words
from tokenfusion.data.exclude import EXCLUDED
from tokenfusion.data.kinds import require_place, resolved
from tokenfusion.errors import InputError
from tokenfusion.evaluate import calibrated
from tokenfusion.features import on_images
from tokenfusion.files import lock_folder, own_folder, refuse_inside, write_text
from tokenfusion.hardware import default_device, keep_freed_memory
from tokenfusion.models import create_model, require_known
from tokenfusion.models.pretrained import find_weights, weighted_names
from tokenfusion.places import require_begun, require_no_run, resume_command
from tokenfusion.recipe import FIELDS, Recipe, dump_recipe, load_recipe
from tokenfusion.trained_on import TRAINED_ON, found_again, load_trained_on, save_trained_on
from tokenfusion.training.distributed.process_group import processes, versions
from tokenfusion.training.distributed.world import READ, World
from tokenfusion.training.identity import Identity, differences, first_key, run_identity
from tokenfusion.training.log import Log, send_rest
from tokenfusion.training.loggers import require_installed
from tokenfusion.training.loop import Interrupted, fit
from tokenfusion.training.prepare import begin, prepare
from tokenfusion.training.progress import Display, Listener, Update
from tokenfusion.training.saved import START, is_saved
from tokenfusion.training.setup import Run, Setup
from tokenfusion.training.stages import forget_stages, train_in_stages
from tokenfusion.training.state import TrainState, read_progress
from tokenfusion.training.times import TIMES, times_in_words
from tokenfusion.training.watch import Measure

BEFORE_THE_FIRST_STEP = ("split.csv", "skipped.csv", "lr_range.json", "probe.json", TIMES, EXCLUDED, TRAINED_ON)
"""What a run folder may hold beside its recipe when training begins."""
SAME_COMMAND = "start every process with the same command and the same installation"
SAME_DATA = "let every process see the same data and the same run folder"


def train(recipe: Recipe, out: str | Path, *, progress: Listener | None = None) -> Classifier:
    """Train a new run, silently, in any thread.

    In the main thread, Ctrl-C and SIGTERM save the run after the step under way and raise `training.Interrupted`;
    `tokenfusion train --resume OUT` goes on with it.

    Args:
        recipe: what to train, on what, and how: the options of `tokenfusion train`.
        out: the run folder to write; it must not hold a run or anything else.
        progress: called after each step and after each epoch with a `training.Update`: numbers of steps and epochs, the
            running loss and score, images a second, and after an epoch its `record`, held-out loss and score included.
            What it raises ends the training.

    Returns:
        The trained classifier, as `Classifier.load(out)` gives it.

    Raises:
        InputError: the folder is taken, or the recipe or its data cannot be used.

    Example:
        classifier = tokenfusion.train(tokenfusion.Recipe("photos/", epochs=10), "runs/photos")
    """
    return start(recipe, Path(out), Console(quiet=True), listener=progress)


def start(
    recipe: Recipe, folder: Path, console: Console, measure: Measure | None = None, listener: Listener | None = None
) -> Classifier:
    """Train a new run.

    Args:
        recipe: what to train, on what, and how.
        folder: to write; it must not hold a run or anything else.
        console: where to show progress.
        measure: what `Recipe.every` is about, such as `analyze.collapse.watch_collapse`.
        listener: told of every step and epoch as well.

    Returns:
        The trained classifier.

    Raises:
        InputError: the folder is taken, or the recipe or its data cannot be used.
        Interrupted: Ctrl-C, once the state is saved.
    """
    with processes() as world, ExitStack() as held:
        console.quiet = console.quiet or not world.is_first
        world.require_same("recipe", versions() | vars(recipe), SAME_COMMAND)
        with world.together("folder"):
            require_known(recipe.model)
            recipe = replace(recipe, data=resolved(recipe.data))  # so that the run can be resumed from anywhere
            if world.is_first:
                require_unused(folder)
                refuse_inside(folder, recipe.data)
                require_weights(recipe, console)
                held.enter_context(own_folder(folder))
                held.push(partial(leave_nothing, folder))
                claim(folder, recipe)
        return to_its_end(recipe, Run(folder, console, world), measure, listener)


def require_weights(recipe: Recipe, console: Console) -> None:
    """Fetch the pretrained weights that a recipe names and load them once, so that bad ones leave no folder behind.

    Raises:
        InputError: they cannot be had, or do not fit the model.
    """
    if recipe.pretrained:
        names = weighted_names(recipe.model)
        find_weights(recipe.model, recipe.pretrained, partial(console.print, highlight=False, soft_wrap=True))
        console.print(f"loading the weights of {' and '.join(names)}", highlight=False, soft_wrap=True)
        create_model(
            recipe.model,
            num_classes=2,  # any number: some weights have none
            in_chans=recipe.in_chans,
            img_size=recipe.img_size or None,  # type: ignore[arg-type]
            pretrained=recipe.pretrained,
        )


def require_unused(folder: Path) -> None:
    """Refuse a folder that holds a run, or anything else.

    Raises:
        InputError: it does.
    """
    require_no_run(folder)
    if folder.exists() and not is_unused(folder):
        raise InputError(f"{folder} exists and is not an empty folder; give another --out")


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a new run's folder, which is locked.

    Raises:
        InputError: it was taken meanwhile, or cannot be written.
    """
    require_unused(folder)
    try:
        for name in BEFORE_THE_FIRST_STEP:  # of a run that was refused
            (folder / name).unlink(missing_ok=True)
        write_text(folder / "recipe.toml", dump_recipe(recipe))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; give another --out") from error


def leave_nothing(folder: Path, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
    """Remove what a run wrote that is refused before its first step; what is called as a block of code ends."""
    with suppress(OSError):  # as where it can be neither read nor written any more
        if kind is not None and issubclass(kind, InputError) and is_unused(folder):
            for name in ("recipe.toml", *BEFORE_THE_FIRST_STEP):
                (folder / name).unlink(missing_ok=True)


def is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or holds no more than a run that was refused before its first step."""
    ours = {"recipe.toml", *BEFORE_THE_FIRST_STEP}
    left = {".lock", *(f".{name}.tmp" for name in ours)}  # where a process was killed
    names = {path.name for path in folder.iterdir()} - left
    if not names:
        return True
    refused = names <= ours and "recipe.toml" in names
    return refused and load_recipe(folder / "recipe.toml").keys() == set(FIELDS)


LOADERS_END = 10.0
"""Seconds in which loader processes end whose trainer was killed; PyTorch's look after it every 5."""


def resume(
    folder: Path,
    console: Console,
    measure: Measure | None = None,
    listener: Listener | None = None,
    *,
    data: str = "",
    root: str = "",
) -> None:
    """Go on with a run that was interrupted; of one that is finished, send its `loggers` what they lack.

    Args:
        folder: that `start` wrote.
        console, measure, listener: as in `start`.
        data, root: where its images are now, if they have moved; taken where names, labels and pixels agree.

    Raises:
        InputError: not a run, of a newer version, damaged, or its data is gone or has changed.
        Interrupted: Ctrl-C, once the state is saved.
    """
    with processes() as world, ExitStack() as held:
        console.quiet = console.quiet or not world.is_first
        with world.together("folder"):
            recipe, finished = recipe_of(folder), (folder / "model.safetensors").exists()
            if data or root:
                recipe = replace(recipe, data=resolved(data or recipe.data), root=root or recipe.root)
            if data or not finished:
                require_place(recipe.data, f"{resume_command(folder)} --data NEW")
            if world.is_first and not finished:
                held.enter_context(lock_folder(folder, grace=LOADERS_END))
            if world.is_first and not data and recipe.data != load_recipe(folder / "recipe.toml")["data"]:
                console.print(f"the images were moved along with the run, to {recipe.data}")
        world.require_same("recipe", versions() | vars(recipe) | {"finished": finished}, SAME_COMMAND)
        run = Run(folder, console, world)
        if not finished:
            to_its_end(recipe, run, measure, listener)
            return
        run.say(f"{folder} is finished already")
        if world.is_first:
            if data:
                require_its_images(prepare(recipe, run, measure))
            note_data(folder, recipe)
            send_rest(folder, asdict(recipe), run.say)


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run that this version can go on with; data that was moved along with the run is found again.

    Raises:
        InputError: it is no run, or one of a newer version.
    """
    path = folder / "recipe.toml"
    require_begun(folder)
    if (folder / "model.json").exists():
        load_description(folder)  # refuses a run of a newer version
    return found_again(Recipe(**load_recipe(path)), folder)


def require_its_images(setup: Setup) -> None:
    """Refuse images that are not those that a finished run was trained on and judged by.

    Raises:
        InputError: naming what differs, or that nothing is left to compare with.
    """
    require_same_run(setup)
    known, images = load_trained_on(setup.run.folder), setup.batches.images
    met = known.met(images)
    compared = is_saved(setup.run.checkpoint) and not setup.recipe.tune  # by what was saved
    if not compared if met is None else not (met.all() and known.are_held_out(setup.held_out)):
        raise InputError(
            f"{setup.recipe.data} does not have the images that {setup.run.folder} was trained on, or it is not known "
            "which these are; give the data that it was trained on"
        )


def note_data(folder: Path, recipe: Recipe) -> None:
    """Where a recipe's images were moved, say so in the recipe of the run, below the comments that stand above it."""
    path = folder / "recipe.toml"
    noted = load_recipe(path)
    if (noted["data"], noted.get("root", "")) != (recipe.data, recipe.root):
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        write_text(path, "\n".join([*comments, dump_recipe(recipe)]))


def to_its_end(recipe: Recipe, run: Run, measure: Measure | None, listener: Listener | None) -> Classifier:
    """Bring a run from whatever is saved of it to its end."""
    world = run.world
    keep_freed_memory()
    require_installed(recipe.loggers)
    refuse_alone(recipe, world)
    if recipe.compile:
        run.say("the first step will wait for the compiler, a minute or more")
        require_compiler(default_device())
    with world.together("data", READ):
        setup = prepare(recipe, run, measure)
        identity = require_same_run(setup)
    saved = is_saved(run.checkpoint)
    world.require_same("images", {"a checkpoint": saved} | identity["images"], SAME_DATA)
    if world.is_first:
        note_data(run.folder, setup.recipe)
        save_trained_on(run.folder, setup.recipe, setup.batches.images, setup.held_out)
    with Display(run.console, setup.loss.train_score) as display:

        def tell(update: Update) -> None:
            display(update)
            if listener:
                listener(update)

        if setup.recipe.tune:
            classifier = ship(*train_in_stages(setup, identity, tell))
            forget_stages(run.folder)
            run.say(times_in_words(run.folder))
            return classifier
        return ship(setup, train_at_once(setup, identity, tell))


def train_at_once(setup: Setup, identity: Identity, tell: Listener) -> TrainState:
    """All weights from the images, by one process or several."""
    world = setup.run.world
    state = begin(setup, identity)
    world.require_same("checkpoint", {"steps done": state.progress.step}, SAME_DATA)
    log = None
    try:
        if world.is_first:
            log = Log(setup.run.folder, state.progress.records, asdict(setup.recipe), setup.run.say)
        fit(setup, state, tell, log)
    except Interrupted:
        if world.is_first:
            raise
        raise SystemExit(130) from None  # the first process says it
    finally:
        setup.batches.close()
        setup.run.say(damaged_in_words(setup.batches.damaged))  # of shards, which nobody looked at before
        if log:
            log.close(state.progress.finished)
    return state


def refuse_alone(recipe: Recipe, world: World) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        InputError: `auto`, for which each would measure something else, or matrices in pieces for Muon, or a loss of
            each side of a model in pieces; or a compiled step, whose gradients come all at once.
    """
    if world.store is not None and recipe.compile:
        raise InputError(
            "compile=True is for one process: several exchange gradients while the backward pass goes on, which a "
            "compiled one leaves no place for; train without torchrun, or leave out --compile"
        )
    if world.store is not None and recipe.parallel == "fsdp" and recipe.optimizer == "muon":
        raise InputError(
            "optimizer=muon orthogonalises whole matrices, and parallel=fsdp spreads them over the processes; "
            "give --optimizer adamw, or --parallel ddp"
        )
    if world.store is not None and recipe.parallel == "fsdp" and recipe.side_loss:
        raise InputError(
            f"side_loss={recipe.side_loss:g} asks the transformer a second time, for which parallel=fsdp has given its "
            "weights back; give --parallel ddp, or leave out --side-loss"
        )
    measured = [name for name in recipe.autos if name != "epochs"]  # whose end all processes see alike
    if world.size > 1 and measured:
        name = measured[0]
        raise InputError(
            f"{name}=auto is chosen by a single process; train without torchrun until the first step and resume with "
            f"it, or give --{name.replace('_', '-')} a number"
        )


def require_same_run(setup: Setup) -> Identity:
    """Refuse to go on with images or a recipe that are not those that the run began with.

    Returns:
        What the run is trained on and by.

    Raises:
        InputError: naming what differs; or what is saved is damaged.
    """
    run, training, held_out = setup.run, setup.batches.images, setup.held_out
    what = (setup.recipe, setup.classifier.classes, training, held_out)
    now = run_identity(*what)
    if setup.recipe.tune:
        if (run.folder / START).exists():
            refuse_changes(differences(load_tensors(run.folder / START)[1], now), run)
    elif is_saved(run.checkpoint):
        began = read_progress(run.checkpoint)
        steps = setup.batches.steps_per_epoch
        if began.step_in_epoch > steps or began.step > (began.epoch + 1) * steps:
            raise InputError(
                f"{run.checkpoint} is damaged: {began.step} steps are more than {began.epoch + 1} epochs of {steps}; "
                f"delete the folder {run.checkpoint.parent}, and --resume starts anew"
            )
        if began.identity:
            changed = differences(began.identity, now)
        else:
            changed = [] if began.key == first_key(*what) else ["its images or fields of its recipe"]
        refuse_changes(changed, run)
    return now


def refuse_changes(changed: list[str], run: Run) -> None:
    """Refuse to go on where something is not as it was when the run began."""
    if changed:
        raise InputError(
            f"{run.folder} cannot go on: {', '.join(changed)} are not those that the run began with; put them back "
            f"(fields stand in {run.folder / 'recipe.toml'}), or train a new run"
        )


def ship(setup: Setup, state: TrainState) -> Classifier:
    """Write the weights that a run ends with."""
    shipped = replace(setup.classifier, model=state.gather_shipped().eval())
    if state.best:
        shipped.model.load_state_dict(state.best)
    if not state.world.is_first:
        return on_images(shipped)
    shipped = on_images(calibrated(shipped, setup.held_out, setup.recipe.workers))
    shipped.save(setup.run.folder)
    return shipped
