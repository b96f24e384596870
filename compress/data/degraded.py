"""Degraded pictures with their originals, for restoration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress import plugins
from compress.data import Source
from compress.data._images import Hash, Indices, LabelledImages, in_memory
from compress.data._pictures import Fit, ImageSize, sides
from compress.data._targets import PictureTargets
from compress.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Images of the kind ``of``, read from ``root`` with its own ``options``.

    Args:
        of: Kind of the data that the images come from.
        options: Options of that kind.
        seed: Of what is drawn at random.
    """

    of: str = "images"
    root: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: ImageSize | None = None
    channels: int | None = None
    workers: int = 0
    seed: int = 0

    @property
    def fit(self) -> Fit | None:
        """How the pictures are fitted that this data is made from; None where they are arrays."""
        fit: Fit | None = getattr(self._kind(self.image_size), "fit", None)
        return fit

    def _kind(self, image_size: ImageSize | None) -> Any:
        supplied = {key: getattr(self, key) for key in ("root", "channels", "workers", "seed")}
        return plugins.create(
            "data", {self.of: dict(self.options)}, image_size=image_size, **supplied
        )

    def source(self, image_size: ImageSize | None) -> Source:
        """Return the images that this data is made from, of ``image_size``."""
        known = plugins.options("data", self.of)
        if known.get("root") is MISSING and self.root is None:
            raise UsageError(
                f"data {self.of!r} needs to know where its images are", fix="Give data.root"
            )
        found: Source = self._kind(image_size).load()
        if found.prepared:
            raise UsageError(f"data {self.of!r} holds arrays", expected="8-bit pictures")
        return found


@dataclass(frozen=True, kw_only=True)
class Degraded(Derived):
    """Pictures made worse, with the pictures as targets: super-resolution, denoising.

    The input is a picture of the kind ``of`` (any folder of pictures unless told otherwise),
    ``scale`` times smaller (bicubic, antialiased) and with Gaussian noise of ``noise`` of 255 grey
    levels, the same each time an image is read. ``image_size`` is that of the input. Targets are
    (C, H, W) in [0, 1].

    Args:
        scale: How many times smaller the input is, each side.
        noise: Standard deviation of the noise, grey levels of 255.
    """

    scale: int = 2
    noise: float = 0.0

    def load(self) -> Source:
        """Return the images.

        Raises:
            UsageError: nothing is made worse, or a size is no multiple of ``scale``.
            DataError: the pictures cannot be read.
        """
        if self.scale < 1 or self.noise < 0 or (self.scale == 1 and not self.noise):
            raise UsageError(
                f"scale {self.scale} and noise {self.noise:g} leave pictures as they are",
                expected="a scale of 2 or more, or noise above 0",
            )
        size = self.image_size
        wanted = None if size is None else tuple(self.scale * side for side in sides(size))
        found = self.source((wanted[0], wanted[1]) if wanted else None)
        height, width = found.test.shape[1:]
        if height % self.scale or width % self.scale:
            raise DataError(
                f"pictures of {height} x {width} pixels cannot be made {self.scale} times smaller",
                expected=f"sides that are multiples of {self.scale}",
                fix="Set data.image_size, the size of the network's input",
            )
        return found.changed(self._worse, classes=(), mean=(0.0,), std=(1.0,), target="image")

    def _worse(self, pictures: LabelledImages) -> LabelledImages:
        kept = in_memory(pictures)
        worse = _Worse(kept, PictureTargets(kept), self.scale, self.noise, self.seed)
        return worse if kept is pictures else in_memory(worse)


@dataclass(frozen=True)
class _Worse:
    """Pictures made smaller and noisy when they are asked for."""

    pictures: LabelledImages
    labels: Any
    scale: int
    noise: float
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pictures.shape
        return channels, height // self.scale, width // self.scale

    def __len__(self) -> int:
        return len(self.pictures)

    def take(self, indices: Indices) -> Tensor:
        images = self.pictures.take(indices).float()
        if self.scale > 1:
            size = self.shape[1:]
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        if self.noise:
            drawn = [
                np.random.default_rng([self.seed, int(i)]).standard_normal(images.shape[1:])
                for i in indices
            ]
            images = images + self.noise * torch.from_numpy(np.stack(drawn)).float()
        return images.round().clamp(0, 255).to(torch.uint8)

    def update_hash(self, digest: Hash) -> None:
        self.pictures.update_hash(digest)
        digest.update(f"{self.scale} {self.noise} {self.seed}".encode())
