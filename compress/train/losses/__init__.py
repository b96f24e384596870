"""Distillation losses: one file for each.

A loss is a dataclass, named after its file, whose fields are its options, called with the Taps of
the student (which carry gradients), those of the teacher (detached) and the targets, (B,) int64:
``__call__(student, teacher, target)`` is a scalar. It has a ``weight``, and may have:

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layers = Literal["auto"] | Sequence[str] | Mapping[str, str]
Needs = Literal["logits", "stages", "last", "embedding", "necks"]
OfClasses = Literal["image", "pixel"] | None


@dataclass(frozen=True)
class Taps:
    """What one network computed for one batch."""

    logits: Tensor  # (B, K), class order of the student; or the main output of any shape
    features: tuple[Tensor, ...] = ()  # shallow to deep, (B, C, H, W) or (B, C)
    index: Tensor | None = None  # (B,) int64, positions of the images in the train split


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context in which products are computed in float32, whatever surrounds it."""
    return torch.autocast(like.device.type, enabled=False)


def feature_pairs(student: Taps, teacher: Taps) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each feature of the student with that of the teacher, shallow to deep."""
    return zip(student.features, teacher.features, strict=True)


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both features at the smaller of their spatial sizes, averaged, (B, C, H, W)."""
    if a.ndim != 4 or a.shape[2:] == b.shape[2:]:
        return a, b
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)


def vectors(feature: Tensor) -> Tensor:
    """Return one float32 vector per image, (B, C): the mean over space of a (B, C, H, W)."""
    feature = feature.float()
    return feature.mean((2, 3)) if feature.ndim == 4 else feature.flatten(1)


def project(in_channels: int, out_channels: int, like: Tensor) -> nn.Module:
    """Return a linear map between channels for features shaped as ``like``: 1x1 or linear."""
    if like.ndim == 4:
        return nn.Conv2d(in_channels, out_channels, 1).to(like.device)
    return nn.Linear(in_channels, out_channels).to(like.device)


class Projected(nn.Module):
    """A loss with ``maps`` from the student's channels to the teacher's, one for each pair."""

    def __post_init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList()

    def prepare(self, student: Taps, teacher: Taps, labels: Tensor) -> None:
        """Create a map between channels for every pair of features of a dry run."""
        for mine, theirs in feature_pairs(student, teacher):
            self.maps.append(project(mine.shape[1], theirs.shape[1], mine))

    def mapped(self, student: Taps, teacher: Taps) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each feature of the student, mapped, with that of the teacher."""
        for to_teacher, (mine, theirs) in zip(
            self.maps, feature_pairs(student, teacher), strict=True
        ):
            yield to_teacher(mine), theirs


class Softened:
    """A loss on logits that are divided by a temperature."""

    temperature: float
    standardize: bool

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def logits(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both in float32, with mean 0 and deviation 1 per image if asked, (B, K) each.

        Then only the shape of an answer counts, not its scale.

        Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024,
        https://arxiv.org/abs/2403.01427, algorithm 1.
        """
        student, teacher = student.float(), teacher.float()
        if self.standardize:
            return _standardized(student), _standardized(teacher)
        return student, teacher


def _standardized(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (logits.std(1, keepdim=True) + 1e-7)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
