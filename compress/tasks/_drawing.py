"""Predictions drawn onto images: captions, boxes, colours over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import printable

if TYPE_CHECKING:
    from PIL import ImageFont

Image = NDArray[np.uint8]  # (H, W, 3)
OPACITY = 0.5
LETTERS = 28  # lines of text in the shorter side of an image, where that leaves them legible
SMALLEST_FONT = 10  # pixels
DARK = 128  # brightness of a colour below which text on it is white
BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue, as eyes weigh them


def captioned(
    image: Image, lines: Sequence[str], colours: NDArray[np.uint8] | None = None
) -> Image:
    """Return ``image`` with ``lines`` in its upper left corner, on black or a colour each."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    picture = Pillow.fromarray(image)
    draw, font = ImageDraw.Draw(picture), _font(image)
    grounds = np.zeros((len(lines), 3), np.uint8) if colours is None else colours
    top = 0
    for text, ground in zip(lines, grounds.tolist(), strict=True):
        _label(draw, (0, top), text, font, ground)
        top += _height(font)
    return np.asarray(picture)


def boxed(
    image: Image,
    boxes: NDArray[Any],
    labels: NDArray[Any],
    names: Sequence[str],
    scores: NDArray[Any] | None = None,
) -> Image:
    """Return ``image`` with boxes (M, 4) as x1, y1, x2, y2, one colour for each label.

    A box wide enough for it has its name and score at its edge, others the score alone, and one
    where that would cover another's nothing: the first come first. Names that no box shows stand in
    the upper left corner. Without ``scores`` names stand alone.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    picture = Pillow.fromarray(image)
    draw, font = ImageDraw.Draw(picture), _font(image)
    width = max(1, _height(font) // 8)
    colours = palette(int(labels.max(initial=0)) + 1)
    places = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes.tolist()]
    for place, label in zip(places, labels, strict=True):
        draw.rectangle(place, outline=tuple(colours[int(label)].tolist()), width=width)
    hidden = dict(zip(names, labels, strict=True))
    shown = [""] * len(labels) if scores is None else [f"{score:.2f}" for score in scores]
    taken: list[tuple[float, ...]] = []
    for place, label, name, score in zip(places, labels, names, shown, strict=True):
        text = printable(f"{name} {score}".rstrip())
        is_whole = draw.textlength(text, font=font) + 4 <= place[2] - place[0]
        text = text if is_whole else score
        top = max(0.0, place[1] - _height(font))
        area = (place[0], top, place[0] + draw.textlength(text, font=font) + 4, top + _height(font))
        if not text or any(_overlap(area, other) for other in taken):
            continue
        taken.append(area)
        if is_whole:
            hidden.pop(name, None)
        _label(draw, area[:2], text, font, colours[int(label)].tolist())
    lines, grounds = list(hidden), colours[np.array([*hidden.values()], np.int64)]
    return captioned(np.asarray(picture), lines, grounds)


def overlaid(image: Image, class_map: NDArray[Any]) -> Image:
    """Return ``image`` with a colour over each class of ``class_map`` (H, W); none below 0."""
    colours = palette(int(class_map.max(initial=0)) + 1)[np.maximum(class_map, 0)]
    mixed = ((1 - OPACITY) * image + OPACITY * colours).round().astype(np.uint8)
    shown: Image = np.where((class_map >= 0)[..., None], mixed, image)
    return shown


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


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two areas x1, y1, x2, y2 share more than an edge."""
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def _font(image: Image) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=max(SMALLEST_FONT, min(image.shape[:2]) // LETTERS))


def _height(font: ImageFont.FreeTypeFont) -> int:
    return int(font.size * 1.3)


def _label(
    draw: Any, corner: tuple[float, float], text: str, font: Any, ground: Sequence[int]
) -> None:
    x, y = corner
    text = printable(text).replace("\n", " ")
    length = draw.textlength(text, font=font)
    draw.rectangle((x, y, x + length + 4, y + _height(font)), fill=tuple(ground))
    brightness = sum(part * weight for part, weight in zip(ground, BRIGHTNESS, strict=True))
    ink = (255, 255, 255) if brightness < DARK else (0, 0, 0)
    draw.text((x + 2, y + _height(font) // 8), text, font=font, fill=ink)
