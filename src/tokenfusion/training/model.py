"""The model that a recipe names, before its first step."""

from collections.abc import Sequence

import torch
from torch import nn

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.models.fused_model import PARENTS
from tokenfusion.models.token_fusion import TokenFusion
from tokenfusion.recipe import Recipe


def build(recipe: Recipe, classes: Sequence[str], multi_label: bool = False, *, loaded: bool = False) -> Classifier:
    """The recipe's model for these classes, with the parents frozen that it says.

    Its weights are random unless it is to be `loaded` with those that the recipe says; its images are prepared as
    those want them in either case.

    Raises:
        InputError: the model cannot be built, or is no fusion, and the recipe wants to freeze or drop a side of one.
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
    if recipe.branch_dropout:
        fused = fusion_for("branch_dropout", recipe, model)
        require_two_branches(fused, recipe)
        fused.branch_dropout = recipe.branch_dropout
    return classifier


def require_two_branches(model: TokenFusion, recipe: Recipe) -> None:
    """Refuse branch dropout where it would leave something of a branch, or where nothing learns by it."""
    reasons = {
        "takes the patches of one branch away, and a CrossViT has two; take another transformer": len(
            model.vit.branch_layouts(model.img_size)
        )
        > 1,
        "changes nothing where a linear classifier is fitted at once; give --tune fusion": recipe.tune == "probe",
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"branch_dropout={recipe.branch_dropout:g} {reason}, or leave out --branch-dropout")


def fusion_for(option: str, recipe: Recipe, model: nn.Module) -> TokenFusion:
    """The model, for an option that only a CNN and a transformer that are fused have a use for."""
    if not isinstance(model, TokenFusion):
        raise InputError(
            f"{option}={getattr(recipe, option)} needs a CNN and a transformer that are fused, and {recipe.model} is "
            f"no such model; leave out --{option.replace('_', '-')}, or give --model fuse(CNN,VIT)"
        )
    return model
