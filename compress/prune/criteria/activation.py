"""How large a channel's values are as its consumers see them (needs images)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Need, Reduction, reduced
from compress.prune.criteria.l2 import L2

Statistic = Literal["mean_abs", "nonzero", "contribution"]


@dataclass(frozen=True)
class Activation(CheckedOptions):
    """Score a channel by its values on the given images.

    A group whose channels enter no layer that could be watched is scored by the L2 norm of its
    filters instead.

    Args:
        statistic: "mean_abs" is the mean magnitude of the values, "nonzero" the share of them that
            is not zero (one minus APoZ), "contribution" the root of their mean square times the
            norm of the weights that read them: what the consumers would miss.
        reduce: How the scores at several consumers of a group are combined.

    Source: Hu et al., Network Trimming, 2016, https://arxiv.org/abs/1607.03250, section 3.1 (APoZ);
    Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024,
    https://arxiv.org/abs/2306.11695, section 3 (contribution; there for single weights).
    """

    statistic: Statistic = "mean_abs"
    reduce: Reduction = "mean"

    needs: ClassVar[Need] = "activations"

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        if self.statistic == "contribution":
            scores = group.contributions()
        else:
            scores = [a.mean(1) for a in group.activations(self.statistic)]  # a: (C, k)
        return reduced(scores, self.reduce) if scores else L2("filters", self.reduce)(group)
