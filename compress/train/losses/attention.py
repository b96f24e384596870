"""Attention transfer (Zagoruyko and Komodakis 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Taps, feature_pairs, same_size


@dataclass(frozen=True)
class Attention:
    """Match where in the image features are strong, whatever their channels (attention transfer).

    Args:
        power: Activations are raised to it before their mean over channels is taken.
        layers: "auto", names of layers that both networks have, or {student: teacher}.

    Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017,
    https://arxiv.org/abs/1612.03928, equation 2, with the mean of squares of the authors' code.
    Difference: a tenth of their weight; 1000 costs thin students accuracy on short schedules.
    """

    power: float = 2.0
    layers: Layers = "auto"

    weight: ClassVar[float] = 100.0
    needs: ClassVar[Needs] = "stages"

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the mean squared difference of attention maps, summed over pairs, a scalar."""
        losses = []
        for pair in feature_pairs(student, teacher):
            mine, theirs = (self._map(part) for part in same_size(*pair))
            losses.append((mine - theirs).square().mean())
        return torch.stack(losses).sum()

    def _map(self, feature: Tensor) -> Tensor:
        """Return the attention map of each image, flat and of length 1, (B, H * W)."""
        strength = feature.float().abs().pow(self.power).mean(1).flatten(1)
        return F.normalize(strength)
