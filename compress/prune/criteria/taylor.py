"""First-order change of the loss if the channel were gone (needs images and labels)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from compress.prune.criteria import ChannelGroup, CheckedOptions, Need

Power = Literal["square", "magnitude"]


@dataclass(frozen=True)
class Taylor(CheckedOptions):
    """Score a channel by how much the loss would change, to first order, if it were zero.

    For every few images the change is the sum of weight x gradient over the weights that read the
    channel, and over all consumers, since they lose it together.

    Args:
        power: "square" averages the squared changes, which also is the Fisher information of a gate
            on the channel; "magnitude" averages their absolute values.
        images_per_gradient: Images that one gradient is averaged over. Few tell more: the changes
            that single images want mostly cancel over many.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019,
    https://arxiv.org/abs/1906.10771, equation 8; summed over coupled channels as in Liu et al.,
    Group Fisher Pruning, ICML 2021, https://arxiv.org/abs/2108.00708, section 3.2.
    """

    power: Power = "square"
    images_per_gradient: int = 8

    estimates_loss: ClassVar[bool] = True
    needs: ClassVar[Need] = "gradients"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_gradient < 1:
            raise ValueError("images_per_gradient must be at least 1")

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        change = group.loss_changes()  # (batches, C)
        return (change.square() if self.power == "square" else change.abs()).mean(0)
