"""Images as small PNG data URIs, the only form in which the report holds pictures."""

from __future__ import annotations

import io
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def thumbnail(image: NDArray[np.uint8], side: int = 64, colours: int | None = None) -> str:
    """Return ``image``, uint8 (H, W), (H, W, 1) or (H, W, 3) RGB, as PNG data URI.

    Its longer side is ``side`` pixels, less where it is smaller. So many ``colours`` are left of an
    image in colour, for a smaller file; all if None.
    """
    picture = from_pixels(image)
    picture.thumbnail((side, side))
    if colours is not None and picture.mode == "RGB":
        picture = picture.quantize(colours, Image.Quantize.FASTOCTREE)  # small things keep theirs
    return png(picture)


def from_pixels(image: NDArray[np.uint8]) -> Image.Image:
    """Return (H, W), (H, W, 1) or (H, W, 3) uint8 as a picture."""
    flat = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    return Image.fromarray(np.ascontiguousarray(flat))


def png(picture: Image.Image) -> str:
    """Return a picture as PNG data URI."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode("ascii")
