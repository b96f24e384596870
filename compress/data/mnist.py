"""MNIST in its authors' IDX files."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from compress.data import Source
from compress.errors import DataError
from compress.fitting import ImageSize
from compress.images import MemoryImages, from_array

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
        labels = read_idx(self._find(f"{prefix}-labels-idx1-ubyte"))
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

    Raises:
        DataError: it is damaged or holds other elements.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
        if content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
            raise ValueError("not an IDX file of unsigned bytes")
        pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"is damaged ({error})", where=str(path)) from None
    return pixels
