"""What the losses on features share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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
