"""Pictures of 8 bits and of one size, by numpy and Pillow alone: bundles take this file along.

It runs from Python 3.8 on, and imports nothing of this package.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

PADDING = 114  # grey that letterboxes are filled with, 0..255, as YOLO networks are trained
_ANIMATED = {"GIF", "WEBP", "PNG", "TIFF"}  # of several frames; a photo's MPO has a main one
_DEEP_GREY = {"I;16", "I;16B", "I;16L", "I;16N"}


class UnknownWhiteError(ValueError):
    """A picture does not say which of its numbers is white."""


def frames_of(image: Image.Image) -> int:
    """Return how many frames or pages a picture has."""
    return getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1


def as_8_bit(image: Image.Image, channels: int) -> Image.Image:
    """Return an open picture upright, as RGB of 8 bits, as grey with one channel.

    16 bits are scaled to 8, floats from 0..1; what is transparent is shown on white; CMYK is
    converted by the profile inside, if there is one.

    Raises:
        UnknownWhiteError: 32-bit integers, floats beyond 0..1.
    """
    from PIL import ImageOps

    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode in _DEEP_GREY or upright.mode in {"I", "F"}:
        upright = _scaled(upright, image.format or "")
    elif upright.mode == "CMYK":
        upright = _from_cmyk(upright)
    elif "transparency" in upright.info or upright.mode in {"RGBA", "LA", "PA", "RGBa", "La"}:
        upright = _on_white(upright)
    return upright.convert("L" if channels == 1 else "RGB")


def _scaled(image: Image.Image, kind: str) -> Image.Image:
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
        raise UnknownWhiteError(
            f"holds {told} from {values.min():g} to {values.max():g}: which is white is not known"
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


@dataclass(frozen=True)
class PicturePlacement:
    """Where one picture lies in the network's input.

    A point (x, y) of the picture is at ``(x * scale[1] + left, y * scale[0] + top)``.
    """

    resized: tuple[int, int]  # height and width after resizing, pixels
    top: int  # of the resized picture in the input; negative where it is cropped
    left: int
    scale: tuple[float, float]  # vertical, horizontal


def placed(
    size: tuple[int, int], rule: str, share: float, height: int, width: int
) -> PicturePlacement:
    """Return where a picture of ``height`` x ``width`` pixels lies in an input of ``size``.

    "squash" stretches it, "short side" covers and "letterbox" fits into ``size / share``.
    """
    wanted = [round(side / share) for side in size]
    if rule == "squash":
        resized = (wanted[0], wanted[1])
    else:
        ratios = (wanted[0] / height, wanted[1] / width)
        scale = max(ratios) if rule == "short side" else min(ratios)
        sides = [int(scale * side + 1e-6) for side in (height, width)]
        tight = ratios.index(scale)
        sides[tight] = wanted[tight]
        resized = (max(1, sides[0]), max(1, sides[1]))
    top, left = (round((want - have) / 2) for want, have in zip(size, resized))  # noqa: B905 - 3.8
    return PicturePlacement(resized, top, left, (resized[0] / height, resized[1] / width))


def fitted(
    picture: Image.Image,
    size: tuple[int, int],
    rule: str,
    place: PicturePlacement,
    interpolation: str,
    fill: int | tuple[int, ...] | None = None,
) -> Image.Image:
    """Return ``picture`` resized, then cropped or padded to ``size``, with ``fill`` or grey."""
    from PIL import Image

    height, width = size
    filters = getattr(Image, "Resampling", Image)  # older Pillow has them itself
    small = picture.resize(place.resized[::-1], getattr(filters, interpolation.upper()))
    if rule != "letterbox":
        box = (-place.left, -place.top, width - place.left, height - place.top)
        return small.crop(box)
    grey = PADDING if len(picture.getbands()) == 1 else (PADDING,) * len(picture.getbands())
    canvas = Image.new(picture.mode, (width, height), grey if fill is None else fill)
    canvas.paste(small, (place.left, place.top))
    return canvas
