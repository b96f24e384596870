"""Channel-wise distillation for dense prediction (Shu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Projected, Taps, check_temperature, same_size


@dataclass(eq=False, repr=False)
class Cwd(Projected):
    """Match, channel by channel, the distribution over places (channel-wise distillation).

    Every channel of a feature becomes a softmax over its places; the student's channels are mapped
    to the teacher's by a 1x1 convolution. For networks that answer with maps: segmentation,
    detection, restoration.

    Args:
        temperature: Features are divided by it before the softmax over places.
        layers: "auto" (the last feature at each of the three smallest sizes, as necks have them),
            names of layers that both networks have, or {student: teacher}.

    Source: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021,
    https://arxiv.org/abs/2011.13256, equations 3 and 4; its weight for features is 50, here the
    pairs are averaged.
    """

    temperature: float = 1.0
    layers: Layers = "auto"

    weight: ClassVar[float] = 10.0
    needs: ClassVar[Needs] = "necks"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)

    def forward(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the divergence of places, averaged over channels, images and pairs, a scalar."""
        losses = []
        for mine, theirs in self.mapped(student, teacher):
            mapped, wanted = same_size(mine.float(), theirs.float())
            logs = (mapped.flatten(2) / self.temperature).log_softmax(2)
            wanted_logs = (wanted.flatten(2) / self.temperature).log_softmax(2)
            apart = F.kl_div(logs, wanted_logs, reduction="none", log_target=True).sum(2)
            losses.append(apart.mean() * self.temperature**2)
        return torch.stack(losses).mean()
