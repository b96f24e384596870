"""Labelled images in tar files (WebDataset shards), decoded from where they lie."""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compress import progress
from compress.data._images import Hash, Indices, LabelledImages, Subset, decoded, in_parallel
from compress.data._resize import Fit
from compress.errors import DataError

IMAGES = {"jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff"}
LABELS = ("cls", "json")  # the first one counts
LABEL_KEYS = ("label", "cls", "class")  # of a JSON object
PICKLES = {"pyd", "pickle", "pkl", "pth", "pt"}
LARGEST_LABEL_BYTES = 1 << 20
BLOCK = 512  # of a tar file


@dataclass(frozen=True)
class ShardImages:
    """Images in tar files: of each only its place, its size and its class are in memory.

    Args:
        paths: The shards.
        starts: Position of the first image of every shard, and the number of images, (S + 1,).
        places: Where each image's file begins in its shard, bytes, (N,).
        sizes: Of each image's file, bytes, (N,).
        labels: (N,).
        fit: How images are fitted to one size.
        channels: 1 or 3.
        workers: Processes that decode ahead in training.
        window: Images among which the order of training is random.
    """

    paths: tuple[Path, ...]
    starts: NDArray[np.int64]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    fit: Fit
    channels: int
    workers: int
    window: int

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


@dataclass(frozen=True)
class Shard:
    """Where the images of one shard lie, and what they show."""

    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[Any]  # integers, or names of classes


def read_shards(paths: Sequence[Path], threads: int) -> list[Shard]:
    """Read what every image of the shards is; their pixels are passed over."""
    with ThreadPoolExecutor(threads or None) as pool:
        return list(progress.track(pool.map(read_shard, paths), "reading shards", len(paths)))


def read_shard(path: Path) -> Shard:
    """Read what every image of one shard is; see :func:`read_shards`."""
    places, sizes, labels = array("q"), array("q"), []
    for key, members in _samples(path):
        images = [member for ending, member in members.items() if ending in IMAGES]
        label = next((members[ending] for ending in LABELS if ending in members), None)
        if len(images) != 1 or label is None:
            raise DataError(
                f"sample {key!r} holds {', '.join(members)}",
                where=str(path),
                expected="one image (.jpg, .png, ...) and its class (.cls or .json)",
            )
        places.append(images[0].offset_data)
        sizes.append(images[0].size)
        labels.append(_label(path, key, label))
    if not labels:
        raise DataError("holds no images", where=str(path))
    if len({type(label) for label in labels}) > 1:
        raise DataError("gives some classes by number and some by name", where=str(path))
    return Shard(np.array(places), np.array(sizes), np.array(labels))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield the key of every sample and its files by ending; files of a sample lie together."""
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in _members(path):
        folder, slash, file = member.name.rpartition("/")
        stem, _, endings = file.partition(".")
        ending = endings.rpartition(".")[2].lower()
        if not member.isreg() or not stem:
            continue
        if ending in PICKLES:
            raise DataError(
                f"{member.name} may hold code, and no pickle is read",
                where=str(path),
                fix="Write the shards again without such files",
            )
        if folder + slash + stem != key:
            if key is not None:
                yield key, members
            key, members = folder + slash + stem, {}
        members[ending] = member
    if key is not None:
        yield key, members


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar file with their places; their contents are passed over."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would hold them all
                yield member
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            damaged = bool(file.read(BLOCK).strip(b"\0"))
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"is no readable tar file ({error})", where=str(path), expected="a tar, not compressed"
        ) from None
    if damaged:
        raise DataError(f"is damaged at byte {end}", where=str(path), fix="Replace or remove it")


def _label(path: Path, key: str, member: tarfile.TarInfo) -> int | str:
    """Return the class that a .cls or .json file gives: its number, or its name."""
    if member.size > LARGEST_LABEL_BYTES:
        raise DataError(f"{member.name} has {member.size} bytes", where=str(path))
    with path.open("rb") as file:
        file.seek(member.offset_data)
        content = file.read(member.size)
    try:
        text = content.decode().strip()
        value = json.loads(text) if member.name.lower().endswith(".json") else text
    except ValueError as error:
        raise DataError(f"{member.name} is no text ({error})", where=str(path)) from None
    if isinstance(value, dict):
        value = next((value[name] for name in LABEL_KEYS if name in value), None)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    known = isinstance(value, str) or (isinstance(value, int) and value >= 0)
    if not known or isinstance(value, bool) or value == "":
        raise DataError(
            f"sample {key!r} has the class {value!r}",
            where=str(path),
            expected=f"a number from 0 or a name; in JSON as one of: {', '.join(LABEL_KEYS)}",
        )
    return int(value) if isinstance(value, int) else str(value)
