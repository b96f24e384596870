"""Distance of each filter to the others: what many others resemble can be cut (FPGM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Reduction, reduced


@dataclass(frozen=True)
class GeometricMedian(CheckedOptions):
    """Score a channel by the summed distance of its filter to all other filters of its layer.

    A filter near the geometric median of its layer is the most replaceable one.

    Args:
        reduce: How the distances in several layers of a group are combined.

    Source: He et al., Filter Pruning via Geometric Median for Deep CNNs Acceleration, CVPR 2019,
    https://arxiv.org/abs/1811.00250, section 3.3, equation 6.
    """

    reduce: Reduction = "mean"

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        distances = [  # of each row of (C, fan_in) to all rows, Euclidean
            torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
            for filters in group.filters()
        ]
        return reduced(distances, self.reduce)
