"""Small CNNs for small images: the networks that the recipes train and the benchmarks measure."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolved(  # of a convolution
    in_channels: int,
    out_channels: int,
    size: int,
    *activation: nn.Module,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Return a convolution that keeps the size, divided by ``stride``, and its BatchNorm."""
    layer = nn.Conv2d(
        in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=False
    )
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), *activation)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's feature, (B, C, H, W) -> (B, C', H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.padding == 0:
            return x
        before = self.padding // 2
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, before, self.padding - before))


class CifarResNet(nn.Module):
    """Residual network for small images, with option A shortcuts (strided, zero-padded).

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
    https://arxiv.org/abs/1512.03385, section 4.2.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, C, H, W) -> (B, K)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class SqueezeExcite(nn.Module):
    """Weigh channels by what all of them show on average.

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, https://arxiv.org/abs/1709.01507.
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with every channel scaled by its gate, (B, C, H, W)."""
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(gate))))
        return x * gate


class InvertedResidual(nn.Module):
    """Widen, filter each channel, weigh, narrow; with a shortcut where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = convolved(in_channels, hidden, 1, nn.Hardswish())
        self.filter = convolved(hidden, hidden, 3, nn.Hardswish(), stride=stride, groups=hidden)
        self.gate = SqueezeExcite(hidden, max(8, hidden // 4))
        self.project = convolved(hidden, out_channels, 1)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's feature, (B, C, H, W) -> (B, C', H / stride, W / stride)."""
        out: Tensor = self.project(self.gate(self.filter(self.expand(x))))
        return x + out if self.has_shortcut else out


class CifarMobileNet(nn.Module):
    """Depthwise network with squeeze-excite and hard-swish for small images: hard for int8.

    Source: Howard et al., Searching for MobileNetV3, ICCV 2019, https://arxiv.org/abs/1905.02244;
    strides are moved to suit images of 32 x 32 pixels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = convolved(in_channels, 16, 3, nn.Hardswish())
        # in, out, stride, expansion
        rows = ((16, 24, 1, 3), (24, 24, 1, 3), (24, 40, 2, 4), (40, 40, 1, 4), (40, 80, 2, 4))
        self.blocks = nn.Sequential(*(InvertedResidual(*row) for row in (*rows, (80, 80, 1, 4))))
        self.head = convolved(80, 240, 1, nn.Hardswish())
        self.linear = nn.Linear(240, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, C, H, W) -> (B, K)."""
        out = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    rest = (BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


@torch.no_grad()
def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)


class UNet(nn.Module):
    """A small U-Net: two levels down, two up, features of equal size joined.

    Source: Ronneberger et al., U-Net, MICCAI 2015, https://arxiv.org/abs/1505.04597.
    """

    def __init__(self, num_classes: int = 11, width: int = 16) -> None:
        super().__init__()
        self.first = _double(3, width)
        self.second = _double(width, 2 * width)
        self.third = _double(2 * width, 4 * width)
        self.up_second = _double(6 * width, 2 * width)
        self.up_first = _double(3 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of pixels, (B, 3, H, W) -> (B, K, H, W); H and W multiples of 4."""
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        up = F.interpolate(third, scale_factor=2.0, mode="nearest")
        up = self.up_second(torch.cat([up, second], 1))
        up = F.interpolate(up, scale_factor=2.0, mode="nearest")
        logits: Tensor = self.head(self.up_first(torch.cat([up, first], 1)))
        return logits


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    first = convolved(in_channels, out_channels, 3, nn.ReLU())
    return nn.Sequential(*first, *convolved(out_channels, out_channels, 3, nn.ReLU()))


class TutorialCNN(nn.Module):
    """The first CNN of many tutorials: convolutions with pooling, then a large dense layer.

    Four 3x3 convolutions without padding (32, 64, 128, 128 channels), each followed by ReLU and
    2x2 max-pooling, a dense layer of 512 with dropout, and the classifier. Behind the flatten lies
    most of its size: for 150 x 150 pixels, 3.2 of 3.5 million parameters. Images have sides of 46
    or more.

    Source: F. Chollet, Deep Learning with Python, 2017, section 5.2.
    """

    def __init__(self, num_classes: int = 2, in_channels: int = 3, image_size: int = 150) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side, before = image_size, in_channels
        for channels in (32, 64, 128, 128):
            layers += [nn.Conv2d(before, channels, 3), nn.ReLU(), nn.MaxPool2d(2)]
            side, before = (side - 2) // 2, channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(before * side * side, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, C, H, W) -> (B, K)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


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


# What recipes call them.
resnet8, resnet14, resnet20, resnet56 = (partial(CifarResNet, depth) for depth in (8, 14, 20, 56))
mobilenet, unet, tutorial_cnn = CifarMobileNet, UNet, TutorialCNN
super_resolution, generator = SuperResolution, Generator
