"""Augmentation of whole batches: functions of the images and random draws for each."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.data._targets import VOID
from compress.errors import UsageError
from compress.recipe.settings import AugmentSettings

ERASED_AREA = (0.02, 0.33)  # shares of the image, as in the paper on random erasing
ERASED_ASPECT = (0.3, 1 / 0.3)


class Chance(IntEnum):
    """What each column of a matrix of chances decides."""

    CROP_Y = 0
    CROP_X = 1
    FLIP = 2
    ANGLE = 3
    ZOOM = 4
    RANDAUGMENT = 5
    ERASE = 6
    ERASE_AREA = 7
    ERASE_ASPECT = 8
    ERASE_Y = 9
    ERASE_X = 10
    MIX_KIND = 11
    MIX_SHARE = 12
    CUT_Y = 13
    CUT_X = 14


CHANCES = len(Chance)


def is_random(settings: AugmentSettings) -> bool:
    """Return whether ``settings`` change an image differently from one epoch to the next."""
    mixes = settings.mixup > 0 or settings.cutmix > 0  # with whatever image comes next
    return mixes or (not settings.fixed and settings != AugmentSettings())


def augment(
    images: Tensor,
    chances: Tensor,
    settings: AugmentSettings,
    normalize: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``images``, (B, C, H, W) uint8, changed at random and normalized, float32.

    Row i of ``chances``, (B, CHANCES) uniform numbers in [0, 1), decides all about image i.
    ``normalize`` maps 0..255 to what the network wants. ``images`` are not modified.
    """
    if settings.crop_padding:
        images = cropped(images, chances, settings.crop_padding)
    if settings.flip:
        images = half_mirrored(images, chances)
    if settings.randaugment:
        images = randaugmented(images, chances, settings.randaugment)
    if settings.rotation_degrees or settings.scale:
        images = turned(images, chances, settings.rotation_degrees, settings.scale or (1.0, 1.0))
    images = normalize(images)
    if settings.erasing:
        images = erased(images, chances, settings.erasing)
    return images


def augment_with_labels(
    images: Tensor,
    targets: Any,
    chances: Tensor,
    settings: AugmentSettings,
    normalize: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Any]:
    """Return images as ``augment`` does, and their targets moved with them, of the same form.

    Targets are (B, H, W) masks, (B, C, H, W) images, or "boxes", "labels" and more of each image.
    Settings that mix images or colours are refused.
    """
    wrong = [key for key in ("mixup", "cutmix", "randaugment") if getattr(settings, key)]
    if wrong:
        raise UsageError(
            f"{' and '.join(wrong)} cannot be applied to masks and boxes",
            where="augment",
            expected="crop_padding, flip, rotation_degrees, scale or erasing",
        )
    if settings == AugmentSettings():
        return normalize(images), targets
    pairs = [_moved(*each, settings) for each in zip(images, targets, chances, strict=True)]
    out = normalize(torch.stack([image for image, _ in pairs]))
    moved: Any = [target for _, target in pairs]
    if isinstance(targets, Tensor):
        moved = torch.stack(moved)
    if settings.erasing:
        out = erased(out, chances, settings.erasing)
    return out, moved


def _moved(
    image: Tensor, target: Any, chance: Tensor, settings: AugmentSettings
) -> tuple[Tensor, Any]:
    """Return one image and its label after the same crop, mirroring, rotation and zoom."""
    from torchvision import tv_tensors

    height, width = image.shape[1:]
    chances = chance.tolist()
    change = partial(_geometry, chances=chances, settings=settings)
    if isinstance(target, Tensor) and target.ndim == 2:
        mask = change(tv_tensors.Mask(target), fill=VOID)
        return change(image, fill=0), mask.as_subclass(Tensor)
    if isinstance(target, Tensor):
        scale = target.shape[1] // height  # a crop of the picture to restore is as much larger
        if target.shape[1:] != (scale * height, scale * width) or (height, width) == (1, 1):
            raise UsageError(
                f"images of {height} x {width} and targets of {target.shape[1]} x "
                f"{target.shape[2]} pixels cannot be changed alike",
                where="augment",
                fix="Leave augment out",
            )
        return change(image, fill=0), change(target, fill=0, scale=scale)
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width))
    moved = change(boxes, fill=0).as_subclass(Tensor)
    moved = moved.clamp(min=0).minimum(torch.tensor([width, height] * 2).to(moved))
    seen = ((moved[:, 2:] - moved[:, :2]) >= 1).all(1)
    rest = {key: value[seen] for key, value in target.items() if key != "boxes"}
    return change(image, fill=0), {"boxes": moved[seen], **rest}


def _geometry(
    it: Any, *, chances: list[float], settings: AugmentSettings, fill: int, scale: int = 1
) -> Any:
    """Return an image, a mask or boxes after the changes of shape that ``chances`` decide."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = functional.get_size(it)
    padding = settings.crop_padding
    if padding:
        top, left = (
            scale * int(chances[c] * (2 * padding + 1)) for c in (Chance.CROP_Y, Chance.CROP_X)
        )
        it = functional.pad(it, [scale * padding] * 4, fill=fill)
        it = functional.crop(it, top, left, height, width)
    if settings.flip and chances[Chance.FLIP] < 0.5:
        it = functional.horizontal_flip(it)
    if settings.rotation_degrees or settings.scale:
        low, high = settings.scale or (1.0, 1.0)
        angle = (2 * chances[Chance.ANGLE] - 1) * settings.rotation_degrees
        zoom = low + chances[Chance.ZOOM] * (high - low)
        smooth = InterpolationMode.NEAREST if fill else InterpolationMode.BILINEAR
        it = functional.affine(it, angle, [0, 0], zoom, [0.0, 0.0], interpolation=smooth, fill=fill)
    return it


def cropped(images: Tensor, chances: Tensor, padding: int) -> Tensor:
    """Return windows of the original size from images padded with black, (B, C, H, W)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, (B, C, Y, X, H, W)
    rows = (chances[:, Chance.CROP_Y] * (2 * padding + 1)).long()
    columns = (chances[:, Chance.CROP_X] * (2 * padding + 1)).long()
    each = torch.arange(len(images), device=images.device)
    return windows[each, :, rows, columns]


def half_mirrored(images: Tensor, chances: Tensor) -> Tensor:
    """Return images, about half of them mirrored left to right, (B, C, H, W)."""
    mirror = (chances[:, Chance.FLIP] < 0.5).view(-1, 1, 1, 1)
    return torch.where(mirror, images.flip(3), images)


def randaugmented(images: Tensor, chances: Tensor, operations: int) -> Tensor:
    """Return images after ``operations`` random operations each, (B, C, H, W) uint8.

    Source: Cubuk et al., RandAugment, CVPRW 2020, https://arxiv.org/abs/1909.13719.
    """
    from torchvision.transforms import v2

    change = v2.RandAugment(num_ops=operations)
    seeds = (chances[:, Chance.RANDAUGMENT].double() * 2**24).long().tolist()
    with torch.random.fork_rng(devices=[]):
        out = []
        for image, seed in zip(images, seeds, strict=True):
            torch.default_generator.manual_seed(seed)  # leaves those of GPUs alone
            out.append(change(image))
    return torch.stack(out)


def turned(images: Tensor, chances: Tensor, degrees: float, scale: tuple[float, float]) -> Tensor:
    """Return images rotated by up to ``degrees`` either way and zoomed, (B, C, H, W) float32."""
    height, width = images.shape[2:]
    angle = torch.deg2rad((2 * chances[:, Chance.ANGLE] - 1) * degrees)
    zoom = scale[0] + chances[:, Chance.ZOOM] * (scale[1] - scale[0])
    cos, sin, none = angle.cos() / zoom, angle.sin() / zoom, torch.zeros_like(angle)
    tall = height / width  # grid coordinates are relative to each side
    rows = (torch.stack([cos, -sin * tall, none], 1), torch.stack([sin / tall, cos, none], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def erased(images: Tensor, chances: Tensor, probability: float) -> Tensor:
    """Return images, a share of them with one rectangle set to 0, the mean, (B, C, H, W).

    Source: Zhong et al., Random Erasing Data Augmentation, AAAI 2020,
    https://arxiv.org/abs/1708.04896.
    """
    height, width = images.shape[2:]
    area = _between(chances[:, Chance.ERASE_AREA], *ERASED_AREA) * height * width
    low, high = (torch.tensor(value).log().item() for value in ERASED_ASPECT)
    aspect = _between(chances[:, Chance.ERASE_ASPECT], low, high).exp()
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    wanted = chances[:, Chance.ERASE] < probability
    box = _boxes(
        (chances[:, Chance.ERASE_Y] * (height - tall + 1)).floor(),
        (chances[:, Chance.ERASE_X] * (width - wide + 1)).floor(),
        tall * wanted,
        wide,
        (height, width),
    )
    return images.masked_fill(box, 0.0)


def mixed(
    images: Tensor, target: Tensor, chances: Tensor, settings: AugmentSettings, classes: int
) -> tuple[Tensor, Tensor]:
    """Return images mixed in pairs of neighbours by mixup or cutmix, and their soft targets (B, K).

    The order of a batch is random, so neighbours are random pairs; the last image of an odd batch
    stays alone. With both asked for, each pair takes either with equal chances, by the row of
    ``chances``, (B, CHANCES) in [0, 1), of its first image; with neither all is as it was.
    ``images`` are (B, C, H, W), normalized, ``target`` is (B,), or (B, K) of several classes; they
    are not modified.

    Source: Zhang et al., mixup, ICLR 2018, https://arxiv.org/abs/1710.09412; Yun et al., CutMix,
    ICCV 2019, https://arxiv.org/abs/1905.04899.
    """
    if not settings.mixup and not settings.cutmix:
        return images, target
    each = torch.arange(len(images), device=images.device)
    partner = torch.where((each ^ 1) < len(images), each ^ 1, each)
    chances = chances[each - each % 2]
    if settings.mixup and settings.cutmix:
        cut = chances[:, Chance.MIX_KIND] < 0.5
    else:
        cut = torch.full_like(chances[:, 0], bool(settings.cutmix), dtype=torch.bool)
    blended = _beta(chances[:, Chance.MIX_SHARE], settings.mixup)
    box, uncut = _cut(chances, settings.cutmix, images.shape)
    share = torch.where(cut, uncut, blended)  # of the image itself
    weight = blended.view(-1, 1, 1, 1)
    other = images[partner]
    out = torch.where(
        cut.view(-1, 1, 1, 1),
        torch.where(box, other, images),
        weight * images + (1 - weight) * other,
    )
    hot = (F.one_hot(target, classes) if target.ndim == 1 else target).float()
    return out, share[:, None] * hot + (1 - share[:, None]) * hot[partner]


def _cut(chances: Tensor, alpha: float, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return cutmix's rectangles, (B, 1, H, W) bool, and the shares left outside, (B,)."""
    height, width = shape[2:]
    side = (1 - _beta(chances[:, Chance.MIX_SHARE], alpha)).sqrt()
    y, x = chances[:, Chance.CUT_Y] * height, chances[:, Chance.CUT_X] * width  # centres
    top = (y - side * height / 2).floor().clamp(min=0)
    left = (x - side * width / 2).floor().clamp(min=0)
    bottom = (y + side * height / 2).floor().clamp(max=height)
    right = (x + side * width / 2).floor().clamp(max=width)
    box = _boxes(top, left, bottom - top, right - left, (height, width))
    return box, 1 - box.float().mean((1, 2, 3))


def _boxes(top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks of one rectangle each, (B, 1, H, W) bool."""
    rows = torch.arange(size[0], device=top.device)
    columns = torch.arange(size[1], device=top.device)
    inside_y = (rows >= top[:, None]) & (rows < (top + tall)[:, None])  # (B, H)
    inside_x = (columns >= left[:, None]) & (columns < (left + wide)[:, None])  # (B, W)
    return (inside_y[:, :, None] & inside_x[:, None, :])[:, None]


def _between(chance: Tensor, low: float, high: float) -> Tensor:
    return low + chance * (high - low)


def _beta(chance: Tensor, alpha: float) -> Tensor:
    """Return the quantile of Beta(alpha, alpha) at ``chance``; 1 where alpha is 0."""
    if not alpha:
        return torch.ones_like(chance)
    from scipy.stats import beta

    quantiles = beta.ppf(chance.cpu().numpy(), alpha, alpha)
    return torch.as_tensor(quantiles, dtype=torch.float32, device=chance.device)
