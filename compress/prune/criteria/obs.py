"""Loss increase from removing a channel after the rest is re-fitted (OBS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.prune.criteria import ChannelGroup, Consumer, Need
from compress.prune.criteria.fisher import Fisher

STEPS = 64  # in which the channels of a group leave, one by one where there are no more
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
        left, at_once = torch.arange(group.size), -(-group.size // STEPS)
        highest = 0.0
        while len(left):
            shares = sum(each.weight[left] * each.share() for each in replacements) / weights[left]
            cost = alone[left] * torch.where(weights[left] > 0, shares, 1.0)
            order = cost.argsort(stable=True)
            leaving, staying = order[:at_once], order[at_once:]
            for number in leaving.tolist():
                highest = max(highest, float(cost[number])) * (1 + STEEPER)
                scores[left[number]] = highest
            for each in replacements:
                each.remove(leaving, staying)
            left = left[staying]
        return scores


class _Replacement:
    """What the channels left can replace in one layer that reads them."""

    def __init__(self, reader: Consumer) -> None:
        matrix = reader.correlations.double()
        pull = RIDGE * matrix.diagonal().mean().clamp_min(1e-30)
        self._inverse = torch.linalg.inv(matrix + pull * torch.eye(len(matrix)).to(matrix))
        weights = reader.weights.double().cpu()
        self._gram = weights @ weights.T
        self._whole = self._gram.diagonal() * matrix.diagonal()  # without replacement
        self.weight = reader.changes.double().square().mean(0)

    def share(self) -> Tensor:
        """Return the share of each channel's part that is lost without it, of those left: (L,)."""
        lost = self._gram.diagonal() / self._inverse.diagonal()
        return torch.where(self._whole > 0, lost / self._whole.clamp_min(1e-300), 1.0)

    def remove(self, leaving: Tensor, staying: Tensor) -> None:
        """Fit the weights of the channels that stay to those that leave; both by where they are."""
        rows, gram = self._inverse[leaving], self._gram[leaving]
        taken = torch.linalg.solve(rows[:, leaving], rows[:, staying]).T  # (staying, leaving)
        # Each entry of the new Gram matrix counts half of what leaves twice.
        change = taken @ (gram[:, staying] - 0.5 * gram[:, leaving] @ taken.T)
        self._inverse = self._inverse[staying][:, staying] - taken @ rows[:, staying]
        self._gram = self._gram[staying][:, staying] - change - change.T
        self._whole = self._whole[staying]
