"""The linear classifiers that a model `fuse(CNN,VIT,probe)` starts as: fitted, judged, and made the model's head."""

import numpy as np
import torch

from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.errors import InputError
from tokenfusion.features import Features
from tokenfusion.files import write_csv, write_json
from tokenfusion.formatting import counted
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.probe import POOLED, TOKENS, Blocks, Probe, fit_probe
from tokenfusion.recipe import Recipe
from tokenfusion.training.setup import Run

VOTERS = 5_000
"""Of so many images at most every token's vote is fitted at once; of more, training finds it."""
TOKEN_SCALE = 0.25
"""Of standardised tokens beside means: their weights are penalised the more."""
PROBE_BYTES = 2**30
"""Largest features that a linear classifier is fitted on; of more images, as many as fit are drawn."""
JUDGED_AT_ONCE = 1_000
"""Images whose tokens are read in float32 at once."""
WAYS = {"cnn": "the CNN", "vit": "the transformer", "both": "both", "mean": "the mean of the two predictions"}
"""What of the parents is judged beside what fuses them, and what it is called."""


def require_tunable(classifier: Classifier, source: Dataset, recipe: Recipe, run: Run) -> None:
    """Refuse what cannot be tuned in stages.

    Raises:
        InputError: the model does not start from a linear classifier, its parents are not trained, several processes
            train, or an image has any number of classes.
    """
    if not recipe.tune:
        if recipe.views > 1:
            raise InputError(f"views={recipe.views} are what frozen parents see; give --tune with it, or leave it out")
        return
    reasons = {
        f"{recipe.model} does not start from a linear classifier; give --model fuse(CNN,VIT,probe)": not isinstance(
            classifier.model, ProbeFusion
        ),
        "its parents would be random; give --pretrained, or --warm-start-from with two runs": not (
            recipe.warm_start_from or recipe.pretrained
        ),
        f"views={recipe.views} of an image are all the same; give a --crop-scale below 1, --hflip or "
        "--trivial-augment": recipe.views > 1 and not recipe.augments,
        f"repeats={recipe.repeats} are of images, and what is seen of them is kept; give --views": recipe.repeats > 1,
        "an image has any number of classes here, and the linear classifier gives one; give a single model, such as "
        "--model resnet50": source.multi_label,
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


def fit_start(model: ProbeFusion, features: Features, tokens: bool, run: Run) -> Probe:
    """Fit the linear classifiers on what the parents saw, and make their mixture what the model computes.

    Args:
        model: changed in place: what tokens are standardised by, its head, votes and gate.
        features: training images.
        tokens: whether every token votes too, where the images are few enough.
        run: told what cannot be done.
    """
    standardize(model, features)
    chosen = drawn(len(features.labels), 4 * model.num_means, run)
    some = Features(features.images, features.rows, features.which.reshape(1, -1)[:, chosen])
    voting = tokens and len(chosen) <= VOTERS and 4 * len(chosen) * model.row_length <= PROBE_BYTES
    blocks = blocks_of(model, some, voting)
    labels, images = features.labels[chosen], chosen % features.which.shape[1]
    probe = fit_probe(blocks, POOLED | (TOKENS if voting else {}), labels, run.say, images=images)
    give_start(model, probe)
    return probe


def judge_start(model: ProbeFusion, probe: Probe, held_out: Features, run: Run) -> None:
    """Write what the parents know of held-out images to `probe.json`, and of each of them to `parents.csv`."""
    labels, classes = held_out.labels, held_out.images.dataset.classes
    voting = "cnn_tokens" in probe.weight
    starts = range(0, len(labels), JUDGED_AT_ONCE)
    some = [held_out.subset(np.arange(i, min(i + JUDGED_AT_ONCE, len(labels)))) for i in starts]
    parts = [probe.name_classes(blocks_of(model, part, voting)) for part in some]
    named = {way: np.concatenate([part[way] for part in parts]) for way in parts[0]}
    judged = {way: float((answers == labels).mean()) for way, answers in named.items()}
    rows = (
        (name, classes[labels[i]], *(classes[named[way][i]] for way in (*WAYS, "mixture")))
        for i, name in enumerate(held_out.images.names)
    )
    write_csv(run.folder / "parents.csv", ("path", "label", *WAYS, "mixture"), rows)
    write_json(run.folder / "probe.json", described(probe, judged))
    known = ", ".join(f"{name} {judged[way]:.2%}" for way, name in WAYS.items())
    run.say(
        f"named right of the held-out images, by linear classifiers on what each sees: {known}; by their mixture, with "
        f"which the run starts, {judged['mixture']:.2%}"
    )


def standardize(model: ProbeFusion, features: Features) -> None:
    """By what the training images' tokens and means are standardised."""
    device = model.standardize.mean.device
    for index, part in enumerate((model.pixel_source, model.token_source)):
        part.standardize.fit(model.recall(batch.to(device))[index] for batch in features.batches())
    model.standardize.fit(model.means(model.recall(batch.to(device))) for batch in features.batches())


@torch.no_grad()
def blocks_of(model: ProbeFusion, features: Features, tokens: bool) -> Blocks:
    """What linear classifiers read of kept rows: standardised means of each parent's tokens, and the tokens."""
    device, found = model.standardize.mean.device, []
    for batch in features.batches():
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
