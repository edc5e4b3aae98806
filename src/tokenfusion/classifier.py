"""Classifier: a model, its preprocessing and its class names; what every verb after training starts from."""

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

import timm
import torch
from torch import Tensor, nn

from tokenfusion.checkpoint import (
    FORMAT,
    checksum,
    contiguous_of,
    load_description,
    load_tensors,
    load_weights_exactly,
    save_tensors,
)
from tokenfusion.data.decode import UnreadableImage, decode_ahead, decode_given
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.formatting import counted
from tokenfusion.hardware import Precision, as_dtype, as_placed, autocast, default_device, hardware_name
from tokenfusion.hub import fetch, is_reference
from tokenfusion.layers.packed import pack
from tokenfusion.models import create_model, default_config
from tokenfusion.models.cost import count_macs, count_parameters
from tokenfusion.models.pretrained import Pretrained, find_weights
from tokenfusion.places import resume_command
from tokenfusion.recipe import Recipe
from tokenfusion.version import __version__
from tokenfusion_runtime.abstain import SurestErrors
from tokenfusion_runtime.classifier import ImageLike, as_several
from tokenfusion_runtime.prediction import Answers, Prediction, cuts_for, require_count

# a child of fork has none of the threads that its parent computed with, and would wait for them forever
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

Prepared = tuple[str, Tensor | str]
"""An image's path, "" where it has none, and its pixels (in_chans, h, w) as a model is given them, or why not."""
Item = TypeVar("Item")


@dataclass(frozen=True, repr=False)
class Classifier:
    """A model that knows how its images are prepared and what its outputs are called.

    Attributes:
        name: of the model, as `create_model` takes it.
        model: gives logits (B, len(classes)).
        classes: names in the order of the outputs.
        preprocess: from a decoded image to the model's input.
        device: where the model is.
        precision: arithmetic of inference.
        max_pixels: largest image, in pixels, that is decoded at all.
        thresholds: of a multi-label model, the score from which an image has each class; empty of any other model.
        temperature: what logits are divided by, so that scores are shares of right answers.
        surest_errors: where the errors on held-out images lie, by which `abstain` goes; empty where unknown.
        began_with: the pretrained weights before training: model, source and SHA-256 of each file.
    """

    name: str
    model: nn.Module
    classes: tuple[str, ...]
    preprocess: Preprocess
    device: torch.device
    precision: Precision = "auto"
    max_pixels: int = Recipe.max_pixels
    thresholds: tuple[float, ...] = ()
    temperature: float = 1.0
    surest_errors: tuple[SurestErrors, ...] = ()
    began_with: tuple[Mapping[str, str], ...] = ()

    def __repr__(self) -> str:
        height, width = self.preprocess.img_size
        classes = ", ".join(self.classes[:5]) + ", ..." * (len(self.classes) > 5)
        return (
            f"<{type(self).__name__}: {self.name}, {height}×{width}, {counted(len(self.classes), 'class')}: {classes}>"
        )

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of classes, rather than one."""
        return bool(self.thresholds)

    @classmethod
    def create(
        cls,
        name: str,
        classes: Sequence[str],
        *,
        in_chans: int = 3,
        img_size: tuple[int, int] | None = None,
        precision: Precision = "auto",
        device: torch.device | None = None,
        drop_path: float = 0.0,
        crop_pct: float | None = 1.0,
        pretrained: Pretrained = False,
        max_pixels: int = Recipe.max_pixels,
        multi_label: bool = False,
    ) -> Self:
        """Build a model that was not trained for these classes, with the preprocessing that its variant names.

        Args:
            name, in_chans, img_size: as in `create_model`.
            classes: names in the order of the outputs.
            precision: arithmetic of inference.
            device: where to put the model; the first GPU where there is one, else the CPU, when not given.
            drop_path: largest rate of stochastic depth while training.
            crop_pct: share of an image's sides that is looked at, in images that are resized bilinearly; None for both
                as pretrained weights of this model want them.
            pretrained: as in `create_model`.
            max_pixels: largest image that is decoded at all.
            multi_label: whether an image has any number of the classes; the thresholds are 0.5.
        """
        arguments: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        if weights := find_weights(name, pretrained):
            arguments["pretrained"] = [file.path for file in weights]
        model = create_model(name, num_classes=len(classes), in_chans=in_chans, img_size=img_size, **arguments)
        config = default_config(model)
        mean, std = tuple(config["mean"]), tuple(config["std"])
        preprocess = Preprocess(
            img_size=img_size or tuple(config["input_size"][1:]),
            in_chans=in_chans,
            mean=mean if in_chans == 3 else (sum(mean) / len(mean),),
            std=std if in_chans == 3 else (sum(std) / len(std),),
            crop_pct=crop_pct or config["crop_pct"],
            interpolation="bilinear" if crop_pct else config["interpolation"],
        )
        device = device or default_device()
        thresholds = (0.5,) * len(classes) if multi_label else ()
        placed = as_placed(model, device)
        return cls(
            name,
            placed,
            tuple(classes),
            preprocess,
            device,
            precision,
            max_pixels,
            thresholds,
            began_with=tuple(file.to_dict() for file in weights),
        )

    @classmethod
    def load(cls, run: str | Path, device: torch.device | None = None) -> Self:
        """Load a trained run.

        Args:
            run: the folder that `tokenfusion train --out` wrote, or `hf://ORG/NAME@REVISION` of a hub, of which tensors
                and JSON of one commit are fetched.
            device: where to put the model; the first GPU where there is one, else the CPU, when not given.

        Raises:
            InputError: not a run, not finished, of a newer version, or damaged; or the hub does not give it.
        """
        run = fetch(run) if is_reference(run) else Path(run)
        description = load_description(run)
        weights = run / "model.safetensors"
        if not weights.exists():
            raise InputError(f"{run} is not finished: it has no weights yet; go on with `{resume_command(run)}`")
        preprocess = Preprocess.from_dict(description["preprocess"])
        classifier = cls.create(
            description["name"],
            description["classes"],
            in_chans=preprocess.in_chans,
            img_size=preprocess.img_size,
            precision=description["precision"],
            max_pixels=description["max_pixels"],
            device=device,
        )
        classifier = replace(
            classifier,
            preprocess=preprocess,
            thresholds=tuple(description["thresholds"]),
            temperature=description["temperature"],
            surest_errors=tuple(map(SurestErrors.from_dict, description["surest_errors"])),
            began_with=tuple(description["began_with"]),
        )
        tensors, _ = load_tensors(weights, description["weights"])
        load_weights_exactly(classifier.model, tensors, weights)
        classifier.model.eval()
        return classifier

    def save(self, run: Path) -> None:
        """Write a run's end: `model.json`, which names the checksum of the weights, and then the weights."""
        weights = self.model.state_dict()
        self.save_description(run, checksum(contiguous_of(weights)))
        save_tensors(run / "model.safetensors", weights)  # a run that has it is finished

    def save_description(self, run: Path, weights: str = "") -> None:
        """Write `model.json`: everything but the weights, of which it holds the checksum, "" while a run goes on."""
        in_chans, img_size = self.preprocess.in_chans, self.preprocess.img_size
        description = {
            "format": FORMAT,
            "name": self.name,
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_dict(),
            "precision": self.precision,
            "max_pixels": self.max_pixels,
            "multi_label": self.multi_label,
            "thresholds": list(self.thresholds),
            "temperature": self.temperature,
            "surest_errors": [asdict(errors) for errors in self.surest_errors],
            "parameters": count_parameters(self.model),
            "macs": count_macs(self.name, num_classes=len(self.classes), in_chans=in_chans, img_size=img_size),
            "versions": {
                "tokenfusion": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
            "hardware": hardware_name(self.device),
            "began_with": list(self.began_with),
            "weights": weights,
        }
        write_json(run / "model.json", description)

    @torch.inference_mode()
    def logits(self, batch: Tensor) -> Tensor:
        """Logits (B, K) in float32 on the CPU, of prepared images: uint8 (B, in_chans, h, w)."""
        self.model.eval()
        images = self.to_input(batch)
        with autocast(self.device, self.precision):
            return self.model(images).float().cpu()

    @torch.inference_mode()
    def logits_and_embeddings(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """As `logits`, with the vectors (B, F) that the head makes them of, in float32 on the CPU."""
        model: Any = self.model.eval()
        images = self.to_input(batch)
        with autocast(self.device, self.precision):
            features = model.forward_features(images)
            logits, vectors = model.forward_head(features), model.forward_head(features, pre_logits=True)
        return logits.float().cpu(), vectors.flatten(1).float().cpu()

    def to_input(self, batch: Tensor) -> Tensor:
        """Prepared images, uint8 (B, in_chans, h, w), as the model's float input on its device."""
        return self.preprocess.normalize(batch.to(self.device, non_blocking=True)).contiguous(
            memory_format=torch.channels_last
        )

    def packed(self) -> Self:
        """The same for inference alone, faster on a CPU: what its weights are cast and folded to is kept between calls.

        Its answers are the same, and it does not see what becomes of this one's weights.
        """
        if self.device.type != "cpu":
            return self
        return replace(self, model=pack(self.model.eval(), as_dtype(self.precision, self.device)))

    def uncalibrated(self) -> Self:
        """The same classifier, whose scores are those of the logits as they are; it decides alike."""
        logits = torch.tensor(self.thresholds, dtype=torch.float64).clamp(0, 1).logit() * self.temperature
        return replace(self, temperature=1.0, surest_errors=(), thresholds=tuple(logits.sigmoid().tolist()))

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        topk: int = 5,
        batch_size: int = 64,
        abstain: float | None = None,
    ) -> list[Prediction]:
        """Classify images, one prediction each, in order; an unreadable file gives a prediction with `error`.

        Args:
            images: paths, an image file's bytes or BytesIO, arrays (H, W), (H, W, 3) RGB or (H, W, 4) RGBA of uint8
                (OpenCV gives BGR: turn it by `[..., ::-1]`), or PIL images; one or a sequence. Of a model with a value
                range also arrays (H, W) of other numbers.
            topk: how many classes to name.
            batch_size: images in the model at once.
            abstain: the largest share of wrong answers; where the model is too unsure for that, it names no class
                (`Prediction.abstains`), or of a multi-label model says neither yes nor no (`Prediction.unsure`). See
                `SurestErrors.cut` for what is guaranteed.
        """
        several = [images] if isinstance(images, Tensor) else as_several(images)
        return list(self.iter_predictions(several, topk=topk, batch_size=batch_size, abstain=abstain))

    def iter_predictions(
        self,
        images: Iterable[ImageLike],
        *,
        topk: int = 5,
        batch_size: int = 64,
        abstain: float | None = None,
        on_damage: Callable[[str, str], object] | None = None,
    ) -> Iterator[Prediction]:
        """As `predict`, batch by batch, for inputs without end; few images wait in memory.

        Args:
            images, topk, batch_size, abstain: as in `predict`.
            on_damage: called with the path of each JPEG whose data is damaged and read as far as it goes, and with what
                libjpeg says of it.

        Raises:
            InputError: `topk` names no class, `batch_size` no image, or `abstain` cannot be kept.
        """
        require_count("batch_size", batch_size, "lets no image into the model")
        answers = self.answers(topk, abstain)
        batches = batched(self.prepare_ahead(images, on_damage), batch_size)
        return (prediction for batch in batches for prediction in self.predict_prepared(batch, answers))

    def answers(self, topk: int = 5, abstain: float | None = None) -> Answers:
        """How its probabilities become predictions; see `predict`."""
        cuts = () if abstain is None else cuts_for(abstain, self.surest_errors)
        return Answers(self.classes, self.thresholds, topk, cuts)

    def prepare_ahead(
        self, images: Iterable[ImageLike], on_damage: Callable[[str, str], object] | None = None
    ) -> Iterator[Prepared]:
        """What `prepare` gives of each image, in order; files are decoded by a few threads, a few ahead.

        Arrays and PIL images are prepared before the next is asked for, which may be in the same memory.
        """
        given = (image if isinstance(image, str | Path) else self.prepare(image) for image in images)
        for image, found in decode_ahead(
            given,
            lambda image: image[1] if isinstance(image, tuple) else self.prepared(image),
            on_damage=None if on_damage is None else lambda image, said: on_damage(str(image), said),
        ):
            if isinstance(image, tuple):
                yield image
            else:
                yield str(image), str(found) if isinstance(found, UnreadableImage) else found

    def prepare(self, image: ImageLike) -> Prepared:
        """An image's path, and its prepared pixels or why there are none."""
        path = str(image) if isinstance(image, str | Path) else ""
        try:
            return path, self.prepared(image)
        except UnreadableImage as error:
            return path, str(error)

    def prepared(self, image: ImageLike) -> Tensor:
        """An image's pixels as the model wants them, or UnreadableImage."""
        return self.preprocess.resize(decode_given(image, self.max_pixels, self.preprocess.value_range))

    def predict_prepared(self, prepared: Sequence[Prepared], answers: Answers) -> Iterator[Prediction]:
        """Predictions of what `prepare` gave, one each, in order."""
        readable = [image for _, image in prepared if isinstance(image, Tensor)]
        scores = self.scores(self.logits(torch.stack(readable))).numpy() if readable else ()
        return answers.predictions(prepared, scores)

    def scores(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities (B, K): of one class an image by softmax, of any number of them by sigmoid."""
        logits = logits / self.temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists of `size`, of which the last may be shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
