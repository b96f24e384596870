"""Tiny networks, each naming one difficulty of pruning, export and quantization.

``build(name)`` gives one with random weights and random normalization statistics (a misaligned
BatchNorm hides behind fresh ones), ``inputs(name)`` what it takes. Everything that works on
networks is tested on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Difficulty:
    """How to build a network and the shapes of its inputs."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 16, 16),)


ZOO: dict[str, Difficulty] = {}


def zoo(*shapes: tuple[int, ...]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class under its name; without shapes it takes one (2, 3, 16, 16) image batch."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        ZOO[kind.__name__] = Difficulty(kind, shapes or ((2, 3, 16, 16),))
        return kind

    return register


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the network in eval mode with random weights, statistics and affines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ZOO[name].build()
        randomize(model)
    return model.eval()


def inputs(name: str, seed: int = 1) -> tuple[Tensor, ...]:
    """Return random inputs of a network."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in ZOO[name].shapes)


def randomize(model: nn.Module) -> None:
    """Randomize statistics and affines of normalizations, biases and scales, in place."""
    with torch.no_grad():
        for module in model.modules():
            mean, var = (getattr(module, n, None) for n in ("running_mean", "running_var"))
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean.normal_(0, 0.3)
                var.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("scale"):
                parameter.copy_(torch.empty_like(parameter).uniform_(0.4, 1.2))
                if name.endswith("bias"):
                    parameter.sub_(0.8)


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """A stem, what the subclass calls ``body``, global pooling and a linear layer."""

    def __init__(self, body: nn.Module, inputs: int = 16, outputs: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn(3, inputs)
        self.body = body
        self.head = nn.Linear(outputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@zoo()
class Plain(Classifier):
    """Convolutions in a row."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(conv_bn(16, 24), conv_bn(24, 16, stride=2)))


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.bn1(self.conv1(x)))
        return self.activation(x + self.bn2(self.conv2(y)))


@zoo()
class Residual(Classifier):
    """Shortcuts tie the outputs of several convolutions."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(ResidualBlock(16), ResidualBlock(16, nn.Hardswish())))


@zoo()
class ProjectedResidual(Classifier):
    """A strided 1x1 convolution on the shortcut."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Sequential(conv_bn(16, 20, stride=2), conv_bn(20, 24))
            self.shortcut = nn.Conv2d(16, 24, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.main(x) + self.shortcut(x))

    def __init__(self) -> None:
        super().__init__(self.Body(), outputs=24)


class PaddingShortcut(nn.Module):
    """A block with a CIFAR ResNet's parameter-free shortcut (option A)."""

    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 3, 2, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1), nn.BatchNorm2d(planes)
        self.shortcut = Lambda(
            lambda x: F.pad(
                x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Lambda(nn.Module):
    """A function as a module; its channel count is a variable it closes over."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@zoo()
class OptionAShortcut(Classifier):
    """Zeros padded to the channels of a shortcut, their number hidden in a closure."""

    def __init__(self) -> None:
        blocks = nn.Sequential(PaddingShortcut(16, 32), ResidualBlock(32), PaddingShortcut(32, 64))
        super().__init__(blocks, outputs=64)


@zoo()
class ConcatenatedZeros(Classifier):
    """The same shortcut by concatenating zeros made in the forward."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv_bn(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            b, c, h, w = x.shape
            zeros = torch.zeros(b, y.shape[1] - c, h, w, device=x.device, dtype=x.dtype)
            return F.relu(y + torch.cat([x, zeros], 1))

    def __init__(self) -> None:
        super().__init__(self.Body(), outputs=24)


@zoo()
class Depthwise(Classifier):
    """Inverted residual: 1x1, depthwise, 1x1, with ReLU6."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.bn1 = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)
            self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.bn2 = nn.BatchNorm2d(32)
            self.project, self.bn3 = nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu6(self.bn1(self.expand(x)))
            return x + self.bn3(self.project(F.relu6(self.bn2(self.depthwise(y)))))

    def __init__(self) -> None:
        super().__init__(nn.Sequential(self.Block(), self.Block()))


@zoo()
class DepthMultiplier(Classifier):
    """A depthwise convolution that makes two outputs of each input."""

    def __init__(self) -> None:
        body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.BatchNorm2d(32), nn.SiLU()
        )
        super().__init__(body, outputs=32)


@zoo()
class FewGroups(Classifier):
    """Grouped convolution with two large groups."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(conv_bn(16, 24, groups=2), conv_bn(24, 16)))


@zoo()
class ManyGroups(Classifier):
    """Grouped convolution with many small groups, as in ResNeXt."""

    def __init__(self) -> None:
        body = nn.Sequential(conv_bn(16, 32, 1), conv_bn(32, 32, groups=16), conv_bn(32, 16, 1))
        super().__init__(body)


@zoo()
class Concat(Classifier):
    """Branches concatenated, then normalized together, as in DenseNet."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(16, 8), conv_bn(24, 8, 1)
            self.bn, self.last = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x, self.a(x)], 1)
            y = torch.cat([y, self.b(y)], 1)
            return self.last(F.relu(self.bn(y)))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class SharedModule(Classifier):
    """One convolution used twice, at two sizes."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.last = conv_bn(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.bn(self.conv(x)))
            return self.last(F.relu(self.bn(self.conv(F.max_pool2d(y, 2)))))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class SharedWeight(nn.Module):
    """Two layers own one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.second.weight = self.first.weight
        self.mix, self.head = conv_bn(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = F.relu(self.first(y)) + self.second(y)
        return self.head(self.mix(y).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A gate on every channel, computed from all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(gate)


@zoo()
class SqueezeExciteGate(Classifier):
    """Sigmoid gates: zero channels do not stay zero in them."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(conv_bn(16, 24), SqueezeExcite(24), conv_bn(24, 16)))


@zoo()
class LinearGate(Classifier):
    """A squeeze-excite gate from linear layers and a view."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv_bn(16, 16)
            self.fc = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            b, c, _, _ = x.size()
            gate = self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
            return x * gate.expand_as(x)

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class NoBatchNorm(Classifier):
    """Biases instead of BatchNorm, and activations that are not zero at zero."""

    def __init__(self) -> None:
        layers = [
            nn.Conv2d(16, 24, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(24, 16, 3, padding=1),
            nn.Sigmoid(),
        ]
        super().__init__(nn.Sequential(*layers))


@zoo()
class Transposed(nn.Module):
    """Encoder and decoder with transposed convolutions, one of them grouped, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn(3, 16, stride=2)
        self.deep = conv_bn(16, 24, stride=2)
        self.up1 = nn.ConvTranspose2d(24, 16, 2, 2)
        self.up2 = nn.ConvTranspose2d(32, 8, 4, 2, 1, groups=2)
        self.bn, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = torch.cat([F.relu(self.up1(self.deep(skip))), skip], 1)
        return self.head(F.relu(self.bn(self.up2(y))))


@zoo()
class TwoHeads(nn.Module):
    """Several outputs in a dict, one of them features that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(3, 16), conv_bn(16, 24))
        self.left, self.right = conv_bn(24, 8), conv_bn(24, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"map": self.left(x), "logits": self.head(self.right(x).mean((2, 3)))}


@zoo((2, 3, 16, 16), (2, 1, 16, 16))
class TwoInputs(nn.Module):
    """Two inputs, each with a stem, joined by addition and by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 16), conv_bn(1, 16)
        self.join, self.head = conv_bn(32, 16), nn.Linear(16, 5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.a(first), self.b(second)
        return self.head(self.join(torch.cat([a + b, a * b], 1)).mean((2, 3)))


@zoo()
class Chunked(Classifier):
    """``chunk`` ties two halves, as in ShuffleNetV2 and gated units."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.last = conv_bn(16, 24), conv_bn(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.wide(x).chunk(2, dim=1)
            return self.last(a * torch.sigmoid(b))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class SplitSizes(Classifier):
    """``split`` with sizes kept in a list of the module."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [8, 16]
            self.wide = conv_bn(16, 24)
            self.a, self.b = conv_bn(8, 16), conv_bn(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.split(self.wide(x), self.sizes, dim=1)
            return self.a(a) + self.b(b)

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class OneAttributeTwice(Classifier):
    """YOLO's C2f: one attribute sizes both parts of a split, and a view elsewhere."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = 12
            self.wide, self.last = conv_bn(16, 24, 1), conv_bn(48, 16, 1)
            self.blocks = nn.ModuleList(conv_bn(12, 12) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            parts = list(self.wide(x).split((self.c, self.c), 1))
            parts.extend(block(parts[-1]) for block in self.blocks)
            flat = parts[-1].view(x.shape[0], self.c, -1)
            parts[-1] = flat.view(x.shape[0], self.c, *x.shape[2:])
            return self.last(torch.cat(parts, 1))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class ConstantSplit(Classifier):
    """``split`` with sizes written in the program: these channels must stay."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.a, self.b = conv_bn(16, 24), conv_bn(8, 16), conv_bn(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.wide(x).split([8, 16], dim=1)
            return self.a(a) + self.b(b)

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class ChannelShuffle(Classifier):
    """Grouped 1x1 convolutions with a shuffle between them, as in ShuffleNet."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups = 4
            self.first, self.last = conv_bn(16, 32, 1, groups=4), conv_bn(32, 16, 1, groups=4)
            self.middle = conv_bn(32, 32, groups=32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            b, c, h, w = x.shape
            x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, -1, h, w)
            return self.last(self.middle(x))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class ShuffleNetUnit(Classifier):
    """Half the channels pass, the other half is computed, then both are shuffled."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(conv_bn(8, 8, 1), conv_bn(8, 8, groups=8), conv_bn(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            passed, worked = x.chunk(2, dim=1)
            return F.channel_shuffle(torch.cat([passed, self.branch(worked)], 1), 2)

    def __init__(self) -> None:
        super().__init__(nn.Sequential(self.Body(), self.Body()))


@zoo()
class GroupNormed(Classifier):
    """GroupNorm: groups keep equal numbers of channels, statistics are over the kept ones."""

    def __init__(self) -> None:
        body = [
            nn.Conv2d(16, 24, 3, padding=1),
            nn.GroupNorm(4, 24),
            nn.ReLU(),
            nn.Conv2d(24, 16, 1),
        ]
        super().__init__(nn.Sequential(*body, nn.GroupNorm(1, 16)))


@zoo()
class LayerNormed(Classifier):
    """ConvNeXt block: depthwise, channels-last LayerNorm, linear layers, layer scale."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
            self.norm = nn.LayerNorm(16)
            self.expand, self.project = nn.Linear(16, 32), nn.Linear(32, 16)
            self.scale = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            y = self.scale * self.project(F.gelu(self.expand(y)))
            return x + y.permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__(nn.Sequential(self.Block(), self.Block()))


@zoo()
class HandWrittenNorm(Classifier):
    """LayerNorm over channels written with mean and pow, and a GRN."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
            self.scale = nn.Parameter(torch.ones(24, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            mean = x.mean(1, keepdim=True)
            var = (x - mean).pow(2).mean(1, keepdim=True)
            x = self.scale * (x - mean) / torch.sqrt(var + 1e-6)
            energy = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
            return self.b(x * energy / (energy.mean(1, keepdim=True) + 1e-6))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class ResponseNormed(Classifier):
    """GRN as timm's ConvNeXt-V2 has it: an attribute holds the shape, the channels left over."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shape = (1, -1, 1, 1)
            self.weight, self.bias = nn.Parameter(torch.ones(24)), nn.Parameter(torch.ones(24))

        def forward(self, x: Tensor) -> Tensor:
            energy = x.norm(p=2, dim=(2, 3), keepdim=True)
            x = x * energy / (energy.mean(1, keepdim=True) + 1e-6)
            return x * self.weight.view(self.shape) + self.bias.view(self.shape)

    def __init__(self) -> None:
        ends = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        super().__init__(nn.Sequential(ends[0], self.Norm(), ends[1]))


@zoo()
class InstanceNormed(Classifier):
    """InstanceNorm with affine weights."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(16, 24, 3, padding=1), nn.InstanceNorm2d(24, affine=True), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Conv2d(24, 16, 1)))


@zoo()
class InstanceNormedPlainly(Classifier):
    """InstanceNorm without weights: only its ``num_features`` says how many channels it takes."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(16, 24, 3, padding=1), nn.InstanceNorm2d(24), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Conv2d(24, 16, 1)))


@zoo()
class ParametricRelu(Classifier):
    """PReLU with one slope for each channel."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(16, 24, 3, padding=1), nn.PReLU(24), nn.Conv2d(24, 16, 1), nn.PReLU()]
        super().__init__(nn.Sequential(*layers))


@zoo()
class PixelShuffled(nn.Module):
    """Super-resolution: four channels make one, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = conv_bn(3, 16), nn.Conv2d(16, 48, 3, padding=1)
        self.shuffle, self.middle = nn.PixelShuffle(2), conv_bn(12, 8)
        self.unshuffle, self.head = nn.PixelUnshuffle(2), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unshuffle(self.middle(self.shuffle(self.wide(self.stem(x))))))


@zoo()
class FlattenLinear(nn.Module):
    """Channels times places become the inputs of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 12), nn.MaxPool2d(4), conv_bn(12, 10))
        self.classifier = nn.Sequential(nn.Linear(160, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@zoo()
class Res2NetSlices(Classifier):
    """Parts of a tensor go through convolutions one after another."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 6
            self.first, self.last = conv_bn(16, 24, 1), conv_bn(24, 16, 1)
            self.convs = nn.ModuleList(conv_bn(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.split(self.first(x), self.width, 1)
            done = [parts[0]]
            for conv, part in zip(self.convs, parts[1:], strict=True):
                done.append(conv(part + done[-1]))
            return self.last(torch.cat(done, 1)) + x

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class SlicedHalves(Classifier):
    """Channels sliced at half their number, as Ghost modules do, and at an attribute."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keep = 10
            self.wide, self.a, self.b = conv_bn(16, 24), conv_bn(12, 16), conv_bn(12, 16)
            self.c = conv_bn(10, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.wide(x)
            half = y.shape[1] // 2
            z = self.a(y[:, :half]) + self.b(y[:, half:])
            return z + self.c(x[:, : self.keep])

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class HardCodedView(Classifier):
    """A view with the channel count written in the program: it must stay."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.last = conv_bn(16, 24), conv_bn(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.wide(x)
            return self.last(y.view(-1, 24, 256).softmax(-1).view(x.shape[0], 24, 16, 16))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class AttributeView(Classifier):
    """A view with the channel count in an attribute of the module: it follows."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channels = 24
            self.wide, self.last = conv_bn(16, 24), conv_bn(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.wide(x).view(x.shape[0], self.channels, -1)
            return self.last(y.view(-1, self.channels, 16, 16))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class ScaledByCount(Classifier):
    """A number that the program computes from the channel count."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.last = conv_bn(16, 24), conv_bn(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.wide(x)
            return self.last(y * y.shape[1] ** -0.5)

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class WeightNormed(Classifier):
    """Weight norm by parametrization on a convolution."""

    def __init__(self) -> None:
        conv = parametrizations.weight_norm(nn.Conv2d(16, 24, 3, padding=1))
        super().__init__(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(24, 16, 1)))


@zoo()
class SpectralNormed(Classifier):
    """Spectral norm: the weight is divided by a product with buffers."""

    def __init__(self) -> None:
        conv = parametrizations.spectral_norm(nn.Conv2d(16, 24, 3, padding=1))
        super().__init__(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(24, 16, 1)))


@zoo()
class Maxout(Classifier):
    """Halves by an attribute of one of PyTorch's own modules."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.last = nn.Conv2d(16, 24, 3, padding=1), conv_bn(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            first, second = torch.split(self.wide(x), self.wide.out_channels // 2, 1)
            return self.last(torch.max(first, second))

    def __init__(self) -> None:
        super().__init__(self.Body())


class StandardizedConv(nn.Conv2d):
    """A convolution whose filters are standardized in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@zoo()
class WeightStandardized(Classifier):
    """Filters computed from the weight, reduced over its input channels; sigmoid in between."""

    def __init__(self) -> None:
        layers = [StandardizedConv(16, 24, 3, padding=1), nn.Sigmoid(), StandardizedConv(24, 16, 1)]
        super().__init__(nn.Sequential(*layers))


@zoo()
class Interpolated(nn.Module):
    """Features of two sizes brought together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 16), conv_bn(16, 16, stride=2), conv_bn(16, 12)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = F.interpolate(self.b(a), size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.head(self.c(a + b))


@zoo()
class Attention(Classifier):
    """Channel attention over spatial positions: query and key meet in a product."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
            self.value, self.last = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, _, h, w = x.shape
            query, key = self.query(x).flatten(2), self.key(x).flatten(2)
            weights = torch.bmm(query.transpose(1, 2), key).softmax(-1)
            value = torch.bmm(self.value(x).flatten(2), weights.transpose(1, 2))
            return x + self.last(value.view(b, -1, h, w))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class ChannelAttention(Classifier):
    """ECA: a convolution slides over the channels, which must stay."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.eca = conv_bn(16, 24), nn.Conv1d(1, 1, 3, padding=1)
            self.last = conv_bn(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wide(x)
            y = self.eca(x.mean((2, 3), keepdim=True).squeeze(-1).transpose(1, 2))
            return self.last(x * torch.sigmoid(y.transpose(1, 2).unsqueeze(-1)))

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class SelectiveKernel(Classifier):
    """Branches stacked and mixed by a softmax over the branches."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(16, 16), conv_bn(16, 16, 5)
            self.fc, self.gates = nn.Linear(16, 8), nn.ModuleList(nn.Linear(8, 16) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            branches = torch.stack([self.a(x), self.b(x)], 1)
            z = F.relu(self.fc(branches.sum(1).mean((2, 3))))
            gates = torch.stack([gate(z) for gate in self.gates], 1).softmax(1)
            return (branches * gates[..., None, None]).sum(1)

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class SteppedChannels(Classifier):
    """Every other channel."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.a, self.b = conv_bn(16, 24), conv_bn(12, 16), conv_bn(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.wide(x)
            return self.a(y[:, ::2]) + self.b(y[:, 1::2])

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class AuxiliaryHead(nn.Module):
    """A head that runs in training only must be cut along."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.deep = conv_bn(3, 16), conv_bn(16, 16)
        self.aux, self.head = nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.trunk(x)
        logits = self.head(self.deep(x).mean((2, 3)))
        return (logits, self.aux(x.mean((2, 3)))) if self.training else logits


@zoo((2, 3, 20))
class OneDimensional(nn.Module):
    """Conv1d with BatchNorm1d, pooling and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)
        self.bn, self.head = nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.a(x)), 2)
        return self.head(F.adaptive_avg_pool1d(x + self.bn(self.b(x)), 1).flatten(1))


@zoo((1, 2, 6, 8, 8))
class ThreeDimensional(nn.Module):
    """Conv3d on a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv3d(2, 12, 3, padding=1), nn.BatchNorm3d(12)
        self.b, self.head = nn.Conv3d(12, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.bn(self.a(x)))).mean((2, 3, 4)))


@zoo()
class SpatialGate(Classifier):
    """Maximum and mean over channels weigh places, after a convolution (CBAM)."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.gate = conv_bn(16, 16), nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wide(x)
            both = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
            return x * self.gate(both).sigmoid()

    def __init__(self) -> None:
        super().__init__(self.Body())


@zoo()
class ChannelTokens(Classifier):
    """Fused attention between channels: its softmax is over channels that can be cut."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Conv2d(16, 36, 1), nn.Conv2d(12, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (F.normalize(part.flatten(2), dim=-1) for part in self.qkv(x).chunk(3, 1))
            y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            return x + self.out(y.unflatten(-1, x.shape[2:]))

    def __init__(self) -> None:
        super().__init__(self.Body())


class Stages(nn.Module):
    """Three stages and a linear layer; subclasses put their difficulty between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.deep = conv_bn(3, 16), conv_bn(16, 24), conv_bn(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.between(self.wide(self.stem(x)))).mean((2, 3)))

    def between(self, x: Tensor) -> Tensor:
        return x


@zoo()
class ScaleChecked(Stages):
    """Images of 0..255 are scaled: the program looks at the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 255 if x.max() > 10 else x)


@zoo()
class NanChecked(Stages):
    """A check for NaN between two layers."""

    def between(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            raise ValueError("not a number")
        return x


@zoo()
class ValuesPrinted(Stages):
    """Values are taken out of the network for a log: as a number, and in numpy."""

    def between(self, x: Tensor) -> Tensor:
        self.log = f"{x.mean().item():.3f} {x.detach().mean((1, 2, 3)).numpy().max():.3f}"
        return x


@zoo()
class CountInBuffer(Stages):
    """How often a step is repeated, and a factor, are values of the network's own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("times", torch.tensor(2))
        self.strides = torch.tensor([4.0])

    def between(self, x: Tensor) -> Tensor:
        for _ in range(int(self.times)):
            x = x + F.relu(x)
        return x * x.new_full((1, 1, 1, 1), self.strides[0])


@zoo()
class ValuesChoose(Stages):
    """Pixels chosen by value: shapes depend on the image, what follows has the same channels."""

    def between(self, x: Tensor) -> Tensor:
        bright = x.mean((0, 2, 3)) > 0
        return x * (1 + len(bright.new_ones(int(bright.new_ones(2).sum())).nonzero()))


@zoo()
class DroppedChannels(Stages):
    """Dropout of whole channels, and a head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.aux = nn.Dropout2d(0.1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.drop(self.wide(self.stem(x)))
        logits = self.head(self.deep(x).mean((2, 3)))
        return (logits, self.aux(x.mean((2, 3)))) if self.training else logits


@zoo()
class KernelOfOne(nn.Module):
    """A convolution with kernel 1 over stacked vectors does not slide along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = conv_bn(3, 16), nn.Conv1d(3, 1, 1)
        self.branches = nn.ModuleList(conv_bn(16, 24) for _ in "abc")
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows = torch.stack([branch(x).mean((2, 3)) for branch in self.branches], 1)
        return self.head(self.mix(rows).squeeze(1))


@zoo()
class UnitLength(Stages):
    """F.normalize over the channels: its norm is expanded inside PyTorch's function."""

    def between(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


@zoo()
class SplitRest(Stages):
    """``split([part, width - part])``: a difference of two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.part = 24, 8
        self.mixed = nn.Conv2d(8, 8, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [self.part, self.width - self.part], 1)
        return torch.cat([self.mixed(first), rest], 1)


@zoo()
class SplitRestFirst(SplitRest):
    """The difference comes before the attribute that it is made of."""

    def between(self, x: Tensor) -> Tensor:
        rest, first = x.split([self.width - self.part, self.part], dim=1)
        return torch.cat([rest, self.mixed(first)], 1)


@zoo()
class MergedWeight(nn.Module):
    """``weight.data = ...`` in eval mode: branches are merged before each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 1)
        self.merged = nn.Conv2d(3, 16, 3, padding=1)
        self.deep, self.head = conv_bn(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.a(x) + self.b(x)
        else:
            self.merged.weight.data = self.a.weight + F.pad(self.b.weight, (1, 1, 1, 1))
            self.merged.bias.data = self.a.bias + self.b.bias
            x = self.merged(x)
        return self.head(self.deep(F.relu(x)).mean((2, 3)))


@zoo()
class ReshapedInPlace(Stages):
    """Dimensions are added, removed and exchanged in place."""

    def between(self, x: Tensor) -> Tensor:
        x = x * 2
        x.unsqueeze_(1).squeeze_(1).transpose_(1, 2)
        return x.transpose_(2, 1)


@zoo()
class MedianTaken(Stages):
    """The median of everything is subtracted: it looks across the channels."""

    def between(self, x: Tensor) -> Tensor:
        return x - x.median()


@zoo()
class WidthAsserted(Stages):
    """An assertion on a width keeps that layer, not the one after it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.wide(x)
        assert x.shape[1] == 24
        x = self.deep(x)
        return self.head(x.mean((2, 3)))


@zoo()
class WidthCompared(Stages):
    """Widths are compared with numbers that modules keep, as checks of inputs do."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.half = 24, 12

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.stem(x))
        if x.shape[1] != self.width or x.size(1) // 2 != self.half:
            raise ValueError("another number of channels")
        return self.head(self.deep(x).mean((2, 3)))


@zoo()
class FusedAttention(Classifier):
    """PyTorch's own attention with its default scale, which counts the channels of a head."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.heads = nn.Linear(16, 48), nn.Linear(16, 16), 2

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(2).transpose(1, 2)
            b, n, c = rows.shape
            qkv = self.qkv(rows).reshape(b, n, 3, self.heads, c // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
            return x + self.out(y).transpose(1, 2).reshape(x.shape)

    def __init__(self) -> None:
        super().__init__(self.Body())


class ReadsText(nn.Module):
    """A CNN whose columns a recurrent layer reads one after another (CRNN)."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.stem, self.deep, self.cell = conv_bn(3, 16), conv_bn(16, 24, stride=2), cell
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.deep(self.stem(x)).mean(2).transpose(1, 2)
        return self.head(self.cell(columns)[0])


@zoo()
class RecurrentLstm(ReadsText):
    """Two layers of an LSTM, in both directions."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(24, 10, 2, batch_first=True, bidirectional=True))


@zoo()
class RecurrentGru(ReadsText):
    """A GRU."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(24, 20, batch_first=True))


@zoo()
class QuantileTaken(Stages):
    """A quantile of everything is subtracted, and one of each image's channels."""

    def between(self, x: Tensor) -> Tensor:
        return x - x.quantile(0.3) - torch.quantile(x, 0.8, dim=1, keepdim=True)


class Attended(nn.Module):
    """Pixels attend to each other through nn.MultiheadAttention."""

    need_weights = False

    def __init__(self, width: int, **sizes: int) -> None:
        super().__init__()
        self.stem, self.query = conv_bn(3, 16), nn.Linear(16, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **sizes)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.stem(x).flatten(2).transpose(1, 2)
        asked = self.query(rows)
        keys = rows if self.attention.q_proj_weight is not None else asked
        found, _ = self.attention(asked, keys, keys, need_weights=self.need_weights)
        return self.head((asked + found).mean(1))


@zoo()
class PackedAttention(Attended):
    """Queries, keys and values of one width, whose weights are one tensor."""

    def __init__(self) -> None:
        super().__init__(12)


@zoo()
class CrossAttention(Attended):
    """Keys and values of another width than queries."""

    def __init__(self) -> None:
        super().__init__(12, kdim=16, vdim=16)


@zoo()
class AttentionWithWeights(CrossAttention):
    """Its weights are asked for: PyTorch scales queries by a number made of a width."""

    need_weights = True


@zoo()
class ScaledAttention(Classifier):
    """Attention as people write it, each scale by another way from a width to a number."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(16, n) for n in (8, 8, 12))

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(2).transpose(1, 2)
            query, key, value = self.query(rows), self.key(rows), self.value(rows)
            scores = query @ key.transpose(1, 2) / math.sqrt(query.size(-1))
            scores = scores / torch.sqrt(torch.tensor(key.shape[2], dtype=torch.float32))
            scores = torch.add(scores, scores, alpha=1 / value.shape[2])
            found = scores.div_(query.new_tensor([value.shape[2]])).softmax(-1) @ value
            return found.transpose(1, 2).unflatten(2, x.shape[2:])

    def __init__(self) -> None:
        super().__init__(self.Body(), outputs=12)


class Picked(Stages):
    """Channels picked by a buffer, some twice and some not at all, for a grouped convolution."""

    numbers = (5, 0, 3, 3, 11, 8, 22, 9, 13, 21, 6, 15, 12, 10, 7, 7)

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(len(self.numbers), 24, 1, groups=4)
        self.register_buffer("index", torch.tensor(self.numbers))


@zoo()
class PickedChannels(Picked):
    """By index_select, as in CondenseNet."""

    def between(self, x: Tensor) -> Tensor:
        return self.grouped(x.index_select(1, self.index))


@zoo()
class ReorderedChannels(Picked):
    """By indexing, two layers by one buffer."""

    numbers = tuple(number ^ 1 for number in range(24))

    def between(self, x: Tensor) -> Tensor:
        return self.grouped(x[:, self.index])[:, self.index] + x


@zoo()
class FourierGate(Stages):
    """Each channel's spectrum over space times a learned one, as in FFTformer's feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.rand(24, 1, 1) + 0.5)

    def between(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.spectrum, s=x.shape[2:])


@zoo()
class FourierUnit(Stages):
    """A 1x1 convolution of spectra, real and imaginary parts as channels: LaMa's (FFC)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = conv_bn(48, 48, 1)

    def between(self, x: Tensor) -> Tensor:
        found = torch.view_as_real(torch.fft.rfftn(x, dim=(-2, -1), norm="ortho"))
        found = self.mix(found.permute(0, 1, 4, 2, 3).flatten(1, 2))
        parts = found.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2).contiguous()
        spectrum = torch.view_as_complex(parts)
        return torch.fft.irfftn(spectrum, s=x.shape[2:], dim=(-2, -1), norm="ortho") + x


@zoo()
class WrittenWhereChosen(nn.Module):
    """Pixels get values by masks that the network computes, as in conversions between colours.

    Source: the transform at the end of HVI-CIDNet, in the package spandrel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = conv_bn(3, 16), conv_bn(16, 24)
        self.last = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        hue, value = self.last(self.wide(self.stem(x))).unbind(1)
        found, chosen = torch.zeros_like(hue), hue > value
        found[chosen] = value[chosen]
        found[~chosen] = hue[~chosen] * 0.5
        return found.unsqueeze(1)


@zoo()
class GatedUnit(Stages):
    """Half of the channels times the sigmoid of the other half: nn.GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(24, 48, 1), nn.GLU(1))

    def between(self, x: Tensor) -> Tensor:
        return self.gate(x)


@zoo()
class FoldedPatches(Stages):
    """Patches taken apart and put together again, as in MobileViTv2; then windows that overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = conv_bn(24, 24, 1)

    def between(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        patches = F.unfold(x, 4, stride=4).reshape(b, c, 16, -1)
        x = F.fold(self.mix(patches).reshape(b, c * 16, -1), size, 4, stride=4)
        return F.fold(F.unfold(x, 3, padding=1), size, 3, padding=1)


@zoo()
class Deformable(Stages):
    """A convolution whose kernel goes to places that another one finds, for two parts of it."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.places, self.masks = nn.Conv2d(24, 36, 3, padding=1), nn.Conv2d(24, 18, 1)
        self.bent = DeformConv2d(24, 24, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return self.bent(x, self.places(x), self.masks(x).sigmoid())


@zoo()
class DeformableInGroups(Stages):
    """Deformable convolutions of each channel alone, of many groups, and of few."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.places = nn.Conv2d(24, 18, 3, padding=1)
        self.bent = nn.ModuleList(DeformConv2d(24, 24, 3, padding=1, groups=n) for n in (24, 8, 2))

    def between(self, x: Tensor) -> Tensor:
        places = self.places(x)
        for bent in self.bent:
            x = bent(x, places).relu()
        return x


@zoo()
class WrittenSlices(Stages):
    """The first channels are written in place, by an attribute, as in partial convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 6
        self.some = nn.Conv2d(6, 6, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        first = self.some(x[:, : self.count])
        x = x.clone()
        x[:, : self.count] = first
        return x


@zoo()
class ShiftedParts(Stages):
    """Parts of the channels are shifted in space, each with a share of the width: S2-MLP's."""

    def between(self, x: Tensor) -> Tensor:
        part = x.shape[1] // 3
        shifted = torch.zeros_like(x)
        shifted[:, :part, :, 1:] = x[:, :part, :, :-1]
        shifted[:, part : 2 * part, :, :-1] = x[:, part : 2 * part, :, 1:]
        shifted[:, 2 * part :] = x[:, 2 * part :]
        return shifted


@zoo()
class NormedEach(Stages):
    """A group normalization with a group for each channel: an instance normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(24, 24)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)


@zoo()
class ImageByImage(Stages):
    """A layer that runs once for each image of the batch, as routers of CondConv do."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(24, 24)

    def between(self, x: Tensor) -> Tensor:
        return torch.cat(
            [one * self.choose(one.mean((2, 3)))[..., None, None] for one in x.split(1)]
        )


@zoo()
class ChosenTokens(Stages):
    """The best positions are picked, by gather and by arrays of numbers: RT-DETR's queries."""

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        best = tokens.mean(2).topk(64, 1).indices
        batch = torch.arange(len(x)).repeat_interleave(64)
        first = tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[2]))
        second = tokens[batch, best.flatten()].view(len(x), 64, -1)
        both: Tensor = first + second
        return both.transpose(1, 2).unflatten(2, (8, 8))


@zoo()
class SpreadStatistics(Stages):
    """One deviation for two channels, spread over both; EvoNorm."""

    def between(self, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), 12, x.shape[1] // 12, *x.shape[2:])
        deviation = grouped.var((2, 3, 4), keepdim=True).add(0.1).sqrt()
        return x / deviation.expand(grouped.shape).reshape(x.shape)


@zoo()
class SlidingWindows(Stages):
    """Windows that overlap, a maximum over each: the neighbourhoods of halo attention."""

    def between(self, x: Tensor) -> Tensor:
        windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
        return windows.reshape(*windows.shape[:4], -1).amax(4)
