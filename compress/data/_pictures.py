"""Picture files to pixels of one size: any mode of PNG, JPEG, TIFF, ... read rightly or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from compress.data._plain_pictures import (
    PADDING,
    PicturePlacement,
    UnknownWhiteError,
    as_8_bit,
    fitted,
    frames_of,
    placed,
)
from compress.errors import DataError, UsageError, boundary

if TYPE_CHECKING:
    from PIL import Image

Rule = Literal["short side", "squash", "letterbox"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ImageSize = int | tuple[int, int]  # side, or height and width, pixels
CROP = 224 / 256  # of the short side, as ImageNet networks are evaluated
DEFAULT_SIZE = 224
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
MOST_PIXELS = 89_478_485  # of one picture, 256 MiB as RGB: where Pillow begins to warn
_ORIENTATION = 0x0112  # EXIF: 5 to 8 swap width and height


@contextlib.contextmanager
def opened_picture(
    source: Path | BinaryIO, *, where: str, what: str = "image"
) -> Iterator[Image.Image]:
    """Open a picture, a regular file or its content, of bounded size; nothing is decoded yet.

    Errors begin with ``where`` and call it ``what``.

    Raises:
        DataError: it is no readable picture, also when what is done with it inside shows that; it
            has several frames, or more than ``MOST_PIXELS`` pixels.
    """
    from PIL import Image

    fix = "Replace or remove it"
    with boundary(DataError, f"is not a readable {what}", where=where, fix=fix):
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise DataError("is no file", where=where, expected=f"a readable {what}")
        with Image.open(source) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"has {width} x {height} pixels",
                    where=where,
                    expected=f"at most {MOST_PIXELS:,} pixels",
                    fix="Scale it down or cut it into parts",
                )
            if (frames := frames_of(image)) > 1:
                raise DataError(
                    f"holds {frames} frames or pages",
                    where=where,
                    expected="one picture",
                    fix="Save the one that is meant as a file of its own",
                )
            yield image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of a picture as it is to be looked at, from its header."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow turns these itself: when depends on its version
        width, height = (int(image.tag_v2[tag]) for tag in (256, 257))  # type: ignore[attr-defined]
    is_turned = image.getexif().get(_ORIENTATION, 1) in range(5, 9)
    return (height, width) if is_turned else (width, height)


def to_8_bit(image: Image.Image, channels: int, *, where: str) -> Image.Image:
    """Return what ``opened_picture`` gave upright, as RGB of 8 bits, as grey with one channel.

    Raises:
        DataError: its numbers have no known white: 32-bit integers, floats beyond 0..1.
    """
    try:
        return as_8_bit(image, channels)
    except UnknownWhiteError as error:
        raise DataError(
            str(error),
            where=where,
            expected="8 or 16 bits for each channel, or floating-point values from 0 to 1",
            fix="Convert it, so that black is 0 and white the largest value",
        ) from None


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
        return placed(self.size, self.rule, self.share, height, width)

    def image(self, picture: Image.Image, fill: int | tuple[int, ...] | None = None) -> Image.Image:
        """Return ``picture`` resized, then cropped or padded to the size, with ``fill`` or grey."""
        place = self.place(picture.height, picture.width)
        return fitted(picture, self.size, self.rule, place, self.interpolation, fill)

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

    Args:
        image_size: Side of the network's input, or height and width, pixels; 224 if absent.
        channels: 3, or 1 for grey.
        workers: Threads that decode.
        resize: Cover the size and crop, stretch, or fit inside it; the kind's own if absent.
        interpolation: Filter of the resizing; bilinear if absent.
        crop: Share of the resized picture that is kept; 0.875 with short side, else 1.
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
