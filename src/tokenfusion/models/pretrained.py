"""Pretrained weights: from the hub or from disk, checked, and fitted to a model by timm's own loading.

timm resizes tables of positions to the model's image size and sums the first layer's channels. A head of other classes
than the weights' is new.
"""

import difflib
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError, first_line
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


Say = Callable[[str], object]
"""Told what is waited for."""


def silent(_text: str) -> None: ...


def find_weights(name: str, pretrained: Pretrained, say: Say = silent) -> tuple[WeightsFile, ...]:
    """The files that a model begins with, one for each model in it; those of the hub are fetched unless they are here.

    Args:
        name: of the model.
        pretrained: where they are from.
        say: told what the hub is asked for, and when it is asked again.

    Raises:
        InputError: the hub has none or does not answer; a file is missing, or there are too many or too few.
    """
    if pretrained is False or pretrained == () or pretrained == "":
        return ()
    names = weighted_names(name)
    given = choices(names, pretrained)
    return tuple(
        fetch(model, say, names) if source == HUB else WeightsFile(model, Path(source), str(source))
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
        files = " ".join(map(local_name, names))
        raise InputError(
            f"pretrained={' '.join(map(str, given))} is {len(given)} of {len(names)} files that "
            f"{' and '.join(names)} begin with; give --pretrained hub, or {files}"
        )
    return given


def place_on_hub(name: str) -> tuple[str, str, str]:
    """The repository of a model's weights on the hub, its revision ("" for the newest), and the file there.

    Raises:
        InputError: there are none.
    """
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(f"{name} has no pretrained weights; leave pretrained out")
    if not config.hf_hub_id:
        raise InputError(f"{name} is not on the hub; fetch {config.url} and give --pretrained FILE")
    repo, _, revision = config.hf_hub_id.partition("@")
    return repo, revision, config.hf_hub_filename or "model.safetensors"


@contextmanager
def saying_retries(say: Say) -> Iterator[None]:
    """Tell of the pauses after which the hub's client asks again, in the place of its own warnings."""
    client = logging.getLogger("huggingface_hub.utils._http")
    level = client.level

    def tell(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("Retrying"):
            say(f"the hub does not answer; {text[0].lower()}{text[1:]}")
        return False

    client.addFilter(tell)
    client.setLevel(logging.WARNING)
    try:
        yield
    finally:
        client.removeFilter(tell)
        client.setLevel(level)


def fetch(name: str, say: Say = silent, names: Sequence[str] = ()) -> WeightsFile:
    """A model's weights from the hub, by its own client, which tries again with growing pauses.

    The client keeps the file where it always does (HF_HOME); nothing is left of a file that did not arrive whole.

    Args:
        name: of the model.
        say: told what is asked for, and when it is asked for again.
        names: of all models whose weights are wanted, for what is said where they cannot be fetched.

    Raises:
        InputError: there are none, or they cannot be fetched, with the files' names and what to do with them.
    """
    repo, revision, file = place_on_hub(name)
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging as own_logging

    own_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it tries again is said in our words

    if not isinstance(try_to_load_from_cache(repo, file, revision=revision or None), str):
        say(f"asking {constants.ENDPOINT} for the weights of {name}: {repo}/{file}")
    folder = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    was_there = folder.exists()
    try:
        with saying_retries(say):
            path = Path(hf_hub_download(repo, file, revision=revision or None))
    except BaseException as error:  # one of its two HTTP libraries', by version, or Ctrl-C
        for incomplete in folder.glob("blobs/*.incomplete"):
            incomplete.unlink(missing_ok=True)
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"the weights of {name} cannot be fetched: {reason}; {fetch_elsewhere(names or (name,))}"
        ) from error
    return WeightsFile(name, path, f"{repo}{f'@{revision}' * bool(revision)}/{file}")


def fetch_elsewhere(names: Sequence[str]) -> str:
    """Which files to fetch on another machine, what to call them, and how to give them, for a message."""
    from huggingface_hub import hf_hub_url

    files = [local_name(name) for name in names]
    places = [hf_hub_url(repo, file, revision=revision or None) for repo, revision, file in map(place_on_hub, names)]
    fetched = " and ".join(f"{place} as {file}" for place, file in zip(places, files, strict=True))
    return f"on a machine with a network fetch {fetched}, put {'it' if len(files) == 1 else 'both'} here, and give " + (
        f"--pretrained {' '.join(files)}"
    )


def local_name(name: str) -> str:
    """What a file of a model's weights is called here."""
    return f"{name.partition('.')[0]}.safetensors"


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
    require_finite_weights(state, path)
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


def require_finite_weights(state: State, path: str | Path) -> None:
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
    remedy = f"give weights of {name}, or --model {fitting}, which they fit" if fitting else f"give weights of {name}"
    return InputError(f"{path} does not fit {name}; {remedy} ({reason})")


def swapped(files: Mapping[str, str | Path]) -> InputError | None:
    """What to say where two files, by the models that they were given for, are each other's; None of others."""
    if len(files) != 2:
        return None
    (one, first), (other, second) = files.items()
    try:
        if not (fits(other, tensors_of(first)) and fits(one, tensors_of(second))):
            return None
    except (InputError, RuntimeError):
        return None
    return InputError(
        f"the files are in the wrong order: {first} has the weights of {other}, and {second} those of {one}; "
        f"give --pretrained {second} {first} (the CNN's first)"
    )


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
