"""Fashion-MNIST in its authors' IDX files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.data.mnist import Mnist


@dataclass(frozen=True)
class FashionMnist(Mnist):
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothing, 28 x 28 pixels.

    ROOT, ROOT/raw or ROOT/FashionMNIST/raw holds the four IDX files, gzipped or not.

    Source: Xiao et al., Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747.
    """

    folder: ClassVar[str] = "FashionMNIST"
    classes: ClassVar[tuple[str, ...]] = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    mean: ClassVar[float] = 0.2860
    std: ClassVar[float] = 0.3530
