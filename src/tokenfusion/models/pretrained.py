"""Pretrained weights: from the hub or from disk, checked, and fitted to a model by timm's own loading.

timm resizes tables of positions to the model's image size and sums the first layer's channels. A head of other classes
than the weights' is new.
"""

import difflib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.models.expressions import parse
from tokenfusion.models.weight_files import State, tensors_of

Pretrained = bool | str | Path | Sequence[str | Path]
"""False; True or "hub"; a file; or a file for each parent of `fuse(CNN,VIT,...)`, the CNN's first."""
HUB = "hub"


@dataclass(frozen=True)
class WeightsFile:
    """Weights on this machine that a model begins with.

    Attributes:
        model: that they are for, as timm or this package names it.
        source: the file's path, or where on the hub it is from.
    """

    model: str
    path: Path
    source: str

    def to_dict(self) -> dict[str, str]:
        """What a run keeps of it: model, source and the file's SHA-256."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"model": self.model, "source": self.source, "sha256": digest}


def find_weights(name: str, pretrained: Pretrained) -> tuple[WeightsFile, ...]:
    """The files that a model begins with, one for each model in it; those of the hub are fetched unless they are here.

    Raises:
        InputError: the hub has none or does not answer; a file is missing, or there are too many or too few.
    """
    if pretrained is False or pretrained == () or pretrained == "":
        return ()
    names = weighted_names(name)
    given = choices(names, pretrained)
    return tuple(
        fetch(model) if source == HUB else WeightsFile(model, Path(source), str(source))
        for model, source in zip(names, given, strict=True)
    )


def weighted_names(name: str) -> list[str]:
    """The models that may begin with weights: the two of `fuse(CNN,VIT,...)`, else the model itself.

    Raises:
        InputError: a model is an expression of another kind, of which there are no weights.
    """
    function, parts = parse(name) if "(" in name else ("", [name])
    names = parts[:2] if function == "fuse" else [name]
    for part in names:
        if "(" in part:
            raise InputError(f"{part} has no pretrained weights; leave pretrained out")
    return names


def choices(names: Sequence[str], pretrained: Pretrained) -> list[str | Path]:
    """`HUB` or a file for each of the models named.

    Raises:
        InputError: there are not as many files as models.
    """
    if isinstance(pretrained, bool):
        pretrained = HUB
    given: list[str | Path] = [pretrained] if isinstance(pretrained, str | Path) else list(pretrained)
    if given == [HUB]:
        return given * len(names)
    if len(given) != len(names):
        files = " ".join(f"{name.partition('.')[0]}.safetensors" for name in names)
        raise InputError(
            f"pretrained={' '.join(map(str, given))} is {len(given)} of {len(names)} files that "
            f"{' and '.join(names)} begin with; give --pretrained hub, or {files}"
        )
    return given


def fetch(name: str) -> WeightsFile:
    """A model's weights from the hub, by its own client, which tries again with growing pauses.

    The client keeps the file where it always does (HF_HOME); nothing is left of a file that did not arrive whole.

    Raises:
        InputError: there are none, or they cannot be fetched, with the file's name and what to do with it.
    """
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(f"{name} has no pretrained weights; leave pretrained out")
    if not config.hf_hub_id:
        raise InputError(f"{name} is not on the hub; fetch {config.url} and give --pretrained FILE")
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it tries again is said once, in the end

    file, (repo, _, revision) = config.hf_hub_filename or "model.safetensors", config.hf_hub_id.partition("@")
    folder = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    was_there = folder.exists()
    try:
        path = Path(hf_hub_download(repo, file, revision=revision or None))
    except BaseException as error:  # one of its two HTTP libraries', by version, or Ctrl-C
        for incomplete in folder.glob("blobs/*.incomplete"):
            incomplete.unlink(missing_ok=True)
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")
        local = f"{name.partition('.')[0]}.safetensors"
        raise InputError(
            f"the weights of {name} cannot be fetched: {reason}; fetch {hf_hub_url(repo, file)} elsewhere, put it here "
            f"as {local}, and give --pretrained {local} (of a pair the CNN's file first)"
        ) from error
    return WeightsFile(name, path, f"{config.hf_hub_id}/{file}")


def create_from(path: str | Path, name: str, num_classes: int | None, arguments: dict[str, Any]) -> nn.Module:
    """Build a model of timm's registry with the weights of a file.

    The model is first built with as many classes as the weights have, so that every tensor must fit, and is then given
    a head of its own where `num_classes` differs.

    Args:
        path: a `.pth` (read without running code) or `.safetensors` file.
        name: as timm knows it, or this package registers it.
        num_classes: outputs; the weights' own where not given.
        arguments: further ones of `timm.create_model`.

    Raises:
        InputError: the file cannot be read, or holds the weights of another model, which is named if it is found.
    """
    state = tensors_of(path)
    require_finite(state, path)
    reasons = []
    for classes, offset in dict.fromkeys(class_counts(name, state)):
        overlay = {"state_dict": dict(state), "num_classes": classes, "label_offset": offset}
        try:
            model: Any = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **arguments
            )
        except InputError:
            raise
        except (RuntimeError, LookupError, ValueError, AttributeError, AssertionError) as error:
            if "sizes should be greater than 0" in str(error):  # of the positions' table
                size = arguments.get("img_size")
                raise InputError(
                    f"img_size={size} is smaller than a patch of {name}; give a larger --img-size"
                ) from error
            reasons.append(error)
            continue
        model.pretrained_cfg = model.default_cfg = {k: v for k, v in model.pretrained_cfg.items() if k != "state_dict"}
        if num_classes is not None and num_classes != classes:
            model.reset_classifier(num_classes)
            model.pretrained_cfg["num_classes"] = num_classes
        return model
    raise does_not_fit(path, name, state, reasons[0]) from reasons[0]


def class_counts(name: str, state: State) -> Iterator[tuple[int, int]]:
    """How many classes weights may have, and how many outputs before the first of them, the likeliest first."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own, offset = (config.num_classes, config.label_offset or 0) if config else (1000, 0)
    names = config.classifier if config else None
    heads = (names,) if isinstance(names, str) else tuple(names or ())
    rows = [len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state]
    if rows and not offset:
        yield rows[0], 0
    yield own, offset
    yield 0, 0


def require_finite(state: State, path: str | Path) -> None:
    """Refuse tensors that are no plain numbers, and values that are not finite."""
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_complex():
            raise InputError(f"{path}: {key} is no plain real numbers; save the weights as dense float32")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {key} has values that are not finite; fetch the file again, or give another")


def does_not_fit(path: str | Path, name: str, state: State, error: Exception) -> InputError:
    """What to say of weights that are another model's."""
    fitting = next((other for other in candidates(path, name) if fits(other, state)), None)
    lines = [line.strip().rstrip(". ") for line in str(error).splitlines() if line.strip()]
    reason = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0] if lines else ""
    reason = reason if len(reason) < 200 else f"{reason[:200]}..."
    remedy = f"they fit {fitting}: give that model, or other weights" if fitting else f"give weights of {name}"
    return InputError(f"{path} does not fit {name}: {reason}; {remedy} (of a pair the CNN's file comes first)")


def candidates(path: str | Path, name: str) -> Iterator[str]:
    """Models that a file may be of: what it is called, what this one's name resembles, and those of its kind."""
    stem, names = Path(path).name.partition(".")[0], timm.list_models()
    own = name.partition(".")[0]
    near = [*([stem] if stem in names else []), *difflib.get_close_matches(own, names, n=8, cutoff=0.6)]
    yield from dict.fromkeys(other for other in near if other != own)


def fits(name: str, state: State) -> bool:
    """Whether a model has the names and shapes of these tensors, but for its head and tables of positions."""
    with torch.device("meta"):
        model = timm.create_model(name)
    config: Any = model.pretrained_cfg
    heads = config.get("classifier") or ()
    skipped = (heads,) if isinstance(heads, str) else tuple(heads)

    def body(tensors: dict[str, Tensor]) -> dict[str, torch.Size | None]:
        shapes = {key: tensor.shape for key, tensor in tensors.items() if not key.startswith(skipped)}
        return {key: None if "pos_embed" in key else shape for key, shape in shapes.items()}

    return body(model.state_dict()) == body(state)
