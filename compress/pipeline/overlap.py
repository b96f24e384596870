"""Images of one split that are, or look, the same as images of others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from compress.data._images import FileImages, LabelledImages, MemoryImages, ShardImages, Subset

BLOCK = 1024  # images looked at together
SMALLEST = 32  # pixels: thumbnails of smaller images are alike by chance
HASH_SIDES = (8, 9)  # rows and columns of the thumbnail whose 64 differences are compared


@dataclass(frozen=True)
class Overlap:
    """How many images of one split are in others as well."""

    images: int  # of the split
    equal: int  # the same file or the same pixels
    alike: int | None  # not equal, but of the same small thumbnail; None where not looked for

    @property
    def share(self) -> float:
        """Share of the split's images that are in the others, in [0, 1]."""
        return self.equal / max(1, self.images)


def overlap(others: Sequence[LabelledImages], images: LabelledImages) -> Overlap | None:
    """Return how many of ``images`` are among ``others``; None where it cannot be told cheaply.

    **Method:** images in memory are compared by their pixels, and by the sign of the differences
    between neighbours in a grey thumbnail of 8 x 9 pixels (the "difference hash"), which survives
    another size, brightness or compression. Where some are read when they are needed, files and
    members of shards are compared by their content where their sizes are equal, and nothing is
    decoded.
    """
    parts = [*others, images]
    if all(isinstance(_whole(part), MemoryImages) for part in parts):
        seen = {key for part in others for key in _pixels(part)}
        own = list(_pixels(images))
        equal = np.array([key in seen for key in own])
        if min(images.shape[1:]) < SMALLEST:
            return Overlap(len(own), int(equal.sum()), None)
        known = np.unique(np.concatenate([_thumbnails(part) for part in others]))
        alike = np.isin(_thumbnails(images), known[known != 0]) & ~equal
        return Overlap(len(own), int(equal.sum()), int(alike.sum()))
    if all(_is_stored(part) for part in parts):
        return Overlap(len(images), _equal_files(others, images), None)
    return None


def _whole(images: LabelledImages) -> LabelledImages:
    return _whole(images.images) if isinstance(images, Subset) else images


def _blocks(images: LabelledImages) -> Iterator[Any]:
    for start in range(0, len(images), BLOCK):
        yield images.take(range(start, min(start + BLOCK, len(images))))


def _pixels(images: LabelledImages) -> Iterator[bytes]:
    for block in _blocks(images):
        for image in block.numpy():
            yield hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _thumbnails(images: LabelledImages) -> NDArray[np.uint64]:
    """Return the difference hash of each image, (N,); that of an even one is 0."""
    found = [np.zeros(0, np.uint64)]
    for block in _blocks(images):
        grey = block.float().mean(1, keepdim=True)
        small = F.interpolate(grey, HASH_SIDES, mode="bilinear", antialias=True)[:, 0]
        bits = (small[:, :, 1:] > small[:, :, :-1] + 1e-3).flatten(1).numpy()
        found.append(np.packbits(bits, axis=1).view(np.uint64)[:, 0])
    return np.concatenate(found)


def _is_stored(images: LabelledImages) -> bool:
    whole = _whole(images)
    origin = whole.files if isinstance(whole, MemoryImages) else whole
    return isinstance(origin, FileImages | ShardImages)


def _equal_files(others: Sequence[LabelledImages], images: LabelledImages) -> int:
    sizes = {size for part in others for size, _ in _stored(part)}
    candidates = [(size, read) for size, read in _stored(images) if size in sizes]
    wanted = {size for size, _ in candidates}
    parts = (read for part in others for size, read in _stored(part) if size in wanted)
    seen = set(map(_content, parts))
    return sum(_content(read) in seen for _, read in candidates)


def _stored(
    images: Any, indices: Iterable[int] | None = None
) -> Iterator[tuple[int, Callable[[], bytes]]]:
    positions = range(len(images)) if indices is None else indices
    if isinstance(images, Subset):
        yield from _stored(images.images, images.indices[np.fromiter(positions, np.int64)])
    elif isinstance(images, MemoryImages):
        yield from _stored(images.files, positions)
    else:
        for index in positions:
            yield images.stored(int(index))


def _content(read: Callable[[], bytes]) -> bytes:
    return hashlib.blake2b(read(), digest_size=16).digest()
