"""Distillation losses: one file for each.

A loss is a dataclass, named after its file, whose fields are its options. Besides
``__call__(student, teacher, target)`` it may have:

- ``needs``: what it wants to see of the networks: ``"logits"`` (the default), ``"stages"``
  (features of every pair of stages), ``"last"`` (of the last pair) or ``"embedding"`` (what the
  classifiers are fed with), or ``"necks"`` (the last at each of the smallest sizes, also of maps
  that were enlarged). With any but the first, ``layers`` is an option as well.
- ``weight``: its usual weight beside a cross-entropy of weight 1; recipes overrule it.
- ``of_classes``: "image" where it reads logits of one class an image, "pixel" where they may be of
  every pixel as well; other tasks cannot use it. None (the default): whatever the outputs are.
- ``relational``: whether it compares images with each other, so that the batch matters.
- ``meets``: whether processes that train together exchange what they computed in it.
- ``prepare(student, teacher, labels)``: called once with the outputs of a dry run and the classes
  of all training images, (N,); creates adapters. A loss with adapters is an ``nn.Module``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

Layers = Literal["auto"] | Sequence[str] | Mapping[str, str]
Needs = Literal["logits", "stages", "last", "embedding", "necks"]
OfClasses = Literal["image", "pixel"] | None


@dataclass(frozen=True)
class Taps:
    """What one network computed for one batch."""

    logits: Tensor  # (B, K), class order of the student; or the main output of any shape
    features: tuple[Tensor, ...] = ()  # shallow to deep, (B, C, H, W) or (B, C)
    index: Tensor | None = None  # (B,) int64, positions of the images in the train split


class Loss(Protocol):
    """The part of the contract that every loss has."""

    weight: ClassVar[float]

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return how far the student is from the teacher, a scalar.

        Args:
            student: Carries gradients.
            teacher: Detached.
            target: (B,) int64.
        """
        ...


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context in which products are computed in float32, whatever surrounds it."""
    return torch.autocast(like.device.type, enabled=False)
