"""Images that have all been looked at once: the readable ones, kept in memory if they fit, and a list of the others."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenfusion.data.dataset import Dataset, classes_in, quoted
from tokenfusion.data.decode import UnreadableImage, decode_ahead
from tokenfusion.errors import InputError
from tokenfusion.files import write_csv


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    path: str
    label: str
    split: str
    reason: str


@dataclass(frozen=True, eq=False)
class PixelCache:
    """Decoded images of any sizes, one behind another: a few tensors, which cost nothing to fork and little to send."""

    pixels: Tensor
    """uint8, all images' (H, W, 3) in a row: the order of channels that resizing is fastest in."""
    offsets: np.ndarray
    """int64 (N,): where each image begins."""
    sizes: np.ndarray
    """int64 (N, 2): height and width."""

    def __getitem__(self, index: int) -> Tensor:
        height, width = self.sizes[index].tolist()
        return self.pixels.as_strided((3, height, width), (1, 3 * width, 3), int(self.offsets[index]))


@dataclass(eq=False)
class Images:
    """Readable, labelled images; indexing gives one as uint8 (3, H, W), from memory or decoded anew."""

    labels: Tensor
    """int64 (N,); of multi-label data bool (N, K)."""
    names: list[str]
    source: Dataset | None
    """What to decode from; None when the cache holds everything."""
    indices: np.ndarray
    """int64 (N,): which of the source's images these are."""
    max_pixels: int
    cache: PixelCache | None
    checksums: np.ndarray | None = None
    """uint32 (N,): of the pixels as they were first read, by which an image that changes is noticed."""
    weights: Tensor | None = None
    """float32 (N,): how much each image's loss counts; None where all count the same."""
    checked: bool = True
    """Whether every image was decoded once; where not, an unreadable one shows while training."""

    @property
    def shards(self) -> np.ndarray | None:
        """int64 (N,): the shard of each image; None where they can be had in any order at the same cost."""
        numbers = None if self.source is None else self.source.shard_numbers
        return None if numbers is None else numbers[self.indices]

    @property
    def cached(self) -> bool:
        """Whether the decoded images are in memory."""
        return self.cache is not None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        if self.cache is not None:
            return self.cache[index]
        assert self.source is not None
        try:
            image = self.source.decode(int(self.indices[index]), self.max_pixels)
        except UnreadableImage as error:
            if not self.checked:
                raise
            raise UnreadableImage(f"{self.names[index]}: {error}; it was readable before, restore it") from error
        if self.checksums is not None and checksum(image) != self.checksums[index]:
            raise UnreadableImage(f"{self.names[index]}: its pixels have changed since the run read them; restore it")
        return image


def unread_images(source: Dataset, indices: np.ndarray, max_pixels: int) -> Images:
    """Images that nobody has looked at yet, for there are too many: each is decoded whenever it is wanted."""
    return Images(
        labels=torch.from_numpy(source.labels[indices]),
        names=[source.names[index] for index in indices],
        source=source,
        indices=indices,
        max_pixels=max_pixels,
        cache=None,
        weights=None if source.weights is None else torch.from_numpy(source.weights[indices]).float(),
        checked=False,
    )


def read_images(
    source: Dataset,
    indices: Sequence[int] | np.ndarray,
    *,
    max_pixels: int,
    cache_bytes: int,
    progress: Callable[[int, int], None] | None = None,
    split: str = "",
) -> tuple[Images, list[Skipped]]:
    """Decode every image once: to know which are readable, and to keep them if they all fit.

    Args:
        source: where the images are.
        indices: which of them, in the order wanted.
        max_pixels: largest height × width that is decoded.
        cache_bytes: most bytes of decoded pixels to keep; above, images are decoded anew each time.
        progress: called now and then with the number of images done and their total.
        split: what Skipped calls these images' split.

    Returns:
        the readable images in order, and the others; none is ever replaced.
    """
    pixels = bytearray()  # grows in place, so that no second copy of the images ever exists
    sizes: list[tuple[int, int]] = []
    readable: list[int] = []
    checksums: list[int] = []
    skipped: list[Skipped] = []
    keep = True
    images = decode_ahead(map(int, indices), lambda index: source.decode(index, max_pixels))
    for done, (index, image) in enumerate(images):
        if progress is not None and done % 64 == 0:
            progress(done, len(indices))
        if isinstance(image, UnreadableImage):
            skipped.append(Skipped(source.names[index], source.label_text(index), split, str(image)))
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
    found = Images(
        labels=torch.from_numpy(source.labels[readable]),
        names=[source.names[index] for index in readable],
        source=None if keep else source,
        indices=np.array(readable, dtype=np.int64),
        max_pixels=max_pixels,
        cache=as_cache(pixels, sizes) if keep else None,
        checksums=np.array(checksums, dtype=np.uint32),
        weights=None if source.weights is None else torch.from_numpy(source.weights[readable]).float(),
    )
    return found, skipped


def sample_images(source: Dataset, indices: np.ndarray, count: int, *, max_pixels: int, cache_bytes: int) -> Images:
    """Some of many images, to measure how fast these come: kept in memory where all of them would be.

    They are spread evenly or, in shards, the first ones: few shards are fetched, and none is looked at before.

    Args:
        source: where the images are.
        indices: which of them there are to choose from.
        count: how many are wanted; all if there are fewer.
        max_pixels, cache_bytes: as in `read_images`, of all the images.
    """
    if source.shard_numbers is not None:
        return unread_images(source, indices[:count], max_pixels)
    chosen = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(np.int64)]
    share = cache_bytes * len(chosen) // len(indices)
    return read_images(source, chosen, max_pixels=max_pixels, cache_bytes=share)[0]


def checksum(image: Tensor) -> int:
    """CRC-32 of an image's pixels (3, H, W): of what is trained on, so that another date changes nothing."""
    return zlib.crc32(image.permute(1, 2, 0).contiguous().numpy().data)


def as_cache(pixels: bytearray, sizes: list[tuple[int, int]]) -> PixelCache:
    shapes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    offsets = np.cumsum([0, *(3 * shapes[:, 0] * shapes[:, 1])])[:-1]
    flat = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else torch.empty(0, dtype=torch.uint8)
    return PixelCache(flat, offsets, shapes)


def require_every_class(images: Images, classes: tuple[str, ...]) -> None:
    """Refuse training images among which a class has none that is readable.

    Raises:
        InputError: naming those classes.
    """
    present = classes_in(images.labels.numpy())
    missing = [name for label, name in enumerate(classes) if label not in present]
    if missing:
        raise InputError(
            f"no readable training image of class {quoted(missing)}; replace the damaged files or remove the class"
        )


def write_skipped(path: Path, skipped: list[Skipped]) -> None:
    """Write the images that were left out as a CSV `path,label,split,reason`."""
    write_csv(path, [field.name for field in fields(Skipped)], map(astuple, skipped))
