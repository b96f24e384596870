"""Predictions drawn onto images: captions, boxes, colours over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3)
OPACITY = 0.5


def captioned(image: Image, text: str) -> Image:
    """Return ``image`` with ``text`` in its upper left corner."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    picture = Pillow.fromarray(image)
    draw = ImageDraw.Draw(picture)
    draw.rectangle(draw.textbbox((2, 1), text), fill=(0, 0, 0))
    draw.text((2, 1), text, fill=(255, 255, 255))
    return np.asarray(picture)


def boxed(image: Image, boxes: NDArray[Any], labels: NDArray[Any], texts: Sequence[str]) -> Image:
    """Return ``image`` with boxes (M, 4) as x1, y1, x2, y2, one colour for each class."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    picture = Pillow.fromarray(image)
    draw = ImageDraw.Draw(picture)
    colours = palette(int(labels.max(initial=0)) + 1)
    for (x1, y1, x2, y2), label, text in zip(boxes.tolist(), labels, texts, strict=True):
        colour = tuple(colours[int(label)].tolist())
        draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour)
        draw.text((x1 + 2, y1 + 1), text, fill=colour)
    return np.asarray(picture)


def overlaid(image: Image, class_map: NDArray[Any], ignore: int | None = None) -> Image:
    """Return ``image`` with a colour over each class of ``class_map`` (H, W) but ``ignore``."""
    colours = palette(int(class_map.max(initial=0)) + 1)[class_map]
    mixed: Image = ((1 - OPACITY) * image + OPACITY * colours).round().astype(np.uint8)
    return mixed if ignore is None else np.where((class_map == ignore)[..., None], image, mixed)


def outlined(image: Image, class_map: NDArray[Any], chosen: NDArray[np.bool_]) -> Image:
    """Return ``image`` in grey with the classes of ``chosen`` (H, W) pixels and a line around."""
    grey = np.broadcast_to(image.mean(2, keepdims=True), image.shape).astype(np.uint8)
    inside = chosen.copy()  # pixels whose four neighbours are chosen as well
    for axis in (0, 1):
        for step in (1, -1):
            inside &= np.roll(chosen, step, axis)
    found = np.where(chosen[..., None], overlaid(grey, class_map), grey)
    return np.where((chosen & ~inside)[..., None], np.uint8(255), found)


def palette(count: int) -> Image:
    """Return ``count`` colours that are far apart, (count, 3)."""
    import colorsys

    hues = [(0.6180339887 * k) % 1.0 for k in range(count)]
    colours = [colorsys.hsv_to_rgb(hue, 0.8, 0.95 if k % 2 else 0.7) for k, hue in enumerate(hues)]
    return (255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)
