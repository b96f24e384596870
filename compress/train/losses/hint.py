"""Regression of the teacher's features: FitNets (Romero et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Taps, _features


@dataclass(eq=False, repr=False)
class Hint(nn.Module):
    """Match the teacher's features after a learned linear map of the student's (FitNet).

    Args:
        layers: "auto", names of layers that both networks have, or {student: teacher}.

    Source: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015,
    https://arxiv.org/abs/1412.6550, equation 3. Difference: trained together with the other
    losses, not in a stage before them.
    """

    layers: Layers = "auto"

    weight: ClassVar[float] = 1.0
    needs: ClassVar[Needs] = "stages"

    def __post_init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList()

    def prepare(self, student: Taps, teacher: Taps, labels: Tensor) -> None:
        """Create a map for every pair of features of a dry run."""
        for mine, theirs in zip(student.features, teacher.features, strict=True):
            self.maps.append(_features.project(mine.shape[1], theirs.shape[1], mine))

    def forward(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the mean squared difference, averaged over pairs, a scalar."""
        losses = []
        for project, mine, theirs in zip(
            self.maps, student.features, teacher.features, strict=True
        ):
            mapped, wanted = _features.same_size(project(mine), theirs)
            losses.append(F.mse_loss(mapped.float(), wanted.float()))
        return torch.stack(losses).mean()
