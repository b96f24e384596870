"""L1 norm of the weights of each channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Reduction, Weights, reduced


@dataclass(frozen=True)
class L1(CheckedOptions):
    """Score a channel by the summed magnitude of its weights.

    Args:
        weights: "filters" (that produce the channel), "columns" (that read it), or "both".
        reduce: How the scores of several layers of a group are combined.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017,
    https://arxiv.org/abs/1608.08710, section 3.1.
    """

    weights: Weights = "filters"
    reduce: Reduction = "mean"

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        return reduced(group.norms(self.weights, 1), self.reduce)
