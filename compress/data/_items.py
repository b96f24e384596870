"""Items of a user's data set as images of one size with their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.data import IMAGENET_MEAN, IMAGENET_STD, Source
from compress.data._held_out import held_out
from compress.data._images import Hash, Indices, LabelledImages, MemoryImages, Subset, in_parallel
from compress.data._item import Items, all_targets, eight_bit, labels_of, picture, shape_of
from compress.data._resize import DEFAULT_SIZE, Fit, ImageSize, sides
from compress.errors import DataError

LARGEST_IN_MEMORY_BYTES = 1 << 30
SAMPLED = 8  # items whose pictures are looked at for a common size


class Held(Protocol):
    """Options of a kind of data made of items: those of pictures, names, what is held back."""

    @property
    def root(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def test(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def image_size(self) -> ImageSize | None: ...
    @property
    def channels(self) -> int | None: ...
    @property
    def fit(self) -> Fit: ...


@dataclass(frozen=True)
class ItemImages:
    """Images of a data set that are made anew each time they are asked for."""

    items: Items
    labels: Any
    reader: Reader

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.reader.channels, *self.reader.fit.size

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.items)

    def take(self, indices: Indices) -> Tensor:
        """Return the images at ``indices``, (B, C, H, W) uint8."""
        return in_parallel(lambda i: self.reader.pixels(self.items, i), indices, 1)

    def update_hash(self, digest: Hash) -> None:
        """Add the first images and the number of all to ``digest``."""
        digest.update(self.take(range(min(len(self), 64))).numpy().tobytes())
        digest.update(str(len(self)).encode())


@dataclass(frozen=True)
class Reader:
    """How a picture of an item becomes pixels of the network's input.

    Args:
        fit: How pictures get the size of the input.
        channels: 1 or 3.
        where: The data set, for errors.
        shape: That of every tensor, (C, H, W), where nobody asked for a size; None: any is fitted.
    """

    fit: Fit
    channels: int
    where: str
    shape: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, kind: Held, items: Items, where: str) -> Reader:
        """Return the reader for ``items``, in their own size where they have one."""
        if not len(items):
            raise DataError("holds no items", where=where)
        first = [picture(items, i, where) for i in range(min(SAMPLED, len(items)))]
        shapes = {shape_of(each) for each in first}
        channels = kind.channels or (1 if all(shape[0] == 1 for shape in shapes) else 3)
        own = {shape[1:] for shape in shapes}
        fit = kind.fit
        if kind.image_size is None and len(own) == 1:
            fit = Fit(next(iter(own)), "squash")
        elif kind.image_size is not None and own == {sides(kind.image_size)}:
            fit = replace(fit, rule="squash", crop=None)
        elif kind.image_size is None:
            fit = replace(fit, size=(DEFAULT_SIZE, DEFAULT_SIZE))
        is_tensor = all(isinstance(each, Tensor) for each in first)
        free = len(shapes) > 1 or kind.image_size is not None or kind.channels is not None
        return cls(fit, channels, where, None if free or not is_tensor else next(iter(shapes)))

    def pixels(self, items: Items, index: int) -> Tensor:
        """Return the picture of one item, (C, H, W) uint8.

        Raises:
            DataError: the item is no picture, or a tensor of another shape than the first ones.
        """
        found = picture(items, index, self.where)
        if isinstance(found, Tensor) and self.shape not in (None, tuple(found.shape)):
            raise DataError(
                f"has a picture of shape {tuple(found.shape)}",
                where=f"{self.where}, item {index}",
                expected=f"{self.shape}, as the first items have",
                fix="Correct it, or set image_size and channels: pictures are fitted to them",
            )
        if not isinstance(found, Tensor):
            return self.fit.pixels(found.convert("L" if self.channels == 1 else "RGB"))
        fitted = self.fit.tensor(eight_bit(found, f"{self.where}, item {index}")[None])[0]
        if fitted.shape[0] == self.channels:
            return fitted
        if fitted.shape[0] == 1:
            return fitted.expand(self.channels, -1, -1).contiguous()
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return (fitted * luma).sum(0, keepdim=True).round().to(torch.uint8)


def source_of_items(kind: Held, parts: Mapping[str, Items]) -> Source:
    """Return data sets by split as a Source; a part of train is the test set if there is none.

    Raises:
        DataError: an item is not a picture with its target, or changes when asked for again.
    """
    if "train" not in parts:
        raise DataError(
            f"has the splits {', '.join(parts) or 'none'}", where=kind.root, expected="train"
        )
    train = parts["train"]
    places = {name: f"{kind.root}, {name}" for name in parts}
    reader = Reader.of(kind, train, places["train"])
    _check_repeatable(train, reader)
    targets = {places[name]: all_targets(part, places[name]) for name, part in parts.items()}
    named = kind.classes or getattr(train, "classes", None)
    classes, labels, form = labels_of(targets, None if named is None else tuple(named), reader.fit)
    images = {
        name: _images(part, labels[places[name]], replace(reader, where=places[name]))
        for name, part in parts.items()
    }
    test = images.get("test", images.get("validation"))
    learned: LabelledImages = images["train"]
    if test is None:
        kept, drawn = held_out(labels[places["train"]], kind.test, kind.seed)
        learned, test = Subset(images["train"], kept), Subset(images["train"], drawn)
    is_grey = reader.channels == 1
    return Source(
        learned,
        test,
        classes,
        (0.5,) if is_grey else IMAGENET_MEAN,
        (0.5,) if is_grey else IMAGENET_STD,
        validation=images.get("validation") if "test" in images else None,
        target=form,
    )


def _images(items: Items, labels: Any, reader: Reader) -> LabelledImages:
    images = ItemImages(items, labels, reader)
    if len(images) * int(np.prod(images.shape)) > LARGEST_IN_MEMORY_BYTES:
        return images
    return MemoryImages(images.take(range(len(images))), labels)


def _check_repeatable(items: Items, reader: Reader) -> None:
    last = len(items) - 1
    if not torch.equal(reader.pixels(items, last), reader.pixels(items, last)):
        raise DataError(
            f"item {last} returns a different picture each time it is read",
            where=reader.where,
            fix="Leave random transforms out of the data: a recipe's augment does that",
        )
