"""Train, validation, calibration and test images by name: seeded, disjoint, ready for a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import plugins
from compress.data._images import LabelledImages, MemoryImages, Names, Subset, file_images
from compress.data._pictures import Fit
from compress.data._targets import Target, target_tensors
from compress.errors import DataError, UsageError, boundary
from compress.recipe.settings import FEWEST_CALIBRATION, DataSettings, data_reference

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY_MEAN = GREY_STD = (0.5,)  # of images with one channel, where nobody says
RANDOM_PICTURES = 8  # enough for a batch that does not hold one picture only
NAMED = 12  # classes that are called by name in one line
UNFITTED = {"resize": "squash", "crop": 1.0}  # images of the network's own size, as in arrays
LARGEST_CALIBRATION_SHARE = 0.2  # of train: a set of 40 or more keeps the others for training


def usual(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std of images with so many channels where nobody says."""
    return (GREY_MEAN, GREY_STD) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True, kw_only=True)
class AboutImages:
    """What a kind of data says of its images, the same before and after they are split."""

    test_groups: NDArray[Any] | None = field(default=None, compare=False)  # (N,), of test images
    target: str = "class"  # what labels are: class, classes, mask, boxes, image, none
    prepared: bool = False  # images are what the network takes: they are not normalized
    # Of an image, by input: what each input of the network takes of its values, in this order; {}
    # where they are a picture.
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    note: str = ""  # what to say of figures and int8 ranges that were taken from these images


@dataclass(frozen=True)
class Source(AboutImages):
    """What a kind of data delivers before it is split: images as they are stored."""

    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    validation: LabelledImages | None = None

    def changed(self, change: Callable[[LabelledImages], LabelledImages], **facts: Any) -> Source:
        """Return this with ``change`` applied to the images of each split, and new facts."""
        held = self.validation
        return replace(
            self,
            train=change(self.train),
            test=change(self.test),
            validation=None if held is None else change(held),
            **facts,
        )


@dataclass(frozen=True)
class Dataset(AboutImages):
    """Images in disjoint splits: "train", "validation", "calibration" and "test".

    Without labels calibration images are training images as well: there is nothing to learn by
    heart.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    splits: Mapping[str, LabelledImages]
    batch_size: int = 128
    fingerprint: str = ""  # sha256 of labels and images, or of names and sizes of large sets
    color: str = "RGB"  # order of the channels that the network takes
    layout: str | None = None  # of an ONNX file's input, NCHW or NHWC; None: its shape tells
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)  # further ones
    fit: Mapping[str, Any] = field(default_factory=dict)  # rule, filter, crop; {} if not fitted
    assumed: str = ""  # of how the network wants its images: nobody said it

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
        names = ", ".join(self.classes).replace("\n", "\\n")
        named = f": {names}" if len(self.classes) <= NAMED else ""
        if self.parts:
            each = ", ".join(f"{name} {shape}" for name, shape in self.parts.items())
            return f"data {self.name}: samples {counts}; inputs {each}; no labels"
        labels = {"none": "no labels", "image": "a picture to return for each"}.get(
            self.target, f"{len(self.classes)} classes{named}"
        )
        return f"data {self.name}: images {counts}, {self.channels} x {height} x {width}; {labels}"

    def with_fewer(self, split: str, count: int) -> Dataset:
        """Return this with ``count`` images of ``split`` at the most, evenly spread over it."""
        images = self.splits[split]
        if count >= len(images):
            return self
        chosen = np.linspace(0, len(images) - 1, count).astype(np.int64)
        groups = self.test_groups
        if split == "test" and groups is not None:
            groups = groups[chosen]
        splits = {**self.splits, split: Subset(images, chosen)}
        return replace(self, splits=splits, test_groups=groups)

    def normalize(self, images: Tensor) -> Tensor:
        """Return (B, C, H, W) RGB images in 0..255, of any dtype, as the network wants them."""
        images = images.flip(1) if self.color == "BGR" else images
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div(255.0).sub_(mean).div_(std)

    def pictures(
        self, split: str, batch_size: int | None = None, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield what ``batches`` yields before it is normalized: images as they are stored."""
        images = self.splits[split]
        size = batch_size or self.batch_size
        end = len(images) if limit is None else min(limit, len(images))
        for start in range(0, end, size):
            indices = np.arange(start, min(start + size, end))
            yield images.take(indices), targets_of(images, indices)

    def facts(self) -> dict[str, Any]:
        """Return how pictures become the network's input, as files keep it; see ``feeding``."""
        if self.prepared:
            return {"image_size": list(self.image_size)}
        return {
            "labels": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "input_range": [0.0, 1.0],
            "color": self.color if self.channels == 3 else "grey",
            "image_size": list(self.image_size),
            **(self.fit or UNFITTED),
        }

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
        for images, targets in self.pictures(split, batch_size, limit):
            yield self.normalize(images), targets


def targets_of(images: LabelledImages, indices: NDArray[np.int64]) -> Tensor | list[Target]:
    """Return the labels of the images at ``indices`` as losses and metrics take them."""
    return target_tensors(images.labels[indices])


def parse_reference(reference: str, **options: Any) -> DataSettings:
    """Return the settings that a DATA reference such as ``"npz:digits.npz"`` stands for."""
    return DataSettings(**data_reference(reference), **options)


def load_data(
    settings: DataSettings, seed: int = 0, network: Callable[[], nn.Module] | None = None
) -> Dataset:
    """Read the images that ``settings`` names and split them.

    Calibration and validation images are taken out of train by a permutation that depends on
    ``seed`` alone, so the splits are disjoint and the same in every process.

    Args:
        settings: Kind of data, where it is, how it is prepared and split.
        seed: Of the permutation.
        network: Builds the network, for images that are made from it.

    Raises:
        UsageError: no such kind of data, or its root is missing.
        DataError: no images, one class only, a corrupt file.
    """
    supplied = _options(settings) | {"seed": seed}
    plugin = plugins.create("data", {settings.name: settings.options}, **supplied)
    source: Source = plugin.load(network) if hasattr(plugin, "of_network") else plugin.load()
    least = {"class": 2, "none": 0, "image": 0}.get(source.target, 1)
    if len(source.classes) < least:
        raise DataError(
            f"only one class: {', '.join(source.classes) or 'none'}",
            where=settings.root or settings.name,
            expected="at least two classes to tell apart",
        )
    return _dataset(settings, plugin, source, _split(source, settings, seed))


def load_pictures(settings: DataSettings, files: Sequence[Path]) -> Dataset:
    """Return picture files as a network takes them: test images without labels, each read if asked.

    The root of ``settings``, of a kind of data that reads pictures from files, does not count.
    """
    supplied = _options(settings.model_copy(update={"root": ""}))
    plugin = plugins.create("data", {settings.name: settings.options}, **supplied)
    labels = np.zeros(len(files), dtype=np.int64)
    images = file_images(plugin, Path(), Names.of(map(str, files)), labels)
    source = Source(images, images, (), mean=(0.0,), std=(1.0,), target="none")
    return _dataset(settings, plugin, source, {"test": images})


def random_pictures(settings: DataSettings) -> Dataset:
    """Return random pixels as test images, of the size of ``settings``: to time networks with.

    Raises:
        UsageError: ``settings`` give no size.
    """
    if settings.image_size is None:
        raise UsageError(
            "nothing says how large its images are", fix="Give --image-size SIDE, or H,W"
        )
    sides = np.broadcast_to(settings.image_size, 2)
    shape = (RANDOM_PICTURES, settings.channels or 3, *map(int, sides))
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = MemoryImages(torch.from_numpy(pixels), np.zeros(len(pixels), np.int64))
    source = Source(images, images, (), target="none")
    return _dataset(settings, None, source, {"test": images})


def _dataset(
    settings: DataSettings, plugin: Any, source: Source, splits: Mapping[str, LabelledImages]
) -> Dataset:
    channels = source.test.shape[0]
    mean, std = (None, None) if source.prepared else given_normalization(settings)
    return Dataset(
        name=settings.name,
        classes=source.classes,
        mean=_per_channel("mean", mean or source.mean, channels),
        std=_per_channel("std", std or source.std, channels),
        splits=splits,
        batch_size=settings.batch_size,
        fingerprint=_fingerprint(source),
        color="RGB" if source.prepared else settings.color or "RGB",
        layout=settings.layout,
        inputs={name: _constant(name, value) for name, value in (settings.inputs or {}).items()},
        fit=_told(getattr(plugin, "fit", None)),
        **{each.name: getattr(source, each.name) for each in fields(AboutImages)},
    )


def given_normalization(
    settings: DataSettings,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and std of images in [0, 1] as far as the settings give them."""
    if settings.input_range is None:
        return settings.mean, settings.std
    black, white = settings.input_range
    if not white > black:
        raise UsageError(
            f"data.input_range [{black:g}, {white:g}]", expected="black below white: [0, 255]"
        )
    mean, std = settings.mean or (0.0,), settings.std or (1.0,)
    scale = white - black
    return tuple((m - black) / scale for m in mean), tuple(s / scale for s in std)


def _constant(name: str, value: Any) -> NDArray[Any]:
    """Return the value of a further input: numbers as float32, or the array in a file."""
    expected = "a number, a list of numbers, or a .npy file"
    with boundary(DataError, f"input {name!r} cannot be read", where=str(value), expected=expected):
        if isinstance(value, str):
            loaded = np.load(value, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            raise ValueError("it holds several arrays")
        return np.asarray(value, dtype=np.float32)


def _told(fit: Fit | None) -> dict[str, Any]:
    """Return how a kind of data fits pictures to the size, if it does."""
    if fit is None:
        return {}
    return {"resize": fit.rule, "interpolation": fit.interpolation, "crop": fit.share}


def _options(settings: DataSettings) -> dict[str, Any]:
    known = plugins.options("data", settings.name)
    mean, std = given_normalization(settings)
    if settings.root is not None and "root" not in known:
        raise UsageError(
            f"data {settings.name!r} takes no folder or file, and {settings.root!r} is given",
            fix=f"Name it alone: --data {settings.name}",
        )
    if known.get("root") is MISSING and settings.root is None:
        raise UsageError(
            f"data {settings.name!r} needs to know where its images are",
            fix=f"Give the folder or file: --data {settings.name}:PATH, or data.root in a recipe",
        )
    same = ("root", "image_size", "channels", "workers", "shuffle_buffer", "color")
    return {"mean": mean, "std": std} | {key: getattr(settings, key) for key in same}


def _split(source: Source, settings: DataSettings, seed: int) -> dict[str, LabelledImages]:
    if source.target == "none":
        return _split_unlabelled(source, settings)
    count = len(source.train)
    order = np.random.default_rng(seed).permutation(count)
    fifth = int(count * LARGEST_CALIBRATION_SHARE)
    calibration = min(settings.calibration, max(fifth, min(FEWEST_CALIBRATION, count // 2)))
    validation = 0 if source.validation is not None else int(count * settings.validation)
    if min(fifth, count - calibration - validation) < 1:
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


def _split_unlabelled(source: Source, settings: DataSettings) -> dict[str, LabelledImages]:
    everything = np.arange(len(source.train))
    held_back = int(len(everything) * settings.validation)
    train = everything[: len(everything) - held_back]
    return {
        "train": Subset(source.train, train),
        "validation": Subset(source.train, everything[len(train) :]),
        "calibration": Subset(source.train, train[: settings.calibration]),
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
