"""CIFAR-10 as its authors or as NumPy store it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress.data import IMAGENET_MEAN, IMAGENET_STD, Source
from compress.data._images import from_array
from compress.data._pictures import ImageSize
from compress.data.npz import Npz
from compress.errors import DataError, boundary


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 pixels in 10 classes.

    ROOT holds ``cifar-10-batches-py`` (the archive of the authors, unpacked; its checksums are
    verified before it is read) or ``cifar10.npz`` with x_train, y_train, x_test, y_test.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    root: str
    image_size: ImageSize | None = None
    channels: int | None = None

    reader: ClassVar[str] = "CIFAR10"
    archive: ClassVar[str] = "cifar10.npz"

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: ROOT holds neither form, or damaged files.
        """
        path = Path(self.root)
        archive = path if path.is_file() else path / self.archive
        if archive.is_file():
            npz = Npz(str(archive), self.image_size, self.channels)
            return replace(npz.load(), mean=IMAGENET_MEAN, std=IMAGENET_STD)
        import torchvision

        wanted = f"the authors' unpacked python version, or {self.archive}"
        what = f"holds no complete {self.reader}"
        with boundary(DataError, what, where=str(path), expected=wanted):
            reader = getattr(torchvision.datasets, self.reader)
            parts = [reader(path, train) for train in (True, False)]
        train, test = (
            from_array(
                part.data, np.array(part.targets), size=self.image_size, channels=self.channels
            )
            for part in parts
        )
        return Source(train, test, tuple(parts[0].classes))
