"""Picture files to pixels: any mode of PNG, JPEG, TIFF, ... read as it is meant, or refused."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from compress.errors import DataError, boundary

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 89_478_485  # of one picture, 256 MiB as RGB: where Pillow begins to warn
ANIMATED = {"GIF", "WEBP", "PNG", "TIFF"}  # of several frames; a photo's MPO has a main one
_ORIENTATION = 0x0112  # EXIF: 5 to 8 swap width and height
_DEEP_GREY = {"I;16", "I;16B", "I;16L", "I;16N"}


@contextlib.contextmanager
def opened_picture(
    source: Path | BinaryIO, *, where: str, what: str = "image"
) -> Iterator[Image.Image]:
    """Open a picture whose size is bounded; nothing is decoded yet.

    Args:
        source: A regular file, or its content.
        where: What errors begin with.
        what: What it is called there.

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
    """Return a picture upright, as RGB or grey of 8 bits.

    16 bits are scaled to 8, floats from 0..1; what is transparent is shown on white; CMYK is
    converted by the profile inside, if there is one.

    Args:
        image: What ``opened_picture`` returned.
        channels: 3, or 1 for grey.
        where: What errors begin with.

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
