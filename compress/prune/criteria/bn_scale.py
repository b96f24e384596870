"""Scale of the BatchNorm that follows each channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Reduction, reduced
from compress.prune.criteria.l2 import L2


@dataclass(frozen=True)
class BnScale(CheckedOptions):
    """Score a channel by the magnitude of its BatchNorm scales.

    A group without BatchNorm is scored by the L2 norm of its filters instead.

    Args:
        reduce: How the scales of several norms of a group are combined.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
    ICCV 2017, https://arxiv.org/abs/1708.06519, section 3.
    """

    reduce: Reduction = "mean"

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        scales = [scale.abs().mean(1) for scale in group.scales()]  # scale: (C, k)
        return reduced(scales, self.reduce) if scales else L2("filters", self.reduce)(group)
