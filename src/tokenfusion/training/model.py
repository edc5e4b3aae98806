"""The model that a recipe names, before its first step."""

from collections.abc import Sequence

import torch
from torch import nn

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.models.fused_model import PARENTS, FusedModel
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.recipe import Recipe


def build(recipe: Recipe, classes: Sequence[str], multi_label: bool = False, *, loaded: bool = False) -> Classifier:
    """The recipe's model for these classes, with the parents frozen that it says.

    Its weights are random unless it is to be `loaded` with those that the recipe says; its images are prepared as
    those want them in either case.

    Raises:
        InputError: the model cannot be built, or is no fusion, and the recipe wants something of a side of one.
    """
    torch.manual_seed(recipe.seed)
    classifier = Classifier.create(
        recipe.model,
        classes,
        in_chans=recipe.in_chans,
        img_size=recipe.img_size or None,  # type: ignore[arg-type]
        precision=recipe.precision,
        drop_path=recipe.drop_path,
        crop_pct=None if recipe.pretrained else recipe.crop_pct,
        pretrained=recipe.pretrained if loaded else (),
        max_pixels=recipe.max_pixels,
        multi_label=multi_label,
    )
    model = classifier.model
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]
    if recipe.freeze != "none":
        fusion_for("freeze", recipe, model).freeze(*(PARENTS if recipe.freeze == "both" else (recipe.freeze,)))
    for option in ("branch_dropout", "side_loss"):
        if getattr(recipe, option):
            require_two_sides(option, fusion_for(option, recipe, model), recipe)
    if recipe.branch_dropout:
        model.branch_dropout = recipe.branch_dropout  # type: ignore[assignment]
    return classifier


def require_two_sides(option: str, model: FusedModel, recipe: Recipe) -> None:
    """Refuse to drop or ask a side where something of it would be left, or where nothing learns by it."""
    crossvit = len(model.vit.branch_layouts(model.img_size)) > 1
    reasons = {
        "branch_dropout": {
            "takes the patches of one branch away, and a CrossViT has two; take another transformer": crossvit,
            "changes nothing where a linear classifier is fitted at once; give --tune fusion": recipe.tune == "probe",
        },
        "side_loss": {
            "asks the pixels alone, beside which a CrossViT's head reads its small branch; take another "
            "transformer": crossvit,
            "asks either side by the head of both, and that of fuse(CNN,VIT,probe) is fitted on both at once; take "
            "another strategy": isinstance(model, ProbeFusion),
        },
    }
    for reason, holds in reasons[option].items():
        if holds:
            given, words = f"{option}={getattr(recipe, option):g}", f"--{option.replace('_', '-')}"
            raise InputError(f"{given} {reason}, or leave out {words}")


def fusion_for(option: str, recipe: Recipe, model: nn.Module) -> FusedModel:
    """The model, for an option that only a CNN and a transformer that are fused have a use for."""
    if not isinstance(model, FusedModel):
        raise InputError(
            f"{option}={getattr(recipe, option)} needs a CNN and a transformer that are fused, and {recipe.model} is "
            f"no such model; leave out --{option.replace('_', '-')}, or give --model fuse(CNN,VIT)"
        )
    return model
