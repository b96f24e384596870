"""Layer-adaptive magnitude: each squared norm against those that would still be there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Reduction, Weights, reduced


@dataclass(frozen=True)
class Lamp(CheckedOptions):
    """Score a channel by its squared norm over the sum of all that are at least as large.

    The largest channel of every group scores 1, so no group is ever emptied before the others.

    Args:
        weights: "filters" (that produce the channel), "columns" (that read it), or "both".
        reduce: How the squared norms in several layers of a group are combined.

    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021,
    https://arxiv.org/abs/2010.07611, equation 1; there for single weights, here for channels.
    """

    weights: Weights = "filters"
    reduce: Reduction = "mean"

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), in (0, 1], higher = keep."""
        squares = [norm.square() for norm in group.norms(self.weights, 2)]
        return shares_of_larger(reduced(squares, self.reduce))


def shares_of_larger(squares: Tensor) -> Tensor:
    """Return each value over the sum of all that are at least as large, (N,), in (0, 1]."""
    order = torch.argsort(squares, descending=True, stable=True)
    ranked = squares[order]
    scores = torch.empty_like(squares)
    scores[order] = ranked / ranked.cumsum(0).clamp_min(torch.finfo(ranked.dtype).tiny)
    return scores
