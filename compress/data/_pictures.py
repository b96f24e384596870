"""Picture files to pixels of one size: any mode of PNG, JPEG, TIFF, ... read rightly or refused."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from compress.errors import DataError, UsageError, boundary

if TYPE_CHECKING:
    from PIL import Image

Rule = Literal["short side", "squash", "letterbox"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ImageSize = int | tuple[int, int]  # side, or height and width, pixels
CROP = 224 / 256  # of the short side, as ImageNet networks are evaluated
DEFAULT_SIZE = 224
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
PADDING = 114  # grey that letterboxes are filled with, 0..255, as YOLO networks are trained
MOST_PIXELS = 89_478_485  # of one picture, 256 MiB as RGB: where Pillow begins to warn
ANIMATED = {"GIF", "WEBP", "PNG", "TIFF"}  # of several frames; a photo's MPO has a main one
_ORIENTATION = 0x0112  # EXIF: 5 to 8 swap width and height
_DEEP_GREY = {"I;16", "I;16B", "I;16L", "I;16N"}


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
            if image.format in ANIMATED and getattr(image, "n_frames", 1) > 1:
                raise DataError(
                    f"holds {getattr(image, 'n_frames', 1)} frames or pages",
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

    16 bits are scaled to 8, floats from 0..1; what is transparent is shown on white; CMYK is
    converted by the profile inside, if there is one.

    Raises:
        DataError: its numbers have no known white: 32-bit integers, floats beyond 0..1.
    """
    from PIL import ImageOps

    wanted = "L" if channels == 1 else "RGB"
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode in _DEEP_GREY or upright.mode in {"I", "F"}:
        upright = _scaled(upright, image.format or "", where)
    elif upright.mode == "CMYK":
        upright = _from_cmyk(upright)
    elif "transparency" in upright.info or upright.mode in {"RGBA", "LA", "PA", "RGBa", "La"}:
        upright = _on_white(upright)
    return upright.convert(wanted)


def _scaled(image: Image.Image, kind: str, where: str) -> Image.Image:
    """Return deep grey scaled to 8 bits."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        white = 1.0
        told = "floating-point values"
    else:  # older Pillow opens 16-bit PNG and PGM as 32 bits
        is_16_bit = image.mode in _DEEP_GREY or kind in {"PNG", "PPM"}
        white = 65535.0 if is_16_bit else 0.0
        told = "32-bit integers"
    if not white or not np.isfinite(values).all() or values.min() < 0 or values.max() > white:
        raise DataError(
            f"holds {told} from {values.min():g} to {values.max():g}: which is white is not known",
            where=where,
            expected="8 or 16 bits for each channel, or floating-point values from 0 to 1",
            fix="Convert it, so that black is 0 and white the largest value",
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer)


def _from_cmyk(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    inks, screen = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    converted: Image.Image | None = ImageCms.profileToProfile(image, inks, screen, outputMode="RGB")
    return converted if converted is not None else image.convert("RGB")


if TYPE_CHECKING:
    from PIL import Image


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
        """Return ``picture`` resized, then cropped or padded to the size, with ``fill`` or grey."""
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
