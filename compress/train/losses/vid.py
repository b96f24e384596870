"""Variational information distillation (Ahn et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Taps, feature_pairs, project, same_size


@dataclass(eq=False, repr=False)
class Vid(nn.Module):
    """Make the teacher's features predictable from the student's (variational information).

    The student's feature predicts the mean of a Gaussian over the teacher's; its variance is
    learned per channel, so channels that cannot be predicted count less.

    Args:
        variance: Initial variance, > ``floor``.
        floor: Smallest variance, > 0.
        layers: "auto", names of layers that both networks have, or {student: teacher}.

    Source: Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019,
    https://arxiv.org/abs/1904.05835, equations 4 and 5.
    """

    variance: float = 5.0
    floor: float = 1e-5
    layers: Layers = "auto"

    weight: ClassVar[float] = 1.0
    needs: ClassVar[Needs] = "stages"

    def __post_init__(self) -> None:
        super().__init__()
        if not self.variance > self.floor > 0:
            raise ValueError(f"variance {self.variance} must be above floor {self.floor} above 0")
        self.means = nn.ModuleList()
        self.spreads = nn.ParameterList()

    def prepare(self, student: Taps, teacher: Taps, labels: Tensor) -> None:
        """Create a regressor and a vector of variances for every pair of features of a dry run."""
        softplus = math.log(math.expm1(self.variance - self.floor))  # its inverse, to start with
        for mine, theirs in feature_pairs(student, teacher):
            outputs = theirs.shape[1]
            self.means.append(_regressor(mine.shape[1], outputs, mine))
            self.spreads.append(torch.full((outputs,), softplus, device=mine.device))

    def forward(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the mean negative log-likelihood, averaged over pairs, a scalar."""
        losses = []
        for mean, spread, mine, theirs in zip(
            self.means, self.spreads, student.features, teacher.features, strict=True
        ):
            predicted, wanted = same_size(mean(mine), theirs)
            variance = F.softplus(spread) + self.floor
            variance = variance.view(1, -1, *[1] * (wanted.ndim - 2))
            squared = (predicted.float() - wanted.float()).square()
            losses.append(0.5 * (squared / variance + variance.log()).mean())
        return torch.stack(losses).mean()


def _regressor(inputs: int, outputs: int, like: Tensor) -> nn.Module:
    return nn.Sequential(
        project(inputs, outputs, like),
        nn.ReLU(),
        project(outputs, outputs, like),
    )
