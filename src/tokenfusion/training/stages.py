"""Training in stages, each from where the one before it ended.

    probe    linear classifiers on what both frozen parents see of every image (`linear_start.py`)
    fusion   what fuses, on the tokens that are kept of them, its gates closed at first
    all      every weight, on the images (a linear classifier first, then all weights: arXiv 2202.10054)

A part of the training images is set aside to say which stages are worth it: each is first tried without that part, and
one that names no more of it correctly than what it started from is left out. What is kept is then trained on all
training images. Every stage has a checkpoint of its own, so that a resumed run passes through those that are done.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor, nn

from tokenfusion.checkpoint import load_tensors, load_weights_exactly, save_tensors
from tokenfusion.classifier import Classifier
from tokenfusion.data.augment import Augment
from tokenfusion.data.decoded import Images
from tokenfusion.data.split import choose_split
from tokenfusion.features import Features, keep_features, on_features
from tokenfusion.files import write_json
from tokenfusion.formatting import bars, counted
from tokenfusion.json_files import read_json
from tokenfusion.models.fused_model import PARENTS
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.preset import ON_KEPT_TOKENS
from tokenfusion.recipe import DEPTHS, Depth, Recipe
from tokenfusion.similar import NEAREST, write_nearest
from tokenfusion.training.identity import Identity
from tokenfusion.training.linear_start import fit_start, judge_start
from tokenfusion.training.log import Log
from tokenfusion.training.loop import end_at_start, fit, validate
from tokenfusion.training.prepare import begin, make_loader, make_setup, say_batches
from tokenfusion.training.progress import Listener
from tokenfusion.training.saved import CHECKPOINT, START
from tokenfusion.training.setup import Setup
from tokenfusion.training.state import Record, TrainState
from tokenfusion.training.times import FEATURES, FIT, JUDGE, seconds_until_judged, timed

STAGES: dict[str, tuple[Depth, ...]] = {depth: DEPTHS[1 : 1 + number] for number, depth in enumerate(DEPTHS)}
"""What follows the linear classifier, by the recipe's `tune`."""
IN_WORDS = {"probe": "the linear classifier", "fusion": "fusion on kept tokens", "all": "fine-tuning of all weights"}
ASIDE = 0.2
"""Share of the training images that is set aside."""
JUDGED = "stages.json"
"""What the images that were set aside say of each stage."""
Weights = dict[str, Tensor]


def train_in_stages(setup: Setup, identity: Identity, tell: Listener) -> tuple[Setup, TrainState]:
    """Pass the stages of a recipe.

    Args:
        setup: of training on images; its model has the parents' weights, or is that of a run that goes on.
        identity: what the run is trained on and by.
        tell: told of every step and epoch.

    Returns:
        The last stage that is kept, and what it ended with.

    Raises:
        InputError, Interrupted: as `loop.fit`.
    """
    run, recipe = setup.run, setup.recipe
    model = cast(ProbeFusion, setup.classifier.model).freeze(*PARENTS)
    begins = not (run.folder / START).exists()
    if not begins:
        load_weights_exactly(model, load_tensors(run.folder / START)[0], run.folder / START)
    with timed(run.folder, FEATURES):
        training, held_out = keep_both(setup)
    if begins:
        with timed(run.folder, FIT):
            probe = fit_start(model, training, recipe.tune != "probe", run)
        with timed(run.folder, JUDGE):
            judge_start(model, probe, held_out, run)
            write_nearest(setup.classifier, training, held_out, run.folder / NEAREST)
        setup.classifier.save_description(run.folder)
        (run.folder / START).parent.mkdir(exist_ok=True)
        save_tensors(run.folder / START, model.state_dict(), identity)
    start = weights_of(model)
    kept = choose_stages(setup, training, identity, tell) if STAGES[recipe.tune] else ()
    return train_kept(setup, kept, start, training, held_out, identity, tell)


def keep_both(setup: Setup) -> tuple[Features, Features]:
    """Let the parents look at training and held-out images, and keep what they see."""
    run, recipe, classifier = setup.run, setup.recipe, setup.classifier
    augment = Augment.from_recipe(recipe, classifier.preprocess.img_size)
    count = recipe.views * len(setup.batches.images) + len(setup.held_out)
    run.say(f"both parents look at {counted(count, 'image')}, once; what is kept from before is not looked at again")
    kept = []
    with bars(run.console) as show:
        for name, images, views in (
            ("training", setup.batches.images, recipe.views),
            ("held-out", setup.held_out, 1),
        ):
            kept.append(
                keep_features(
                    classifier,
                    images,
                    views=views,
                    augment=augment,
                    seed=recipe.seed,
                    workers=recipe.workers,
                    progress=partial(show, f"parents look at {name} images"),
                )
            )
    run.say(f"what the parents see is kept in {kept[0].rows.path.parent}")
    return kept[0], kept[1]


def choose_stages(setup: Setup, training: Features, identity: Identity, tell: Listener) -> tuple[str, ...]:
    """Try the stages without the images that are set aside, and keep those that do better on them."""
    run, path = setup.run, setup.run.folder / JUDGED
    if path.exists():
        return tuple(read_json(path, "remove it, and --resume judges the stages anew")["kept"])
    rest, aside = set_aside(training.images, setup.recipe.seed)
    if not len(aside):
        run.say("no class has images enough to set some aside: the linear classifier stays as it is")
        return ()
    fitted, judged = training.subset(rest), training.subset(aside, views=1)
    model = cast(ProbeFusion, setup.classifier.model)
    with timed(run.folder, FIT):
        fit_start(model, fitted, tokens=True, run=run)
    run.say(f"{counted(len(aside), 'training image')} set aside say which stages are worth it")
    weights = weights_of(model)
    kept: list[str] = []
    scores: dict[str, float] = {}
    for stage in ("probe", *STAGES[setup.recipe.tune]):
        tried = stage_setup(stage, setup, fitted, judged, weights, f"trial-{stage}")
        state = begin(tried, identity)
        if stage != "probe":
            with timed(run.folder, f"{stage} on trial"):
                train_stage(tried, state, tell, None, f"{stage} on trial")
        shipped = shipped_by(state)
        _, scores[stage] = validate(tried, state, shipped)
        best = max([scores["probe"], *(scores[other] for other in kept)])
        if stage != "probe":
            better = scores[stage] > best
            run.say(verdict(stage, scores[stage], best, better))
            kept += [stage] * better
        if stage == "probe" or stage in kept:
            weights = weights_of(shipped)
    write_json(path, {"set_aside": len(aside), "accuracy": scores, "kept": kept})
    return tuple(kept)


def verdict(stage: str, score: float, best: float, better: bool) -> str:
    """Whether a stage is kept, and why."""
    decided = "is kept" if better else "is left out, for it is no better"
    return f"{IN_WORDS[stage]} {decided}: {score:.2%} of the images set aside, {best:.2%} without it"


def set_aside(images: Images, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images to try stages on, and those to judge them by: of each class a share, groups kept together."""
    everything = replace(images.dataset, splits=[""] * len(images), shards=None)
    classes, counts = np.unique(everything.labels, return_counts=True)
    if everything.groups is None and (len(classes) < 2 or counts.max() < 2):
        return np.arange(len(images)), np.zeros(0, dtype=np.int64)
    split = choose_split(everything, ASIDE, seed, "train")
    return split.train, split.val


def train_kept(
    setup: Setup,
    kept: Sequence[str],
    weights: Weights,
    training: Features,
    held_out: Features,
    identity: Identity,
    tell: Listener,
) -> tuple[Setup, TrainState]:
    """Train the stages that are kept on all training images, the last into the run's own checkpoint."""
    before: list[Record] = []
    stages = kept or ("probe",)
    for stage in stages:
        name = CHECKPOINT.stem if stage == stages[-1] else stage
        last = stage_setup(stage, setup, training, held_out, weights, name)
        state = begin(last, identity)
        log = Log(setup.run.folder, state.progress.records, asdict(setup.recipe), setup.run.say, before)
        try:
            if stage == "probe":
                with timed(setup.run.folder, JUDGE):
                    end_at_start(last, state, log, seconds_until_judged(setup.run.folder))
            else:
                with timed(setup.run.folder, stage):
                    train_stage(last, state, tell, log, stage)
        finally:
            log.close(state.progress.finished)
        weights, before = weights_of(shipped_by(state)), list(log.following(state.progress.records))
    return last, state


def stage_setup(
    stage: str, setup: Setup, training: Features, held_out: Features, weights: Weights, checkpoint: str
) -> Setup:
    """What a stage is trained on and judged by, from where the one before it ended."""
    recipe = stage_recipe(setup.recipe, stage)
    run = replace(setup.run, stage=checkpoint)
    model = cast(ProbeFusion, setup.classifier.model)
    model.load_state_dict(weights)
    classifier: Classifier = setup.classifier
    if stage == "all":
        model.freeze(*{"none": (), "both": PARENTS}.get(recipe.freeze, (recipe.freeze,)))
        images, judged = training.images, held_out.images
    else:
        model.freeze(*PARENTS)
        classifier = on_features(classifier)
        images, judged = training.as_images(), held_out.as_images()
    recipe, batches = make_loader(images, classifier, recipe, run)
    return make_setup(batches, judged, classifier, recipe, run, measure=None)


def stage_recipe(recipe: Recipe, stage: str) -> Recipe:
    """The fields of a recipe are those of its last stage; on the way there, tokens are trained on as suits them."""
    return replace(recipe, **ON_KEPT_TOKENS) if stage == "fusion" and recipe.tune == "all" else recipe


def train_stage(setup: Setup, state: TrainState, tell: Listener, log: Log | None, name: str) -> None:
    """Pass a stage's epochs, or those that are left."""
    try:
        if not state.progress.finished:
            setup.run.say(f"{name}:")
            say_batches(setup.batches, setup.run)
        fit(setup, state, lambda update: tell(replace(update, stage=name)), log)
    finally:
        setup.batches.close()


def shipped_by(state: TrainState) -> nn.Module:
    """The model with what a stage ends with."""
    shipped = state.gather_shipped()
    if state.best:
        shipped.load_state_dict(state.best)
    return shipped


def weights_of(model: nn.Module) -> Weights:
    """A copy of a model's weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def forget_stages(folder: Path) -> None:
    """Remove the checkpoints of a finished run's stages but the last."""
    for path in (folder / CHECKPOINT).parent.glob("*.safetensors"):
        if path.name != CHECKPOINT.name:
            path.unlink()
