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
FEW_LEFT = 0.7  # of the rows, below which the others are dropped
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
    """What the channels left can replace in one layer that reads them.

    The matrices are changed in place: the rows and columns of channels that have left come out as
    zero, and are dropped when they are many, because copies cost more than the arithmetic.
    """

    def __init__(self, reader: Consumer) -> None:
        matrix = reader.correlations.double()
        pull = RIDGE * matrix.diagonal().mean().clamp_min(1e-30)
        # Positive definite by the ridge; where values are NaN, so are the scores, which is said.
        factor = torch.linalg.cholesky_ex(matrix + pull * torch.eye(len(matrix)).to(matrix)).L
        self._inverse = torch.cholesky_inverse(factor)
        weights = reader.weights.double().cpu()
        self._gram = weights @ weights.T
        self._whole = self._gram.diagonal() * matrix.diagonal()  # without replacement
        self._left = torch.arange(len(matrix))  # rows of the channels left
        self.weight = reader.changes.double().square().mean(0)

    def share(self) -> Tensor:
        """Return the share of each channel's part that is lost without it, of those left: (L,)."""
        whole = self._whole[self._left]
        lost = (self._gram.diagonal() / self._inverse.diagonal())[self._left]
        return torch.where(whole > 0, lost / whole.clamp_min(1e-300), 1.0)

    def remove(self, leaving: Tensor, staying: Tensor) -> None:
        """Fit the weights of the channels that stay to those that leave; both by where they are."""
        gone, self._left = self._left[leaving], self._left[staying]
        rows, gram = self._inverse[gone], self._gram[gone]
        taken = torch.linalg.solve(rows[:, gone], rows).T  # (C, leaving): the identity at `gone`
        # Each entry of the new Gram matrix counts half of what leaves twice.
        change = gram - 0.5 * gram[:, gone] @ taken.T
        self._inverse.addmm_(taken, rows, alpha=-1)
        self._gram.addmm_(taken, change, alpha=-1).addmm_(change.T, taken.T, alpha=-1)
        if len(self._left) < FEW_LEFT * len(self._whole):
            self._inverse = self._inverse[self._left][:, self._left]
            self._gram = self._gram[self._left][:, self._left]
            self._whole, self._left = self._whole[self._left], torch.arange(len(self._left))
