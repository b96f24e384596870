"""CIFAR-100 as its authors or as NumPy store it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.data.cifar10 import Cifar10


@dataclass(frozen=True)
class Cifar100(Cifar10):
    """CIFAR-100: 50,000 + 10,000 colour images of 32 x 32 pixels in 100 classes.

    ROOT holds ``cifar-100-python`` (the archive of the authors, unpacked; its checksums are
    verified before it is read) or ``cifar100.npz`` with x_train, y_train, x_test, y_test.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    reader: ClassVar[str] = "CIFAR100"
    archive: ClassVar[str] = "cifar100.npz"
