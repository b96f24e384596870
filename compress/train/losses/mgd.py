"""Masked generative distillation (Yang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Projected, Taps, same_size


@dataclass(eq=False, repr=False)
class Mgd(Projected):
    """Generate the teacher's whole feature from the student's with random places masked.

    Args:
        mask: Share of the places that are masked, in [0, 1).
        layers: "auto" (the last pair), names of layers that both networks have, or
            {student: teacher}.

    Source: Yang et al., Masked Generative Distillation, ECCV 2022,
    https://arxiv.org/abs/2205.01529, equations 2 to 5; squared differences are summed per image.
    """

    mask: float = 0.15
    layers: Layers = "auto"

    weight: ClassVar[float] = 7e-5
    needs: ClassVar[Needs] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask < 1:
            raise ValueError(f"mask {self.mask} must be in [0, 1)")
        self.generators = nn.ModuleList()

    def prepare(self, student: Taps, teacher: Taps, labels: Tensor) -> None:
        """Create a map and a generator for every pair of features of a dry run."""
        super().prepare(student, teacher, labels)
        for theirs in teacher.features:
            channels = theirs.shape[1]
            generator = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            self.generators.append(generator.to(student.logits.device))

    def forward(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the squared difference per image, summed over pairs, a scalar."""
        losses = []
        for generate, pair in zip(self.generators, self.mapped(student, teacher), strict=True):
            mapped, wanted = same_size(*pair)
            places = torch.rand_like(mapped[:, :1], dtype=torch.float32)
            generated = generate(mapped * (places >= self.mask).to(mapped.dtype))
            squared = F.mse_loss(generated.float(), wanted.float(), reduction="sum")
            losses.append(squared / len(mapped))
        return torch.stack(losses).sum()
