"""Fisher information of the network's own outputs (needs images only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress.prune.criteria import ChannelGroup, Need


@dataclass(frozen=True)
class Fisher:
    """Score a channel by how far the softened answers would move without it.

    To second order, the divergence between the answers with and without a channel is the Fisher
    information of a gate on it: the mean squared change, as in ``taylor``, of the log-likelihood of
    classes drawn from the network's own answers. The labels are not used. On images that a network
    has fitted, the loss on the labels is flat, and its gradients undervalue late layers; answers
    softened by a temperature still tell what each channel is for, and are what distillation
    teaches.

    Args:
        temperature: Divides the logits before classes are drawn.
        images_per_gradient: Images that one gradient is averaged over, at most: where images are
            few, they share it with fewer, and classes are drawn for them several times. Draws are
            independent, so that changes of several images do not cancel in the mean.

    Source: Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018,
    https://arxiv.org/abs/1801.05787, with classes drawn as the Fisher information asks
    and not the labels; temperature as in Hinton et al., Distilling the Knowledge in a Neural
    Network, 2015, https://arxiv.org/abs/1503.02531, section 2.
    """

    temperature: float = 4.0
    images_per_gradient: int = 8

    estimates_loss: ClassVar[bool] = True
    needs: ClassVar[Need | tuple[Need, ...]] = "answers"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError("temperature must be above 0")
        if self.images_per_gradient < 1:
            raise ValueError("images_per_gradient must be at least 1")

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        return group.loss_changes().square().mean(0)
