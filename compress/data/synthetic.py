"""Images synthesized so that activations match the statistics of the BatchNorm layers."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compress import progress
from compress.data import Source, usual
from compress.data._images import Hash, Indices, Subset
from compress.data._pictures import ImageSize, sides
from compress.errors import DataError, ModelError, UsageError, boundary
from compress.groups.calls import WatchedCalls
from compress.modules import evaluating

TEST_SHARE = 4  # every fourth image is a test image
BATCH = 32  # images whose statistics are matched together
LR = 0.2  # of Adam, in units of the network's input; falls to 0 along a cosine
COARSEST = 4  # pixels of the coarsest noise that images begin as
SPREAD = 1e-8  # added to a variance before its root: a root is steep at 0
NOTE = "synthetic images, made to match the statistics of the network's BatchNorm layers"


@dataclass(frozen=True)
class Synthetic:
    """Images made from the network alone, for networks whose images may not leave their place.

    Noise is changed until the mean and the deviation of what each BatchNorm layer reads are those
    that it stored in training. Such images serve int8 calibration; there are no labels, and what
    is measured on them tells little of real images. ``mean`` and ``std`` bound the values that a
    pixel can have. A network whose BatchNorm was folded into its convolutions has nothing to match.

    Args:
        images: How many are made.
        steps: Steps of the optimization of each batch.
        seed: Of the noise.

    Source: ZeroQ, Cai et al., CVPR 2020; DeepInversion, Yin et al., CVPR 2020.
    """

    image_size: ImageSize | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None  # of the network's channels, of images in [0, 1]
    std: tuple[float, ...] | None = None
    color: str | None = None
    images: int = 64
    steps: int = 100
    seed: int = 0

    of_network: ClassVar[bool] = True  # ``load`` is given what builds the network

    def __post_init__(self) -> None:
        if self.images < 2 or self.steps < 1:
            raise ValueError(f"{self.images} images, {self.steps} steps: at least 2 and 1")

    def load(self, build: Callable[[], nn.Module] | None) -> Source:
        """Return the images for the network that ``build`` gives, each batch made when it is asked.

        Raises:
            UsageError: there is no network, or nothing says how large its images are.
            DataError: the network has no BatchNorm with statistics.
            ModelError: it does not run on images of the size.
        """
        if build is None:
            raise UsageError(
                "data 'synthetic' is made from the network of a recipe, and this command has none",
                fix="Give images: --data images:FOLDER",
            )
        if self.image_size is None:
            raise UsageError(
                "data 'synthetic': nothing says how large the network's images are",
                fix="Give --image-size 224, or data.image_size in a recipe",
            )
        network = build()
        channels = self.channels or _channels(network)
        mean, std = usual(channels)
        mean, std = self.mean or mean, self.std or std
        shape = channels, *sides(self.image_size)
        matching_loss(network, torch.zeros(2, *shape))  # refuses before any work
        made = _Made(network, shape, mean, std, self)
        is_test = np.arange(self.images) % TEST_SHARE == 0
        train, test = (Subset(made, np.flatnonzero(chosen)) for chosen in (~is_test, is_test))
        return Source(train, test, (), mean=mean, std=std, target="none", note=NOTE)


@dataclass(frozen=True)
class _Made:
    """Images that are made in batches, each by its own seed, and kept as uint8."""

    network: nn.Module
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: Synthetic
    batches: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.zeros(self.options.images, dtype=np.int64)

    def __len__(self) -> int:
        return self.options.images

    def take(self, indices: Indices) -> Tensor:
        places = [divmod(int(index), BATCH) for index in indices]
        for number in sorted({batch for batch, _ in places} - set(self.batches)):
            self.batches[number] = self._pixels(number)
        return torch.stack([self.batches[batch][row] for batch, row in places])

    def update_hash(self, digest: Hash) -> None:
        digest.update(repr((self.shape, self.mean, self.std, self.options)).encode())
        for name, value in self.network.state_dict().items():
            digest.update(name.encode() + value.cpu().float().numpy().tobytes())

    def _pixels(self, number: int) -> Tensor:
        options = self.options
        count = min(BATCH, options.images - number * BATCH)
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        seed = int.from_bytes(hashlib.sha256(f"{options.seed} {number}".encode()).digest()[:4])
        start = _noise((count, *self.shape), torch.Generator().manual_seed(seed))
        batches = -(-options.images // BATCH)
        with progress.task(f"synthetic images, {number + 1} of {batches}", options.steps) as done:
            found = matched_to_batchnorm(
                self.network, start, (-mean / std, (1 - mean) / std), options.steps, done
            )
        pixels = ((found * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return pixels.flip(1) if options.color == "BGR" else pixels


def matched_to_batchnorm(
    network: nn.Module,
    start: Tensor,
    bounds: tuple[Tensor, Tensor],
    steps: int,
    done: progress.ProgressTask,
) -> Tensor:
    """Return images like ``start``, changed until BatchNorm reads the statistics that it stored.

    Images are (B, C, H, W) as the network takes them, within ``bounds``, (C, 1, 1), of each
    channel. ``done`` counts the steps of Adam. In the network nothing is changed.
    """
    images = start.clamp(*bounds).requires_grad_()
    optimizer = torch.optim.Adam([images], LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = matching_loss(network, images)
        (images.grad,) = torch.autograd.grad(loss, images)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(*bounds)
        done.advance(note=f"mismatch {loss.item():.3g}")
    return images.detach()


def matching_loss(network: nn.Module, images: Tensor) -> Tensor:
    """Return how far BatchNorm's stored statistics are from those of ``images``, over all layers.

    Of each layer: the mean over channels of the squared differences of means and of deviations, as
    a share of the mean stored variance.

    Raises:
        DataError: no layer has stored statistics.
        ModelError: the forward pass fails.
    """
    what = f"the network does not run on images of shape {tuple(images.shape[1:])}"
    with evaluating(network), _BatchNormMismatch() as found, boundary(ModelError, what):
        network(images)
    if not found.mismatches:
        raise DataError(
            "the network has no BatchNorm with stored statistics that images could be made to match"
            " (it may have been folded into the convolutions)",
            fix="Calibrate on images, --data images:FOLDER, or give the network before folding",
        )
    return torch.stack(found.mismatches).mean()


class _BatchNormMismatch(WatchedCalls):
    """Records for each call of ``F.batch_norm`` how far its input is from its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.mismatches: list[Tensor] = []

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.batch_norm:
            given = inspect.signature(F.batch_norm).bind(*args, **kwargs).arguments
            if given["running_mean"] is not None and not given.get("training", False):
                self.mismatches.append(
                    _mismatch(given["input"], given["running_mean"], given["running_var"])
                )
        return func(*args, **kwargs)


def _mismatch(read: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    dims = [dim for dim in range(read.ndim) if dim != 1]
    spread = (read.var(dims, unbiased=False) + SPREAD).sqrt()
    squares = (read.mean(dims) - mean) ** 2 + (spread - (variance + SPREAD).sqrt()) ** 2
    return squares.mean() / (variance.mean() + SPREAD)


def _channels(network: nn.Module) -> int:
    """Return how many channels the first convolution takes; 3 if there is none."""
    layers = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return next((layer.in_channels for layer in layers), 3)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return noise that is as strong at every scale, as in photographs; deviation 1."""
    total: Tensor = torch.randn(shape, generator=generator)
    height, width = shape[2:]
    layers, step = 1, 2
    while min(height, width) // step >= COARSEST:
        small = torch.randn(*shape[:2], height // step, width // step, generator=generator)
        total += F.interpolate(small, (height, width), mode="bilinear")
        layers, step = layers + 1, step * 2
    made: Tensor = total / layers**0.5
    return made
