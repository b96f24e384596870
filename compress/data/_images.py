"""Labelled images: in memory, or decoded from files when they are asked for; what is held back."""

from __future__ import annotations

import io
import math
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data._pictures import (
    Fit,
    ImageSize,
    Pictures,
    opened_picture,
    sides,
    to_8_bit,
    upright_size,
)
from compress.errors import DataError, unreadable

LARGEST_IN_MEMORY_BYTES = 1 << 30
T = TypeVar("T")
EVERY = 10  # every tenth image is a test image where images are listed in files
SPLITS = {  # by what people call them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TEST = 0.2  # share of images that become the test set where data has none
Indices = Sequence[int] | NDArray[np.int64]


class Hash(Protocol):
    """What hashlib's objects offer."""

    def update(self, data: bytes, /) -> None:
        """Add ``data`` to the hash."""


class LabelledImages(Protocol):
    """Labelled images of one shape."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, (N,)."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        ...

    def __len__(self) -> int:
        """Return how many images there are."""
        ...

    def take(self, indices: Indices) -> Tensor:
        """Return the images at ``indices``, (B, C, H, W) uint8."""
        ...

    def update_hash(self, digest: Hash) -> None:
        """Add what identifies these images to ``digest``."""


@dataclass(frozen=True)
class MemoryImages:
    """Images held as one uint8 tensor, (N, C, H, W)."""

    pixels: Tensor
    labels: Any  # classes (N,), or what else targets are
    files: FileImages | None = None  # that they were decoded from

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> Tensor:
        return self.pixels[torch.as_tensor(np.asarray(indices, dtype=np.int64))]

    def update_hash(self, digest: Hash) -> None:
        digest.update(self.pixels.numpy().tobytes())


@dataclass(frozen=True)
class Subset:
    """Some of the images of another set."""

    images: LabelledImages
    indices: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.images.labels[self.indices]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Indices) -> Tensor:
        return self.images.take(self.indices[np.asarray(indices, dtype=np.int64)])

    def update_hash(self, digest: Hash) -> None:
        self.images.update_hash(digest)
        digest.update(self.indices.tobytes())


@dataclass(frozen=True)
class Names:
    """Many strings held as one: a million names take as much memory as their letters."""

    text: bytes
    ends: NDArray[np.int64]  # where each name ends in ``text``

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Return ``names``, taken one by one."""
        text, ends = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        return cls(bytes(text), np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> str:
        start = int(self.ends[position - 1]) if position else 0
        return os.fsdecode(self.text[start : int(self.ends[position])])

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True)
class FileImages:
    """Images decoded from files and fitted to one size."""

    folder: Path
    names: Names  # of the files, from ``folder`` on
    labels: NDArray[np.int64]
    fit: Fit
    channels: int
    workers: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.fit.size

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Indices) -> Tensor:
        def one(index: int) -> Tensor:
            path = self.folder / self.names[index]
            return decoded(path, self.fit, self.channels, where=str(path))

        return in_parallel(one, indices, self.workers)

    def stored(self, index: int) -> tuple[int, Callable[[], bytes]]:
        path = self.folder / self.names[index]
        return path.stat().st_size, path.read_bytes

    def update_hash(self, digest: Hash) -> None:
        for name in self.names:  # and sizes: the content would take too long
            path = self.folder / name
            digest.update(f"{path.parent.name}/{path.name}:{path.stat().st_size}\n".encode())


@dataclass(frozen=True)
class ShardImages:
    """Images in tar files: of each only its place, its size and its class are in memory."""

    paths: tuple[Path, ...]  # the shards
    # Position of the first image of every shard, and the number of images, (S + 1,)
    starts: NDArray[np.int64]
    places: NDArray[np.int64]  # where each image's file begins in its shard, bytes, (N,)
    sizes: NDArray[np.int64]  # of each image's file, bytes, (N,)
    labels: NDArray[np.int64]  # (N,)
    fit: Fit  # how images are fitted to one size
    channels: int  # 1 or 3
    workers: int  # processes that decode ahead in training
    window: int  # images among which the order of training is random

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.fit.size

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> Tensor:
        return in_parallel(self._one, indices, self.workers)

    def update_hash(self, digest: Hash) -> None:
        for path in self.paths:
            digest.update(f"{path.name}:{path.stat().st_size}\n".encode())

    def stored(self, index: int) -> tuple[int, Callable[[], bytes]]:
        return int(self.sizes[index]), lambda: self._content(index)

    def _place(self, index: int) -> tuple[Path, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.paths[shard], int(self.places[index])

    def _content(self, index: int) -> bytes:
        path, place = self._place(index)
        try:
            with path.open("rb") as file:
                file.seek(place)
                return file.read(int(self.sizes[index]))
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from None

    def _one(self, index: int) -> Tensor:
        path, place = self._place(index)
        content = io.BytesIO(self._content(index))
        return decoded(content, self.fit, self.channels, where=f"{path}, byte {place}")


def shuffled(images: LabelledImages, random: np.random.Generator) -> NDArray[np.int64]:
    """Return every position once, in random order, (N,).

    Shards are taken in random order and each image at most ``window`` places away from where it
    comes in its shard, so that they are read nearly from front to back: a shuffle buffer whose
    content is known beforehand, so that no image waits in memory and training goes on anywhere.

    Source: Aizman et al., High Performance I/O For Large Scale Deep Learning, 2019,
    https://arxiv.org/abs/2001.01858, section on shuffling.
    """
    found = _bounds(images)
    if found is None:
        return random.permutation(len(images))
    bounds, window = found
    parts = [np.arange(*bounds[shard : shard + 2]) for shard in random.permutation(len(bounds) - 1)]
    order = np.concatenate(parts)
    return order[np.argsort(np.arange(len(order)) + window * random.random(len(order)))]


def _bounds(images: LabelledImages) -> tuple[NDArray[np.int64], int] | None:
    """Return where the images of each shard begin among ``images``, and the window."""
    if isinstance(images, ShardImages):
        return images.starts, images.window
    if isinstance(images, Subset):
        found = _bounds(images.images)
        return None if found is None else (np.searchsorted(images.indices, found[0]), found[1])
    return None


def file_images(kind: Pictures, folder: Path, names: Names, labels: Any) -> FileImages:
    """Return pictures in files as the options of their ``kind`` fit them."""
    return FileImages(folder, names, labels, kind.fit, kind.channels or 3, kind.workers)


def files_below(folder: Path, endings: Collection[str]) -> Iterator[str]:
    """Yield files with one of ``endings`` at any depth of a folder; links to folders are left out.

    Raises:
        DataError: a folder cannot be read: its images would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise unreadable(DataError, error)

    for place, _, files in os.walk(folder, onerror=refuse):
        for file in files:
            if os.path.splitext(file)[1].lower() in endings:
                yield os.path.join(place, file)


def in_memory(images: LabelledImages) -> LabelledImages:
    """Return ``images`` read once where they fit in 1 GiB; else as they are."""
    if len(images) * math.prod(images.shape) > LARGEST_IN_MEMORY_BYTES:
        return images
    files = images if isinstance(images, FileImages) else None
    return MemoryImages(images.take(range(len(images))), images.labels, files)


def stored_sides(images: Any, most: int = 32) -> list[tuple[int, int]]:
    """Return height and width of some images as their files have them; of others nothing."""
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(np.int64)
    while isinstance(images, Subset):
        chosen, images = images.indices[chosen], images.images
    files = images.files if isinstance(images, MemoryImages) else images
    if not isinstance(files, FileImages):
        return []
    found = []
    for index in chosen:
        path = files.folder / files.names[int(index)]
        with opened_picture(path, where=str(path)) as picture:
            found.append(upright_size(picture)[::-1])
    return found


def in_parallel(one: Callable[[int], Tensor], indices: Indices, threads: int) -> Tensor:
    """Return ``one`` of every index, stacked; decoders of images free the GIL."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return torch.stack(list(pool.map(one, map(int, indices))))


def decoded(source: Path | BinaryIO, fit: Fit, channels: int, *, where: str) -> Tensor:
    """Return an image file's pixels, upright, RGB or grey, fitted to one size, (C, H, W) uint8."""
    with opened_picture(source, where=where) as image:
        return fit.pixels(to_8_bit(image, channels, where=where))


def from_array(
    pixels: NDArray[Any], labels: NDArray[Any], *, size: ImageSize | None, channels: int | None
) -> MemoryImages:
    """Return (N, H, W) or (N, H, W, C) pixels as images of the wanted size and channels.

    Pixels are uint8, or floats that stay what they are.
    """
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    tensor = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    tensor = tensor if tensor.dtype == torch.uint8 else tensor.float()
    tensor = with_channels(tensor, channels)
    if size is not None:
        tensor = Fit(sides(size), "squash").tensor(tensor)
    return MemoryImages(tensor, np.asarray(labels, dtype=np.int64).reshape(-1))


def with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Return images (N, C, H, W) in grey or colour; as they are if it is not said."""
    if channels == 3 and images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1).contiguous()
    if channels == 1 and images.shape[1] == 3:
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        grey = (images * luma).sum(1, keepdim=True)
        return grey.round().to(torch.uint8) if images.dtype == torch.uint8 else grey
    return images


def held_out(labels: Any, share: float, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return positions of training and of test images, each class with its ``share`` of the test.

    ``labels`` are classes, (N,); those of another form are drawn without regard to them.
    """
    random = np.random.default_rng(seed)
    kinds = np.unique(labels) if getattr(labels, "ndim", 0) == 1 else [None]
    test = []
    for kind in kinds:
        own = np.arange(len(labels)) if kind is None else np.flatnonzero(labels == kind)
        count = max(1, round(share * len(own)))
        if count >= len(own):
            raise DataError(
                f"{len(own)} image{'s' * (len(own) != 1)} of class {kind} are too few to hold back "
                "a test set",
                expected="at least two images of each class, or a test set of its own",
            )
        test.append(random.permutation(own)[:count])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def every_fourth_held_out(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Return images to take ranges from, and every fourth, at least the last, to test on."""
    is_test = np.arange(len(images)) % 4 == 3
    is_test[-1] |= not is_test.any()
    train, test = (Subset(images, np.flatnonzero(chosen)) for chosen in (~is_test, is_test))
    return train, test


def with_test(
    train: Sequence[T], validation: Sequence[T], test: Sequence[T]
) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
    """Return the three with a test set: if there is none, validation, or a tenth of train."""
    if not test and validation:
        test, validation = validation, ()
    elif not test:
        test, train = train[::EVERY], [each for i, each in enumerate(train) if i % EVERY]
    if not train or not test:
        raise DataError("holds no images for training, or none to test on")
    return train, validation, test
