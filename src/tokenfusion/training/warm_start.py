"""A fusion model that starts from two trained runs: its CNN from one, its transformer from the other."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tokenfusion.checkpoint import load_weights_exactly
from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.data.split import Split, read_split
from tokenfusion.errors import InputError
from tokenfusion.models.adapters import as_cnn, as_transformer
from tokenfusion.models.expressions import parse
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.names import base_of
from tokenfusion.recipe import Recipe, load_recipe


def warm_start(classifier: Classifier, runs: Sequence[str], say: Callable[[str], None]) -> None:
    """Copy two trained parents into a fusion model and close its gates: it then computes what the transformer's does.

    Only early joint attention is not gated: there the pixels take part from the first step on. The transformer's head
    comes along where its classes are the model's own.

    Args:
        classifier: of a model `fuse(CNN,VIT,...)`; changed in place.
        runs: two finished run folders, the CNN's first.
        say: told what was taken.

    Raises:
        InputError: the model is none of two parents; a run is not finished, or of another model, of images of another
            size or number of channels.
    """
    model = classifier.model
    names = parent_names(classifier.name)
    assert isinstance(model, FusedModel)
    cnn, vit = (load_parent(run, name, classifier.name) for run, name in zip(runs, names, strict=True))
    require_same_images(classifier, cnn, vit, runs)
    preprocess = classifier.preprocess
    stages = as_cnn(cnn.model, preprocess.img_size, preprocess.in_chans, len(model.cnn.dims))
    load_weights_exactly(model.cnn, stages.state_dict(), Path(runs[0]))
    tensors, own = as_transformer(vit.model).state_dict(), model.vit.state_dict()
    new_head = vit.classes != classifier.classes
    heads = [name for name in tensors if FusedModel.part_of(model, f"vit.{name}") == "head"]
    if new_head or not own.keys() & set(heads):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in heads}
        tensors |= {name: own[name] for name in heads if name in own}
    load_weights_exactly(model.vit, tensors, Path(runs[1]))
    model.set_gates(0.0)
    head = f"; the head starts at random, since the classes are not those of {runs[1]}" if new_head else ""
    ungated = "; not gated: pixels join the transformer's attention at once" if model.joint else ""
    say(f"starts from {runs[0]} and {runs[1]}{head}{ungated}")


def parent_names(name: str) -> list[str]:
    """The CNN's and the transformer's name in `fuse(CNN,VIT,...)` or a variant of it."""
    function, parts = parse(base_of(name)) if "(" in name else ("", [])
    if function != "fuse":
        raise InputError(
            f"{name} is no model that starts from two runs; give --model fuse(CNN,VIT), or leave out --warm-start-from"
        )
    return parts[:2]


def load_parent(run: str, name: str, fused: str) -> Classifier:
    """The trained run of the parent called `name`, on the CPU."""
    parent = Classifier.load(run, torch.device("cpu"))
    if parent.name.replace(" ", "") != name.replace(" ", ""):
        raise InputError(
            f"{run} is a run of {parent.name}, but {fused} has {name} in its place; give a run of {name} (the CNN's "
            "comes first), or another --model"
        )
    return parent


def require_same_images(classifier: Classifier, cnn: Classifier, vit: Classifier, runs: Sequence[str]) -> None:
    """Refuse parents whose images were prepared in another way than the model's will be."""
    ours, cnns, vits = classifier.preprocess, cnn.preprocess, vit.preprocess
    if shape_of(cnns) != shape_of(vits):
        raise InputError(
            f"{runs[0]} takes images of {shape_of(cnns)} and {runs[1]} of {shape_of(vits)}; train both on the same"
        )
    if shape_of(vits) != shape_of(ours):
        height, width = vits.img_size
        raise InputError(
            f"{runs[0]} and {runs[1]} take images of {shape_of(vits)}, but this run of {shape_of(ours)}; "
            f"give --img-size {height} {width} --in-chans {vits.in_chans}"
        )


def shape_of(preprocess: Preprocess) -> str:
    return f"{preprocess.img_size[0]}×{preprocess.img_size[1]} pixels and {preprocess.in_chans} channels"


def refuse_seen(recipe: Recipe, source: Dataset, split: Split) -> None:
    """Refuse parents that were trained on images which this run holds out, where the data has no split of its own."""
    held_out = set(split.val.tolist())
    for parent in map(Path, recipe.warm_start_from):
        own = parent / "split.csv"
        if not own.exists() or load_recipe(parent / "recipe.toml").get("data") != recipe.data:
            continue
        seen = held_out & set(read_split(own, source).train.tolist())
        if seen:
            raise InputError(
                f"{parent} was trained on {len(seen):,} of the {len(held_out):,} images that this run holds out; "
                "give the parents' --seed and --val-fraction"
            )
