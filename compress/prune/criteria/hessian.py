"""Second-order change of the loss if the channel were gone (needs images and labels)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Need, Reduction, reduced


@dataclass(frozen=True)
class Hessian(CheckedOptions):
    """Score a channel by half the curvature of the loss times the square of its weights.

    Only the diagonal of the Hessian is used, estimated with random signs z as z * (H z). Negative
    curvature, an artefact of a point that is not quite a minimum, counts as none.

    Args:
        reduce: How the scores of several layers of a group are combined.

    Source: LeCun et al., Optimal Brain Damage, NIPS 1989, equation 5; the estimator is from Yao et
    al., AdaHessian, AAAI 2021, https://arxiv.org/abs/2006.00719, section 3.1.
    """

    reduce: Reduction = "sum"

    estimates_loss: ClassVar[bool] = True
    needs: ClassVar[Need] = "hessian"

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        return reduced(group.curvatures(), self.reduce).clamp_min(0.0)
