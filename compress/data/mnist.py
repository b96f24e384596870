"""MNIST in its authors' IDX files."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from compress.artifact import check_room
from compress.data import Source
from compress.data._images import MemoryImages, from_array
from compress.data._pictures import ImageSize
from compress.errors import DataError, boundary

UNSIGNED_BYTE = 0x08  # the only element type these files use


@dataclass(frozen=True)
class Mnist:
    """MNIST: 60,000 + 10,000 grey images of handwritten digits, 28 x 28 pixels.

    ROOT, ROOT/raw or ROOT/MNIST/raw holds the four IDX files, gzipped or not.

    Source: LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998.
    """

    root: str
    image_size: ImageSize | None = None
    channels: int | None = None

    folder: ClassVar[str] = "MNIST"
    classes: ClassVar[tuple[str, ...]] = tuple(str(digit) for digit in range(10))
    mean: ClassVar[float] = 0.1307
    std: ClassVar[float] = 0.3081

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a file is missing or damaged.
        """
        train, test = self._part("train"), self._part("t10k")
        return Source(train, test, self.classes, (self.mean,), (self.std,))

    def _part(self, prefix: str) -> MemoryImages:
        pixels = read_idx(self._find(f"{prefix}-images-idx3-ubyte"))
        path = self._find(f"{prefix}-labels-idx1-ubyte")
        labels = read_idx(path)
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
            raise DataError(
                f"its labels have shape {labels.shape}, the images {pixels.shape}",
                where=str(path),
                expected="one label for each image of shape (N, H, W)",
            )
        if labels.max() >= len(self.classes):
            raise DataError(
                f"a label is {labels.max()}",
                where=str(path),
                expected=f"0 to {len(self.classes) - 1}: {self.folder} has {len(self.classes)} "
                "classes",
            )
        return from_array(pixels, labels, size=self.image_size, channels=self.channels)

    def _find(self, name: str) -> Path:
        root = Path(self.root)
        folders = (root, root / "raw", root / self.folder / "raw")
        for candidate in (folder / f"{name}{end}" for folder in folders for end in ("", ".gz")):
            if candidate.is_file():
                return candidate
        raise DataError(
            f"holds no {name}[.gz]", where=str(root), expected=f"the IDX files of {self.folder}"
        )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array in an IDX file of unsigned bytes, gzipped or not.

    It takes no more memory than the sizes in its header, and those must be there.

    Raises:
        DataError: it is damaged, holds other elements, or claims more than fits into memory.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with boundary(DataError, "is damaged", where=str(path)), opened(path, "rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:3] != bytes([0, 0, UNSIGNED_BYTE]) or head[3] not in (1, 2, 3, 4):
            raise ValueError("not an IDX file of unsigned bytes")
        shape = [int.from_bytes(file.read(4), "big") for _ in range(head[3])]
        count = math.prod(shape)
        if not count:
            raise ValueError("it holds no values")
        check_room(path, count)
        content = file.read(count + 1)
        if len(content) != count:
            there = f"{len(content)}" if len(content) < count else "more"
            raise ValueError(f"its shape {shape} needs {count} bytes, and it has {there}")
        return np.frombuffer(content, np.uint8).reshape(shape)
