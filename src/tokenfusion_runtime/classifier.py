"""An exported classifier: its graph, its preprocessing, its class names, and how its scores become answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO, IOBase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenfusion_runtime.abstain import SurestErrors, why_silent
from tokenfusion_runtime.description import read_description, require_same, require_whole
from tokenfusion_runtime.engines import ENGINES, Engine
from tokenfusion_runtime.errors import InputError, UnreadableImage
from tokenfusion_runtime.files import read_file
from tokenfusion_runtime.image import Pixels, ValueRange, opened, pillow_image, prepare, to_rgb, whole_rgb
from tokenfusion_runtime.prediction import Answers, Floats, Prediction, cuts_for, require_count

ImageLike = str | Path | bytes | BytesIO | np.ndarray | Image.Image


@dataclass(frozen=True)
class ExportedClassifier:
    """What `tokenfusion export` wrote, ready to answer.

    Attributes:
        description: what `model.json` holds.
        engine: runs the graph.
        note: what the engine does otherwise than asked; "" where nothing.
    """

    description: dict[str, Any]
    engine: Engine
    note: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the outputs."""
        return tuple(self.description["classes"])

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of classes, rather than one."""
        return bool(self.description["thresholds"])

    @property
    def value_range(self) -> ValueRange | None:
        """What is black and white in images of more than 8 bits; None where the run had none."""
        low_high = self.description["preprocess"].get("value_range")
        return None if low_high is None else (low_high[0], low_high[1])

    def probabilities(self, images: Pixels) -> Floats:
        """Calibrated probabilities (B, K) of prepared images, uint8 (B, in_chans, h, w)."""
        fixed, count = self.description["batch"], len(images)
        if fixed and count != fixed:
            if count > fixed:
                return np.concatenate([self.probabilities(images[i : i + fixed]) for i in range(0, count, fixed)])
            images = np.concatenate([images, np.zeros((fixed - count, *images.shape[1:]), np.uint8)])
        try:
            found = self.engine(images)[:count]
        except Exception as error:  # engines raise whatever they like
            raise InputError(
                f"the graph takes no images of {images.shape}: {engine_reason(error)}; model.json and graph do not "
                "belong together, or there is too little memory: export again, or give a smaller batch"
            ) from error
        if found.shape != (count, len(self.classes)):
            raise InputError(
                f"the graph gives {found.shape[-1]} scores an image and model.json names {len(self.classes)} classes; "
                "they do not belong together: export again"
            )
        return found

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
            images: paths, an image file's bytes or BytesIO, arrays uint8 (H, W), (H, W, 3) RGB or (H, W, 4), or PIL
                images; one or several. Of a model with a value range also arrays (H, W) of other numbers.
            topk: how many classes to name.
            batch_size: images in the graph at once.
            abstain: the largest share of wrong answers; see `SurestErrors.cut`.
        """
        return list(self.iter_predictions(as_several(images), topk=topk, batch_size=batch_size, abstain=abstain))

    def iter_predictions(
        self, images: Iterable[ImageLike], *, topk: int = 5, batch_size: int = 64, abstain: float | None = None
    ) -> Iterator[Prediction]:
        """As `predict`, batch by batch, for inputs without end.

        Raises:
            InputError: `topk` names no class, `batch_size` no image, or `abstain` cannot be kept.
        """
        require_count("batch_size", batch_size, "lets no image into the model")
        return self._batches(iter(images), batch_size, self.answers(topk, abstain))

    def answers(self, topk: int = 5, abstain: float | None = None) -> Answers:
        """How its probabilities become predictions; see `predict`."""
        cuts = () if abstain is None else cuts_for(abstain, self.surest_errors)
        return Answers(self.classes, tuple(self.description["thresholds"]), topk, cuts)

    @property
    def surest_errors(self) -> tuple[SurestErrors, ...]:
        """Where the errors on held-out images lie; of a multi-label model for each class."""
        return tuple(map(SurestErrors.from_dict, self.description["surest_errors"]))

    def why_silent(self, abstain: float) -> str:
        """Why every answer is withheld by `abstain`; "" where some may be given."""
        return why_silent(abstain, self.surest_errors)

    def _batches(self, images: Iterator[ImageLike], batch_size: int, answers: Answers) -> Iterator[Prediction]:
        while batch := [self.prepare(image) for image in islice(images, batch_size)]:
            readable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
            yield from answers.predictions(batch, self.probabilities(np.stack(readable)) if readable else ())

    def prepare(self, image: ImageLike) -> tuple[str, Pixels | str]:
        """An image's path, "" where it has none, and its prepared pixels or why there are none."""
        path = str(image) if isinstance(image, str | Path) else ""
        try:
            return path, prepare(self.decode(image), self.description["preprocess"])
        except UnreadableImage as error:
            return path, str(error)

    def decode(self, image: ImageLike) -> Image.Image:
        """Any way to give an image, as RGB.

        Raises:
            UnreadableImage: it is damaged or too large.
            InputError: it is none of these ways.
        """
        limit = self.description["max_pixels"]
        if isinstance(image, str | Path | bytes | BytesIO):
            content = content_of(image)
            with opened(content, limit) as file:
                return whole_rgb(file, content, self.value_range)
        try:
            return to_rgb(pillow_image(image, limit, self.value_range), self.value_range)
        except InputError:
            raise
        except (OSError, ValueError, SyntaxError) as error:  # its file is read only now
            raise UnreadableImage(f"damaged image: {error}") from error


def as_several(images: Any) -> Iterable[Any]:
    """One image or several, as several; what holds bytes, is an open file or has no order is one."""
    one = isinstance(images, ImageLike | bytearray | memoryview | IOBase | dict | set)
    return [images] if one or not isinstance(images, Iterable) else images


def content_of(image: str | Path | bytes | BytesIO) -> bytes:
    """The bytes of an image file."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, BytesIO):
        return read_file(image)
    if image.closed:
        raise InputError("a BytesIO that is closed is not an image; give its bytes, or close it later")
    return image.getvalue()


def load(folder: str | Path, *, threads: int = 0) -> ExportedClassifier:
    """An exported classifier.

    Args:
        folder: what `tokenfusion export --out` wrote.
        threads: of the engine; 0 leaves it the choice.

    Raises:
        InputError: it is no such folder, of a newer version, damaged or changed, or its engine is not installed.
    """
    folder = Path(folder)
    description = read_description(folder)
    engine = ENGINES.get(description["format"])
    if engine is None:
        raise InputError(f"{folder} is of format {description['format']}, which `tokenfusion` runs; see its README.md")
    require_whole(folder, description)
    try:
        run, note, inside = engine(folder / description["files"][0], description["precision"], threads)
    except InputError:
        raise
    except Exception as error:  # engines raise whatever they like
        raise InputError(
            f"{folder} cannot be run: {engine_reason(error)}; update the engine, or export again"
        ) from error
    require_same(folder, description, inside)
    return ExportedClassifier(description, run, note)


def engine_reason(error: Exception) -> str:
    """What an engine says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("Exception from ")]
    return next(filter(None, lines), type(error).__name__)[:300].rstrip(".")
