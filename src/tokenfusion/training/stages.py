"""Training on what frozen parents see: every image passes them once, a linear classifier starts, what fuses goes on.

`--tune probe` ends with the linear classifier; `--tune fusion` goes on from it, in the same loop as any run, whose
"images" are the rows that are kept of them.
"""

from typing import cast

import numpy as np
import torch
from rich.progress import Progress as ProgressBar

from tokenfusion.checkpoint import load_tensors, load_weights_exactly
from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images
from tokenfusion.errors import InputError
from tokenfusion.features import KeptClassifier, Rows, batches_of, keep_features, kept, of_kept
from tokenfusion.files import write_json
from tokenfusion.formatting import counted
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.probe import POOLED, TOKENS, Blocks, Probe, fit_probe
from tokenfusion.recipe import Recipe
from tokenfusion.training.distributed.fsdp import is_saved
from tokenfusion.training.setup import Run

VOTERS = 5_000
"""Of so many images at most every token's vote is fitted at once; of more, training finds it."""
TOKEN_SCALE = 0.25
"""Of standardised tokens beside means: their weights are penalised the more."""
PROBE_BYTES = 2**30
"""Largest features that a linear classifier is fitted on; of more images, as many as fit are drawn."""


def require_tunable(classifier: Classifier, source: Dataset, recipe: Recipe, run: Run) -> None:
    """Refuse what cannot be tuned in stages.

    Raises:
        InputError: the model does not start from a linear classifier, its parents are not trained, several processes
            train, or an image has any number of classes.
    """
    if not recipe.tune:
        return
    reasons = {
        f"{recipe.model} does not start from a linear classifier; give --model fuse(CNN,VIT,probe)": not isinstance(
            classifier.model, ProbeFusion
        ),
        "its parents would be random; give --warm-start-from with two runs": not recipe.warm_start_from,
        "an image has any number of classes here, and the linear classifier gives one; leave out --tune": (
            source.multi_label
        ),
        f"every={recipe.every} looks at attention to images, of which the parents' was seen before; give 0": (
            recipe.every > 0
        ),
        "its batch size and learning rate are not chosen by measuring; give numbers": bool(
            {"lr", "batch_size"} & set(recipe.autos)
        ),
        "every image is seen once, by one process; train without torchrun": run.world.size > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"tune={recipe.tune}: {reason}")


def observe(
    classifier: Classifier, training: Images, held_out: Images, recipe: Recipe, run: Run
) -> tuple[KeptClassifier, Images, Images]:
    """What the parents see of the images in the images' place; a new run's head starts as the linear classifier.

    Returns:
        The classifier of what is kept, and the training and held-out images as it takes them.
    """
    model = cast(ProbeFusion, classifier.model).freeze("cnn", "vit")
    if is_saved(run.checkpoint):
        tensors = load_tensors(run.checkpoint)[0]
        own = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        load_weights_exactly(model, own, run.checkpoint)
    rows = []
    with ProgressBar(console=run.console, disable=not run.console.is_terminal, transient=True) as bar:
        for name, images in (("training", training), ("held-out", held_out)):
            task = bar.add_task(f"parents look at {name} images", total=len(images))
            rows.append(
                keep_features(
                    classifier,
                    images,
                    workers=recipe.workers,
                    progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                )
            )
    run.say(f"what the parents see is kept in {rows[0].path.parent}")
    if not is_saved(run.checkpoint):
        start_from_probe(model, rows, training, held_out, recipe.tune == "fusion", run)
    weights = training.weights
    training, held_out = kept(training, rows[0]), kept(held_out, rows[1])
    training.weights = weights
    return of_kept(classifier), training, held_out


def start_from_probe(
    model: ProbeFusion, rows: list[Rows], training: Images, held_out: Images, tokens: bool, run: Run
) -> None:
    """Fit the linear classifiers, write what they know to `probe.json`, and make them the model's start."""
    standardize(model, rows[0].rows)
    labels = training.labels.numpy()
    chosen = drawn(len(labels), 4 * model.num_features, run)
    voting = tokens and len(labels) <= VOTERS
    reads = POOLED | (TOKENS if voting else {})
    probe = fit_probe(blocks_of(model, rows[0].rows[chosen], voting), reads, labels[chosen], run.say)
    judged = probe.judge(blocks_of(model, rows[1].rows, voting), held_out.labels.numpy())
    write_json(run.folder / "probe.json", described(probe, judged))
    told = {"cnn": "the CNN", "vit": "the transformer", "both": "both", "mean": "the mean of the two predictions"}
    known = ", ".join(f"{name} {judged[key]:.2%}" for key, name in told.items())
    run.say(f"linear classifiers on held-out images: {known}; their mixture, the start, {judged['mixture']:.2%}")
    give_start(model, probe)


def standardize(model: ProbeFusion, rows: np.ndarray) -> None:
    """By what the training images' tokens and means are standardised."""
    device = model.standardize.mean.device
    for index, part in enumerate((model.pixel_source, model.token_source)):
        part.standardize.fit(model.recall(batch.to(device))[index] for batch in batches_of(rows))
    model.standardize.fit(model.means(model.recall(batch.to(device))) for batch in batches_of(rows))


@torch.no_grad()
def blocks_of(model: ProbeFusion, rows: np.ndarray, tokens: bool) -> Blocks:
    """What linear classifiers read of kept rows: standardised means of each parent's tokens, and the tokens."""
    device, found = model.standardize.mean.device, []
    for batch in batches_of(rows):
        seen = model.recall(batch.to(device))
        means = model.standardize(model.means(seen)).tensor_split([model.channels[0]], dim=1)
        parts = zip((model.pixel_source, model.token_source), seen, strict=True)
        placed = [TOKEN_SCALE * source.standardize(part).flatten(1) for source, part in parts] if tokens else []
        found.append([part.cpu().numpy() for part in (*means, *placed)])
    names = ("cnn", "vit", "cnn_tokens", "vit_tokens")
    return dict(zip(names, map(np.concatenate, zip(*found, strict=True)), strict=False))


def give_start(model: ProbeFusion, probe: Probe) -> None:
    """Make the mixture of linear classifiers what the model computes."""

    def row(*names: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([probe.weight[name] for name in names], axis=1)).float()

    votes = TOKEN_SCALE * row("cnn_tokens", "vit_tokens") if "cnn_tokens" in probe.weight else None
    model.start_from(row("cnn", "vit"), torch.from_numpy(probe.bias).float(), votes)


def drawn(count: int, bytes_each: int, run: Run) -> np.ndarray:
    """Which of so many images the linear classifiers are fitted on: all, or as many as memory is taken for."""
    most = PROBE_BYTES // bytes_each
    if count <= most:
        return np.arange(count)
    run.say(f"linear classifiers are fitted on {counted(most, 'image')} of {count:,}, drawn at random")
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def described(probe: Probe, judged: dict[str, float]) -> dict[str, object]:
    """What the linear classifiers know, as `probe.json` has it."""
    return {
        "held_out": judged,
        "c": {name: part.c for name, part in probe.parts.items()},
        "weights": probe.weights,
        "temperatures": probe.temperatures,
    }
