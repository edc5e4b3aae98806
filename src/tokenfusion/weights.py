"""Weights of the papers' public code, of timm's copies and of this package: read, checked, fitted, and given back."""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.models.base import PaperModel
from tokenfusion.models.cmt import CMT
from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.deepvit import DeepViT
from tokenfusion.models.official import fit_position_tables
from tokenfusion.models.weight_files import State, tensors_of

PAPERS: tuple[type[PaperModel], ...] = (CrossViT, DeepViT, CMT)


@dataclass(frozen=True)
class LoadedWeights:
    """What was done to make a file fit.

    Attributes:
        resized: position tables that were interpolated to the model's image size.
        left_out: keys of a head with another number of classes; the model keeps its own.
    """

    resized: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> LoadedWeights:
    """Load the weights of an official file, of timm's copy of one, or of this package's own, into a model.

    Position tables are resized where only the image size differs. Weights do not tell the grid of a table: one of as
    many tokens as the model's is taken as it is, any other for a square one. Hence give tables of a square image, or of
    the model's very own `img_size`; those of another shape are not always told apart, and scrambled. A head of another
    number of classes is left out, with a warning. Either everything else fits, or the model is left as it was.

    Args:
        model: a CrossViT, DeepViT or CMT.
        source: a `.pth` file (read without running code), a `.safetensors` file, or a state dict; perhaps inside
            `{"model": ...}` or `{"state_dict": ...}`.

    Raises:
        InputError: the file cannot be read, or does not fit: with the first keys that differ and the likely reason.
    """
    model = paper_model(model)
    state = model.official_names.translate(tensors_of(source), model)
    own = model.state_dict()
    numbers = {key: value for key, value in state.items() if key not in own or holds_numbers_for(value, own[key])}
    resized = fit_position_tables(numbers, model)
    fitted = state | resized
    head = tuple(head_keys(fitted, own))
    wanted = {key: value for key, value in own.items() if key not in head}
    found = {key: value for key, value in fitted.items() if key not in head}
    if differences := list(compare(found, wanted)):
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise InputError(f"the weights do not fit this model: {likely_reason(model, found, wanted)}. {shown}")
    model.load_state_dict(found, strict=False)
    if head:
        warnings.warn(
            f"the head was left out ({', '.join(head)}): the weights have {classes(fitted)} classes, "
            f"the model {model.num_classes}",
            stacklevel=2,
        )
    return LoadedWeights(resized=tuple(resized), left_out=head)


def to_official(model: nn.Module) -> State:
    """A model's state dict in the keys of its paper's public code; the tensors are the model's own.

    Raises:
        InputError: the model is none of CrossViT, DeepViT and CMT.
    """
    model = paper_model(model)
    return {model.official_names.official(key): value for key, value in model.state_dict().items()}


def paper_model(model: nn.Module) -> PaperModel:
    """The model itself, if it is a paper's with public code; else InputError."""
    if isinstance(model, PAPERS):
        return model
    names = ", ".join(paper.__name__ for paper in PAPERS)
    raise InputError(f"a {type(model).__name__} has no official weights; give a model of {names}")


def head_keys(state: State, own: State) -> Iterator[str]:
    """Keys of the classifier, if the state's has another number of classes than the model's."""
    if classes(state) != classes(own):
        yield from (key for key in (own | state) if key.startswith("head."))


def classes(state: State) -> int:
    """Number of classes of a state dict; 0 without a head."""
    return next((len(value) for key, value in state.items() if key.startswith("head.") and value.ndim), 0)


def compare(found: State, wanted: State) -> Iterator[str]:
    """What differs, key by key in the model's order."""
    for key, value in wanted.items():
        if key not in found:
            yield f"{key} is missing"
        elif found[key].shape != value.shape:
            yield f"{key} is {tuple(found[key].shape)}, the model's {tuple(value.shape)}"
    yield from (f"{key} is not in the model" for key in found if key not in wanted)
    for key, value in wanted.items():
        if key in found and not holds_numbers_for(found[key], value):
            yield f"{key} is of {found[key].dtype} ({found[key].layout}), the model's of {value.dtype}"
        elif key in found and not is_finite(found[key].to(value.dtype)):
            yield f"{key} has values that are not finite"


def holds_numbers_for(found: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor has values that can be copied as they are meant: dense, and real where real is wanted."""
    dense = found.layout == torch.strided and (wanted.is_meta or not found.is_meta)
    return dense and (found.is_floating_point() or not (wanted.is_floating_point() or found.is_complex()))


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return values.is_meta or bool(values.isfinite().all())


def likely_reason(model: PaperModel, found: State, wanted: State) -> str:
    """Why weights do not fit, as far as one can tell, and what to do."""
    paper = next((p for p in PAPERS if is_of(p, found)), None)
    if paper is None and not found.keys() & wanted.keys():
        return "they are of no model known here; give a file of " + type(model).__name__
    if paper is not None and paper is not type(model):
        return f"they are a {paper.__name__}'s, the model is a {type(model).__name__}; create the model they are of"
    reshaped = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    if found.keys() == wanted.keys() and not all(holds_numbers_for(found[key], wanted[key]) for key in wanted):
        return "their values are no plain real numbers; save the weights as dense float32"
    if found.keys() == wanted.keys() and reshaped:
        if all(key.endswith(".table") for key in reshaped):
            return "the image size differs and the position table is not of a square grid; set img_size as it was"
        if all(differs_in_channels(found[key], wanted[key]) for key in reshaped):
            return f"another number of channels; create the model with in_chans={found[reshaped[0]].shape[1]}"
    if found.keys() == wanted.keys() and not reshaped:
        return "some values are NaN or infinite, as after a training that diverged; give weights from before"
    if fitting := next(variants_like(model, found), None):
        return f"wrong variant: they fit {fitting}; create that model"
    return "wrong variant, or other arguments than the model was created with"


def is_of(paper: type[PaperModel], state: State) -> bool:
    """Whether a key of the state, in any spelling, has the paper's signature."""
    names = paper.official_names
    return any(re.search(names.signature, spelling) for key in state for spelling in (key, names.official(key)))


def variants_like(model: PaperModel, state: State) -> Iterator[str]:
    """Names of the paper's variants that the state fits, but for the image size and the head."""
    variants: Mapping[str, tuple[type[PaperModel], dict[str, Any]]] = sys.modules[type(model).__module__].VARIANTS
    official = {model.official_names.official(key): value for key, value in state.items()}
    for name, (model_cls, arguments) in variants.items():
        with torch.device("meta"):
            other = model_cls(**arguments)
        if body_shapes(model.official_names.translate(official, other)) == body_shapes(other.state_dict()):
            yield name


def body_shapes(state: State) -> dict[str, torch.Size | None]:
    """Shapes of all but the head; position tables, which may be resized, are of any."""
    body = {key: value for key, value in state.items() if not key.startswith("head.")}
    return {key: None if key.endswith(".table") else value.shape for key, value in body.items()}


def differs_in_channels(found: Tensor, wanted: Tensor) -> bool:
    """Whether two convolutions' weights differ in their input channels alone."""
    return found.ndim == wanted.ndim == 4 and found[:, :1].shape == wanted[:, :1].shape
