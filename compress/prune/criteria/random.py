"""Random scores: the control that every other criterion has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.criteria import ChannelGroup


@dataclass(frozen=True)
class Random:
    """Score channels at random, the same way for the same seed and group name.

    Args:
        seed: Seed of the scores.
    """

    seed: int = 0

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), uniform in [0, 1), higher = keep."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{group.name}".encode()))
        return torch.rand(group.size, generator=generator)
