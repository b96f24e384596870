"""Small data sets in memory and small networks that training can be watched on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from compress.data import Dataset
from compress.data._images import MemoryImages


def dataset(
    train: int = 96, validation: int = 48, *, classes: int = 3, size: int = 8, seed: int = 0
) -> Dataset:
    """Bright squares whose place tells the class; any network learns it in a few steps."""
    generator = np.random.default_rng(seed)

    def images(count: int) -> MemoryImages:
        labels = np.arange(count) % classes
        pixels = generator.integers(0, 80, (count, 3, size, size), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[label % 3, : size // 2, : size // 2] += 120
        return MemoryImages(torch.from_numpy(pixels), labels.astype(np.int64))

    splits = {
        "train": images(train),
        "validation": images(validation),
        "calibration": images(8),
        "test": images(24),
    }
    return Dataset(
        name="pictures",
        classes=tuple(f"class {i}" for i in range(classes)),
        mean=(0.4,) * 3,
        std=(0.25,) * 3,
        splits=splits,
        batch_size=32,
        fingerprint=f"pictures {train} {seed}",
    )


class Plain(nn.Module):
    """Two convolutions, norms where wanted, dropout where wanted."""

    def __init__(
        self, classes: int = 3, width: int = 4, *, norm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(2 * width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.linear(self.dropout(x.mean((2, 3))))


def plain(seed: int = 0, **options: object) -> Plain:
    """A seeded network, so that two calls give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plain(**options)  # type: ignore[arg-type]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether every tensor of both is equal bit by bit."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
