"""How one image is fetched: a file by its path, a range of bytes of a larger file, or pixels in memory."""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenfusion.data.decode import LFS_POINTER, UnreadableImage
from tokenfusion.errors import InputError
from tokenfusion_runtime.files import MAX_FILE_BYTES, read_file

__all__ = ["ByteRanges", "FileBlob", "MemoryBlob", "Paths", "Pixels", "Reader", "as_pixels", "read_file"]


class Reader(ABC):
    """Fetches images one by one, in any order and from any thread or process."""

    @abstractmethod
    def read(self, index: int) -> bytes | Tensor:
        """An image's file, or its pixels, uint8 (3, H, W), where no file holds it.

        Raises:
            UnreadableImage: it cannot be had.
        """

    def fetch(self, number: int) -> None:  # noqa: B027 - most kinds have no shards
        """Have the images of a shard on this machine, so that reading one does not wait."""

    def require_there(self) -> None:  # noqa: B027 - most kinds have looked
        """Refuse images of which most are not there, before any is decoded."""

    def require_room(self) -> None:  # noqa: B027 - most kinds need none
        """Refuse to train where images must be kept on this machine and there is no room for them."""


@dataclass(frozen=True, eq=False)
class Paths(Reader):
    """Image files on disk."""

    root: Path
    paths: list[str]
    """Relative to root, as the file system has them."""

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.root, self.paths[index]))


def refuse_pointer(path: Path) -> None:
    """Refuse a file that Git LFS has not fetched, InputError."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{path}: a pointer of Git LFS, not the file itself; fetch it by `git lfs pull`")


class Blob(Protocol):
    """Bytes in which many image files lie."""

    def open(self) -> BinaryIO:
        """To read from; the caller closes it."""

    def failure(self, reason: str) -> InputError:
        """What to raise where it cannot be read."""


@dataclass(frozen=True)
class FileBlob:
    """A file on this machine, such as a tar."""

    path: Path

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def failure(self, reason: str) -> InputError:
        return UnreadableImage(f"{self.path} {reason}")


@dataclass(frozen=True, eq=False)
class MemoryBlob:
    """Bytes in memory."""

    data: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)  # which shares them

    def failure(self, reason: str) -> InputError:
        return UnreadableImage(f"its archive in memory {reason}")


@dataclass(frozen=True, eq=False)
class ByteRanges(Reader):
    """Image files inside larger ones, each a blob, an offset and a size."""

    blobs: Sequence[Blob]
    numbers: np.ndarray
    """int64 (N,): which blob each image lies in."""
    offsets: np.ndarray
    """int64 (N,), in bytes."""
    sizes: np.ndarray
    """int64 (N,), in bytes."""

    def read(self, index: int) -> bytes:
        blob, size = self.blobs[self.numbers[index]], int(self.sizes[index])
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"the file has {size} bytes, more than {MAX_FILE_BYTES}")
        try:
            with blob.open() as file:
                file.seek(int(self.offsets[index]))
                data = file.read(size)
        except OSError as error:
            raise blob.failure(f"cannot be read: {error}") from error
        if len(data) < size:
            raise blob.failure(f"ends inside an image, after {len(data)} of its {size} bytes")
        return data


@dataclass(frozen=True, eq=False)
class Pixels(Reader):
    """Decoded images of any sizes, one behind another: a few arrays, which cost nothing to fork and little to send."""

    pixels: Tensor
    """uint8, all images' (H, W, 3) in a row: the order of channels that resizing is fastest in."""
    offsets: np.ndarray
    """int64 (N,): where each image begins."""
    sizes: np.ndarray
    """int64 (N, 2): height and width."""

    def read(self, index: int) -> Tensor:
        height, width = self.sizes[index].tolist()
        return self.pixels.as_strided((3, height, width), (1, 3 * width, 3), int(self.offsets[index]))


def as_pixels(data: bytearray, sizes: Sequence[tuple[int, int]]) -> Pixels:
    """Images (H, W, 3) one behind another, of these heights and widths; the bytes are not copied."""
    shapes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    offsets = np.cumsum([0, *(3 * shapes[:, 0] * shapes[:, 1])])[:-1]
    return Pixels(torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte(), offsets, shapes)
