"""Small restoration networks that the recipes train."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SuperResolution(nn.Module):
    """Convolutions at the small size, then pixel shuffle; the picture itself is added.

    Source: Shi et al., Real-Time Single Image and Video Super-Resolution Using an Efficient
    Sub-Pixel Convolutional Neural Network, CVPR 2016, https://arxiv.org/abs/1609.05158.
    """

    def __init__(self, scale: int = 2, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, padding=2), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, 3 * scale**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the picture, (B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W)."""
        detail = F.pixel_shuffle(self.head(self.body(x)), self.scale)
        return F.interpolate(x, scale_factor=float(self.scale), mode="nearest") + detail


class Generator(nn.Module):
    """Transposed convolutions with BatchNorm, from a code to a picture.

    Source: Radford et al., Unsupervised Representation Learning with Deep Convolutional Generative
    Adversarial Networks, ICLR 2016, https://arxiv.org/abs/1511.06434; the last activation is a
    sigmoid, as pictures are in [0, 1].
    """

    def __init__(self, code: int = 32, width: int = 16, side: int = 32, channels: int = 1) -> None:
        super().__init__()
        doublings = max(0, (side // 4 - 1).bit_length())
        if 4 * 2**doublings != side:
            raise ValueError(f"side {side} is not 4 times a power of 2")
        now = width * 2**doublings
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(code, now, 4, bias=False), nn.BatchNorm2d(now), nn.ReLU()
        ]  # fmt: skip
        for step in range(doublings):
            if step == doublings - 1:
                layers.append(nn.ConvTranspose2d(now, channels, 4, 2, padding=1))
                break
            layers += [
                nn.ConvTranspose2d(now, now // 2, 4, 2, padding=1, bias=False),
                nn.BatchNorm2d(now // 2),
                nn.ReLU(),
            ]
            now //= 2
        self.layers = nn.Sequential(*layers)

    def forward(self, code: Tensor) -> Tensor:
        """Return the picture, (B, D, 1, 1) -> (B, C, side, side) in [0, 1]."""
        picture: Tensor = self.layers(code).sigmoid()
        return picture


super_resolution, generator = SuperResolution, Generator  # what recipes call them
