"""Labelled images and their pixels. They are decoded once before training: the readable ones are kept in memory if they
fit, the others listed; training images in shards, which may be too many for that, are decoded as they are drawn."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenfusion.data.dataset import Dataset, classes_in, quoted
from tokenfusion.data.decode import UnreadableImage, decode_ahead
from tokenfusion.data.readers import as_pixels
from tokenfusion.errors import InputError
from tokenfusion.files import read_csv, write_csv


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    path: str
    label: str
    split: str
    reason: str


SKIPPED = tuple(column.name for column in fields(Skipped))
"""Columns of the file that lists them."""


@dataclass(eq=False)
class Images:
    """Readable, labelled images; indexing gives one as uint8 (3, H, W), from memory or decoded anew."""

    dataset: Dataset
    max_pixels: int
    cached: bool = False
    """Whether the decoded images are in memory."""
    checksums: np.ndarray | None = None
    """uint64 (N,): of the pixels as they were first read, by which an image is known, and one that changes noticed."""
    checked: bool = True
    """Whether every image was decoded once; where not, an unreadable one shows while training."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Names of JPEGs whose data is damaged, and what libjpeg says of each; of those that Pillow decodes (turned or of
    inks) it says nothing."""
    labels: Tensor = field(init=False)
    """int64 (N,); of multi-label data bool (N, K)."""
    weights: Tensor | None = field(init=False)
    """float32 (N,): how much each image's loss counts; None where all count the same."""

    def __post_init__(self) -> None:
        weights = self.dataset.weights
        self.labels = torch.from_numpy(self.dataset.labels)
        self.weights = None if weights is None else torch.from_numpy(weights).float()

    @property
    def names(self) -> list[str]:
        return self.dataset.names

    def __len__(self) -> int:
        return len(self.dataset)

    def subset(self, indices: np.ndarray) -> "Images":
        """Some of the images, in the order of their indices."""
        checksums = None if self.checksums is None else self.checksums[indices]
        chosen = replace(self, dataset=self.dataset.subset(indices), checksums=checksums)
        chosen.weights = None if self.weights is None else self.weights[indices]
        return chosen

    def __getitem__(self, index: int) -> Tensor:
        try:
            image = self.dataset.decode(index, self.max_pixels)
        except UnreadableImage as error:
            if not self.checked:
                raise
            raise UnreadableImage(f"{self.names[index]}: {error}; it was readable before, restore it") from error
        if self.checksums is not None and not self.cached and checksum(image) != self.checksums[index]:
            raise UnreadableImage(f"{self.names[index]}: its pixels have changed since the run read them; restore it")
        return image


def unread_images(dataset: Dataset, indices: np.ndarray, max_pixels: int) -> Images:
    """Images that nobody has looked at yet, for there are too many: each is decoded whenever it is wanted."""
    return Images(dataset.subset(indices), max_pixels, checked=False)


def read_images(
    dataset: Dataset,
    indices: Sequence[int] | np.ndarray,
    *,
    max_pixels: int,
    cache_bytes: int,
    progress: Callable[[int, int], None] | None = None,
    split: str = "",
) -> tuple[Images, list[Skipped]]:
    """Decode every image once: to know which are readable, and to keep them if they all fit.

    Args:
        dataset: where the images are.
        indices: which of them, in the order wanted.
        max_pixels: largest height × width that is decoded.
        cache_bytes: most bytes of decoded pixels to keep; above, images are decoded anew each time.
        progress: called now and then with the number of images done and their total.
        split: what Skipped calls these images' split.

    Returns:
        the readable images in order, and the others; none is ever replaced.

    Raises:
        InputError: most of the files that a list names do not exist.
    """
    dataset.reader.require_there()
    pixels = bytearray()  # grows in place, so that no second copy of the images ever exists
    sizes: list[tuple[int, int]] = []
    readable: list[int] = []
    checksums: list[int] = []
    skipped: list[Skipped] = []
    keep = True
    damaged: dict[str, str] = {}
    images = decode_ahead(
        map(int, indices),
        lambda index: dataset.decode(index, max_pixels),
        on_damage=lambda index, said: damaged.setdefault(dataset.names[index], said),
    )
    for done, (index, image) in enumerate(images):
        if progress is not None and done % 64 == 0:
            progress(done, len(indices))
        if isinstance(image, UnreadableImage):
            skipped.append(Skipped(dataset.names[index], dataset.label_text(index), split, str(image)))
            continue
        readable.append(index)
        checksums.append(checksum(image))
        keep = keep and len(pixels) + image.nbytes <= cache_bytes
        if keep:
            pixels.extend(image.permute(1, 2, 0).contiguous().numpy().data)
            sizes.append((image.shape[1], image.shape[2]))
        else:
            pixels.clear()
    if progress is not None:
        progress(len(indices), len(indices))
    chosen = dataset.subset(readable)
    if keep:
        chosen = replace(chosen, reader=as_pixels(pixels, sizes), rows=None, shards=None)
    found = Images(chosen, max_pixels, keep, np.array(checksums, dtype=np.uint64), damaged=damaged)
    return found, skipped


def sample_images(dataset: Dataset, indices: np.ndarray, count: int, *, max_pixels: int, cache_bytes: int) -> Images:
    """Some of many images, to measure how fast these come: kept in memory where all of them would be.

    They are spread evenly or, in shards, the first ones: few shards are fetched, and none is looked at before.

    Args:
        dataset: where the images are.
        indices: which of them there are to choose from.
        count: how many are wanted; all if there are fewer.
        max_pixels, cache_bytes: as in `read_images`, of all the images.
    """
    if dataset.shards is not None:
        return unread_images(dataset, indices[:count], max_pixels)
    chosen = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(np.int64)]
    share = cache_bytes * len(chosen) // len(indices)
    return read_images(dataset, chosen, max_pixels=max_pixels, cache_bytes=share)[0]


def checksum(image: Tensor) -> int:
    """CRC-32 and Adler-32 of an image's pixels (3, H, W), of 64 bits together: of what is trained on, so that another
    date changes nothing, and no two of millions of images agree by chance."""
    pixels = image.permute(1, 2, 0).contiguous().numpy().data
    return zlib.crc32(pixels) << 32 | zlib.adler32(pixels)


def require_every_class(images: Images, classes: tuple[str, ...], skipped: Sequence[Skipped] = ()) -> None:
    """Refuse training images among which a class has none that is readable.

    Args:
        images: the readable ones.
        classes: every class.
        skipped: the images that could not be read.

    Raises:
        InputError: naming those classes, and why the first of their images could not be read.
    """
    present = classes_in(images.labels.numpy())
    missing = [name for label, name in enumerate(classes) if label not in present]
    if missing:
        first = next((image for image in skipped if image.split == "train" and image.label in missing), None)
        why = f" (the first is {first.path}: {first.reason})" if first else ""
        raise InputError(
            f"no readable training image of class {quoted(missing)}{why}; replace the damaged files or remove the class"
        )


def write_skipped(path: Path, skipped: list[Skipped]) -> None:
    """Write the images that were left out as a CSV `path,label,split,reason`."""
    write_csv(path, SKIPPED, map(astuple, skipped))


def read_skipped(path: Path) -> list[Skipped]:
    """The images that such a file has noted; none where there is no file."""
    return [Skipped(*(row[name] for name in SKIPPED)) for row in read_csv(path, SKIPPED)] if path.exists() else []


def skipped_in(run: Path) -> list[Skipped]:
    """All images that a run's processes have noted."""
    return [image for path in sorted(run.glob("skipped*.csv")) for image in read_skipped(path)]
