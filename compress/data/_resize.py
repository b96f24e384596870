"""How a picture of any size is fitted to the one size that a network takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from compress.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

Rule = Literal["short side", "squash", "letterbox"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ImageSize = int | tuple[int, int]  # side, or height and width, pixels
CROP = 224 / 256  # of the short side, as ImageNet networks are evaluated
DEFAULT_SIZE = 224
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
PADDING = 114  # grey that letterboxes are filled with, 0..255, as YOLO networks are trained


@dataclass(frozen=True)
class PicturePlacement:
    """Where one picture lies in the network's input.

    A point (x, y) of the picture is at ``(x * scale[1] + left, y * scale[0] + top)``.
    """

    resized: tuple[int, int]  # height and width after resizing, pixels
    top: int  # of the resized picture in the input; negative where it is cropped
    left: int
    scale: tuple[float, float]  # vertical, horizontal


@dataclass(frozen=True)
class Fit:
    """How pictures are fitted to ``size``.

    "short side" scales a picture until it covers the size divided by ``crop`` and cuts the centre
    out; "squash" stretches it to the size divided by ``crop`` and cuts the centre out; "letterbox"
    scales it until it fits inside and fills the rest with grey.

    Args:
        size: Height and width, pixels.
        rule: How proportions are treated.
        interpolation: Filter of the resizing; all of them are antialiased where they shrink.
        crop: Share of the resized picture that is kept; the rule's own if None: 0.875 for
            "short side", 1 for the others.
    """

    size: tuple[int, int]
    rule: Rule = "short side"
    interpolation: Interpolation = "bilinear"
    crop: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("resize", self.rule, get_args(Rule)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in known:
                raise UsageError(f"no {name} {value!r}", expected=f"one of: {', '.join(known)}")
        if not 0 < self.share <= 1:
            raise UsageError(f"crop {self.crop}", expected="a share above 0 and at most 1")
        if self.rule == "letterbox" and self.share != 1:
            raise UsageError(f"crop {self.crop} of a letterbox", expected="1: it crops nothing")

    @property
    def share(self) -> float:
        """Share of the resized picture that is kept."""
        if self.crop is not None:
            return self.crop
        return CROP if self.rule == "short side" else 1.0

    def place(self, height: int, width: int) -> PicturePlacement:
        """Return where a picture of ``height`` x ``width`` pixels lies in the input."""
        wanted = [round(side / self.share) for side in self.size]
        if self.rule == "squash":
            resized = (wanted[0], wanted[1])
        else:
            ratios = (wanted[0] / height, wanted[1] / width)
            covers = self.rule == "short side"
            scale = max(ratios) if covers else min(ratios)
            sides = [int(scale * side + 1e-6) for side in (height, width)]
            tight = ratios.index(scale)
            sides[tight] = wanted[tight]
            resized = (max(1, sides[0]), max(1, sides[1]))
        top, left = (
            round((want - have) / 2) for want, have in zip(self.size, resized, strict=True)
        )
        return PicturePlacement(resized, top, left, (resized[0] / height, resized[1] / width))

    def image(self, picture: Image.Image, fill: int | tuple[int, ...] | None = None) -> Image.Image:
        """Return ``picture`` resized, then cropped or padded to the size.

        Args:
            picture: Of any size and mode.
            fill: Value of the padding in the picture's mode; grey if None.
        """
        from PIL import Image as Pillow

        height, width = self.size
        place = self.place(picture.height, picture.width)
        small = picture.resize(
            (place.resized[1], place.resized[0]),
            Pillow.Resampling[self.interpolation.upper()],
        )
        if self.rule != "letterbox":
            box = (-place.left, -place.top, width - place.left, height - place.top)
            return small.crop(box)
        grey = PADDING if len(picture.getbands()) == 1 else (PADDING,) * len(picture.getbands())
        canvas = Pillow.new(picture.mode, (width, height), grey if fill is None else fill)
        canvas.paste(small, (place.left, place.top))
        return canvas

    def tensor(self, images: Tensor) -> Tensor:
        """Return (N, C, h, w) uint8 images of one size fitted to (N, C, H, W)."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        height, width = self.size
        place = self.place(*images.shape[2:])
        mode = InterpolationMode(self.interpolation)
        if place.resized != tuple(images.shape[2:]):
            parts = (
                functional.resize(part, list(place.resized), interpolation=mode, antialias=True)
                for part in torch.split(images, 1024)
            )
            images = torch.cat(list(parts))
        if self.rule == "letterbox":
            canvas = images.new_full((*images.shape[:2], height, width), PADDING)
            top, left = place.top, place.left
            canvas[..., top : top + place.resized[0], left : left + place.resized[1]] = images
            return canvas
        return images[..., -place.top : height - place.top, -place.left : width - place.left]

    def pixels(self, picture: Image.Image) -> Tensor:
        """Return ``picture`` fitted, (C, H, W) uint8."""
        array = np.array(self.image(picture), dtype=np.uint8)
        return torch.from_numpy(array.reshape(*self.size, -1)).permute(2, 0, 1).contiguous()


def sides(size: ImageSize) -> tuple[int, int]:
    """Return height and width of an ``image_size``."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures in files, fitted to one size while they are read.

    Options: ``image_size`` (side, or height and width; 224 if absent), ``channels`` (3, or 1 for
    grey), ``resize`` ("short side", "squash" or "letterbox"), ``interpolation``, ``crop`` (share
    of the resized picture that is kept) and ``workers`` (threads that decode).
    """

    image_size: ImageSize | None = None
    channels: int | None = None
    workers: int = 0
    resize: Rule | None = None
    interpolation: Interpolation | None = None
    crop: float | None = None

    usual_rule: ClassVar[Rule] = "short side"  # where nothing is asked for

    @property
    def fit(self) -> Fit:
        """How pictures are fitted to the network's input."""
        return Fit(
            sides(self.image_size or DEFAULT_SIZE),
            self.resize or self.usual_rule,
            self.interpolation or "bilinear",
            self.crop,
        )
