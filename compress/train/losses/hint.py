"""Regression of the teacher's features: FitNets (Romero et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Projected, Taps, same_size


@dataclass(eq=False, repr=False)
class Hint(Projected):
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

    def forward(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the mean squared difference, averaged over pairs, a scalar."""
        losses = []
        for pair in self.mapped(student, teacher):
            mapped, wanted = same_size(*pair)
            losses.append(F.mse_loss(mapped.float(), wanted.float()))
        return torch.stack(losses).mean()
