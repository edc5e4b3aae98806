"""A finished run as a folder that tokenfusion, timm and transformers load, with a model card; sent to a hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import filter_pretrained_cfg
from torch import nn

from tokenfusion.checkpoint import checksum, contiguous_of, load_description, save_tensors
from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.files import make_folder, own_folder, write_json, write_text
from tokenfusion.hardware import as_placed
from tokenfusion.hub import require_repo, send
from tokenfusion.json_files import read_json
from tokenfusion.model_card import model_card
from tokenfusion.models import default_config
from tokenfusion.models.registration import EXPRESSION
from tokenfusion.recipe import load_recipe

NAMES = ("model.safetensors", "model.json", "config.json", "README.md")
OF_THE_SOURCE = ("architecture", "tag", "license", "description", "origin_url", "label_names", "label_descriptions")
"""What a config says of the weights that a model started from, and which are no longer true of it."""


def push(run: Path, repo: str, *, really: bool, public: bool) -> tuple[list[Path], str]:
    """Write a run's folder for a hub, and send it if it is really meant.

    Args:
        run: a finished run.
        repo: `ORG/NAME`.
        really: whether to send anything.
        public: whether anyone may read the repository.

    Returns:
        The files that are sent, or would be; and the commit's address, "" where nothing was sent.

    Raises:
        InputError: not a finished run, no name of a repository, or what `send` and `write_folder` refuse.
    """
    require_repo(repo)
    load_description(run)  # makes no folder in what is no run
    with own_folder(run / "hub") as folder:
        files = write_folder(run, folder, repo)
        return files, send(files, repo, public=public, message=f"tokenfusion: {run.name}") if really else ""


def write_folder(run: Path, folder: Path, repo: str) -> list[Path]:
    """Write a run as a folder that `Classifier.load`, timm's `local-dir:` and transformers' `from_pretrained` take.

    A card that is there already is kept, since its reader may have added to it.

    Args:
        run: a finished run.
        folder: where to.
        repo: what the card calls the model, `ORG/NAME`.

    Returns:
        The files, in the order of `NAMES`.

    Raises:
        InputError: not a finished run, or timm does not build the same model of the folder.
    """
    classifier = Classifier.load(run, torch.device("cpu"))
    make_folder(folder)
    weights, description, config, card = files = [folder / name for name in NAMES]
    tensors = classifier.model.state_dict()
    save_tensors(weights, tensors)
    named = {"weights": checksum(contiguous_of(tensors))}  # an older run's tensors may have had other names
    described = load_description(run) | named
    write_json(description, described)
    write_json(config, timm_config(classifier))
    images = require_parity(classifier, folder)
    if not card.exists():
        evaluation = run / "evaluation.json"
        measured = read_json(evaluation, "run `tokenfusion evaluate` again") if evaluation.exists() else None
        write_text(card, model_card(repo, described, load_recipe(run / "recipe.toml"), measured, images))
    return files


def timm_config(classifier: Classifier) -> dict[str, Any]:
    """A classifier's `config.json`, in the format of timm that transformers' wrapper of it reads too."""
    preprocess, model = classifier.preprocess, classifier.model
    config = default_config(model)
    arguments: dict[str, Any] = {"in_chans": preprocess.in_chans}
    if "(" in classifier.name:
        arguments["expression"] = classifier.name
    if "(" in classifier.name or config["fixed_input_size"]:
        arguments["img_size"] = list(preprocess.img_size)
    kept = filter_pretrained_cfg(config, remove_source=True, remove_null=True)
    return {
        "architecture": EXPRESSION if "(" in classifier.name else classifier.name,
        "num_classes": len(classifier.classes),
        "num_features": model.num_features,
        "label_names": list(classifier.classes),
        "model_args": arguments,
        "pretrained_cfg": {key: value for key, value in kept.items() if key not in OF_THE_SOURCE}
        | {
            "input_size": [preprocess.in_chans, *preprocess.img_size],
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "crop_pct": preprocess.crop_pct,
            "interpolation": getattr(preprocess, "interpolation", "bilinear"),
            "num_classes": len(classifier.classes),
            "custom_load": False,
        },
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperForImageClassification"],
    } | ({"problem_type": "multi_label_classification"} if classifier.multi_label else {})


def require_parity(classifier: Classifier, folder: Path, count: int = 4) -> int:
    """Refuse a folder of which timm builds another model than the run's: logits must be equal to the bit.

    Returns:
        How many images were compared, of noise: equal weights in equal modules leave nothing to real ones.
    """
    shape = (count, classifier.preprocess.in_chans, *classifier.preprocess.img_size)
    batch = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = classifier.to_input(batch)
    other: nn.Module = as_placed(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), classifier.device)
    with torch.inference_mode():
        if not torch.equal(other(images), classifier.model(images)):
            raise InputError(f"timm builds another model of {folder} than the run's; report it with {folder.parent}")
    return count


def listing(files: Sequence[Path], sent_to: str, repo: str, public: bool) -> list[str]:
    """What was or would be sent, in lines."""
    lines = [f"  {path.name:<20} {path.stat().st_size:>13,} bytes" for path in files]
    kind = "public" if public else "private"
    if sent_to:
        return [*lines, f"sent to {sent_to} ({kind})"]
    return [f"would be sent to {repo} ({kind}):", *lines, "nothing was sent; look at the card, then give --send"]
