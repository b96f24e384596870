"""Train, validation, calibration and test images by name: seeded, disjoint, ready for a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import plugins
from compress.errors import DataError, UsageError
from compress.images import Images, Subset
from compress.settings import DataSettings, data_reference
from compress.targets import Target, tensors_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NAMED = 12  # classes that are called by name in one line
LARGEST_CALIBRATION_SHARE = 0.2  # of train: a small set keeps most of its images for training


@dataclass(frozen=True)
class Source:
    """What a kind of data delivers before it is split: images as they are stored."""

    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Images | None = None
    test_groups: NDArray[Any] | None = None  # (N,) subgroup of each test image, where known
    target: str = "class"  # what labels are: class, classes, mask, boxes, image


@dataclass(frozen=True)
class Dataset:
    """Labelled images in disjoint splits: "train", "validation", "calibration" and "test"."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    splits: Mapping[str, Images]
    batch_size: int = 128
    fingerprint: str = ""  # sha256 of labels and images, or of names and sizes of large sets
    test_groups: NDArray[Any] | None = field(default=None, compare=False)
    target: str = "class"  # what labels are: class, classes, mask, boxes, image

    @property
    def channels(self) -> int:
        """Channels of an image: 1 or 3."""
        return self.splits["test"].shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, pixels."""
        return self.splits["test"].shape[1:]

    @property
    def example(self) -> Tensor:
        """The first test image, normalized, (1, C, H, W) float32."""
        return self.normalize(self.splits["test"].take([0]))

    def summary(self) -> str:
        """Return how many images of which size and classes there are, in one line."""
        height, width = self.image_size
        counts = ", ".join(f"{len(images):,} {name}" for name, images in self.splits.items())
        named = f": {', '.join(self.classes)}" if len(self.classes) <= NAMED else ""
        return (
            f"data {self.name}: images {counts}, {self.channels} x {height} x {width}; "
            f"{len(self.classes)} classes{named}"
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Return (B, C, H, W) images in 0..255, of any dtype, as the network wants them."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div(255.0).sub_(mean).div_(std)

    def batches(
        self, split: str, batch_size: int | None = None, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield ``split`` in order, unaugmented: (B, C, H, W) float32 normalized, and targets.

        Targets are (B,) int64 classes, (B, K) several classes, (B, H, W) masks, or a list of B
        dictionaries of boxes and labels.

        Args:
            split: "train", "validation", "calibration" or "test".
            batch_size: Images in a batch; the recipe's if absent. The last batch may be smaller.
            limit: Stop after so many images.
        """
        images = self.splits[split]
        size = batch_size or self.batch_size
        end = len(images) if limit is None else min(limit, len(images))
        for start in range(0, end, size):
            indices = np.arange(start, min(start + size, end))
            yield self.normalize(images.take(indices)), targets_of(images, indices)


def targets_of(images: Images, indices: NDArray[np.int64]) -> Tensor | list[Target]:
    """Return the labels of the images at ``indices`` as losses and metrics take them."""
    return tensors_of(images.labels[indices])


def parse_reference(reference: str, **options: Any) -> DataSettings:
    """Return the settings that a DATA reference such as ``"npz:digits.npz"`` stands for."""
    return DataSettings(**data_reference(reference), **options)


def load_data(settings: DataSettings, seed: int = 0) -> Dataset:
    """Read the images that ``settings`` names and split them.

    Calibration and validation images are taken out of train by a permutation that depends on
    ``seed`` alone, so the splits are disjoint and the same in every process.

    Raises:
        UsageError: no such kind of data, or its root is missing.
        DataError: no images, one class only, a corrupt file.
    """
    supplied = _options(settings) | {"seed": seed}
    plugin = plugins.create("data", {settings.name: settings.options}, **supplied)
    source: Source = plugin.load()
    if len(source.classes) < (2 if source.target == "class" else 1):
        raise DataError(
            f"only one class: {', '.join(source.classes) or 'none'}",
            where=settings.root or settings.name,
            expected="at least two classes to tell apart",
        )
    splits = _split(source, settings, seed)
    mean, std = settings.mean or source.mean, settings.std or source.std
    channels = source.test.shape[0]
    return Dataset(
        name=settings.name,
        classes=source.classes,
        mean=_per_channel("mean", mean, channels),
        std=_per_channel("std", std, channels),
        splits=splits,
        batch_size=settings.batch_size,
        fingerprint=_fingerprint(source),
        test_groups=source.test_groups,
        target=source.target,
    )


def _options(settings: DataSettings) -> dict[str, Any]:
    known = plugins.options("data", settings.name)
    if "root" in known and settings.root is None:
        raise UsageError(
            f"data {settings.name!r} needs to know where its images are",
            fix=f"Give the folder or file: --data {settings.name}:PATH, or data.root in a recipe",
        )
    return {
        "root": settings.root,
        "image_size": settings.image_size,
        "channels": settings.channels,
        "workers": settings.workers,
        "shuffle_buffer": settings.shuffle_buffer,
    }


def _split(source: Source, settings: DataSettings, seed: int) -> dict[str, Images]:
    count = len(source.train)
    order = np.random.default_rng(seed).permutation(count)
    calibration = min(settings.calibration, int(count * LARGEST_CALIBRATION_SHARE))
    validation = 0 if source.validation is not None else int(count * settings.validation)
    if min(calibration, count - calibration - validation) < 1:
        raise DataError(
            f"{count} training images cannot be split into train, validation and calibration",
            where=settings.root or settings.name,
            expected="at least 8",
        )
    held_back = np.split(order, [calibration, calibration + validation])
    return {
        "train": Subset(source.train, np.sort(held_back[2])),
        "validation": source.validation or Subset(source.train, np.sort(held_back[1])),
        "calibration": Subset(source.train, held_back[0]),  # in random order: any part is a sample
        "test": source.test,
    }


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if channels == 1:
        return (float(np.mean(values)),)
    raise UsageError(f"{name} has {len(values)} numbers", expected=f"{channels}, one per channel")


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256()
    for images in (source.train, source.validation, source.test):
        if images is not None:
            digest.update(images.labels.tobytes())
            images.update_hash(digest)
    return digest.hexdigest()
