"""L2 norm of the weights of each channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Reduction, Weights, reduced


@dataclass(frozen=True)
class L2(CheckedOptions):
    """Score a channel by the Euclidean norm of its weights.

    Args:
        weights: "filters" (that produce the channel), "columns" (that read it), or "both".
        reduce: How the scores of several layers of a group are combined.

    Source: He et al., Soft Filter Pruning for Accelerating Deep CNNs, IJCAI 2018,
    https://arxiv.org/abs/1808.06866, section 3.2. The columns of the consumers are an addition.
    """

    weights: Weights = "both"
    reduce: Reduction = "mean"

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        return reduced(group.norms(self.weights, 2), self.reduce)
