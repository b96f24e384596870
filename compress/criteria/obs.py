"""How much the answers would change if the channel were gone and others made up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.criteria import ChannelGroup, Need, Reader
from compress.criteria.fisher import Fisher

STEPS = 128  # in which the channels of a group leave, one by one where there are no more
RIDGE = 1e-2  # as a share of the mean square, as in refitting
STEEPER = 1e-9  # keeps the order of channels that leave at the same score


@dataclass(frozen=True)
class Obs(Fisher):
    """Score a channel by ``fisher``, times the share of it that the channels left cannot replace.

    Channels leave one by one, the cheapest first, and the weights that read them are fitted after
    each, so that the others take over what they can; what is left over of the change is the share.
    The more have left, the less the rest can replace. Correlations are taken between channels, at
    one place of the image, so that a kernel's size does not matter.

    Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon,
    NeurIPS 1992; one at a time for whole structures as in Kurtic et al., ZipLM, NeurIPS 2023,
    https://arxiv.org/abs/2302.04089. The share as a factor of the Fisher information is our own:
    the error of a layer's answers alone misjudges how much they matter, the more so the later.
    """

    needs: ClassVar[Need | tuple[Need, ...]] = ("answers", "correlations")

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return importance, (C,), higher = keep."""
        alone = super().__call__(group).double()
        replacements = [_Replacement(reader) for reader in group.readers()]
        weights = sum(each.weight for each in replacements)
        if not isinstance(weights, Tensor):
            return alone
        scores = torch.zeros_like(alone)
        left = torch.arange(group.size)
        highest = 0.0
        while len(left):
            shares = sum(each.weight * each.share() for each in replacements) / weights
            cost = alone * torch.where(weights > 0, shares, 1.0)
            leaving = left[cost[left].argsort(stable=True)[: -(-group.size // STEPS)]]
            for channel in leaving.tolist():
                highest = max(highest, float(cost[channel])) * (1 + STEEPER)
                scores[channel] = highest
            for each in replacements:
                each.remove(leaving)
            left = left[~torch.isin(left, leaving)]
        return scores


class _Replacement:
    """What the channels left can replace in one layer that reads them."""

    def __init__(self, reader: Reader) -> None:
        matrix = reader.correlations.double()
        pull = RIDGE * matrix.diagonal().mean().clamp_min(1e-30)
        self._inverse = torch.linalg.inv(matrix + pull * torch.eye(len(matrix)).to(matrix))
        weights = reader.weights.double()
        self._gram = weights @ weights.T
        self._whole = self._gram.diagonal() * matrix.diagonal()  # without replacement
        self.weight = reader.changes.double().square().mean(0)

    def share(self) -> Tensor:
        """Return the share of each channel's part in the answers that is lost without it, (C,)."""
        lost = self._gram.diagonal() / self._inverse.diagonal()
        return torch.where(self._whole > 0, lost / self._whole.clamp_min(1e-300), 1.0)

    def remove(self, channels: Tensor) -> None:
        """Fit the weights of the channels left to those that leave."""
        rows = self._inverse[channels]
        taken = torch.linalg.solve(rows[:, channels], rows).T  # (C, leaving)
        self._inverse = self._inverse - taken @ rows
        mixed = taken @ self._gram[channels]  # of the weights that are taken over with all others
        own = taken @ self._gram[channels][:, channels] @ taken.T
        self._gram = self._gram - mixed - mixed.T + own
        self._inverse.diagonal()[channels] = 1.0  # what they are now is not looked at again
