"""One item of a user's data set: its picture and its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.errors import DataError

PICTURE_KEYS = ("image", "img", "picture", "pixel_values", "jpg", "png")
TARGET_KEYS = ("label", "labels", "target", "fine_label", "mask", "cls", "class")


class Items(Protocol):
    """What a torch Dataset offers, whatever it is made of."""

    def __len__(self) -> int:
        """Return how many items there are."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Return the item of that number."""
        ...


def picture_and_target(items: Items, index: int, where: str) -> tuple[Any, Any]:
    """Return picture and target of one item: a pair, or a dictionary with usual names.

    Raises:
        DataError: the user's code raises, or the item is something else.
    """
    try:
        item = items[index]
    except (Exception, SystemExit) as error:  # of the user's code
        raise DataError(f"raises {error!r}", where=f"{where}, item {index}") from error
    if isinstance(item, Mapping):
        picture = next((item[key] for key in PICTURE_KEYS if key in item), None)
        target = next((item[key] for key in TARGET_KEYS if key in item), None)
        if picture is not None and target is not None:
            return picture, target
        told = f"a dictionary with the keys {', '.join(map(str, item))}"
    elif isinstance(item, Sequence) and len(item) >= 2:
        return item[0], item[1]
    else:
        told = f"a {type(item).__name__}"
    raise DataError(
        f"is {told}", where=f"{where}, item {index}", expected="a picture and its target"
    )


def picture(items: Items, index: int, where: str) -> Any:
    """Return the picture of an item: PIL's, or a tensor (C, H, W).

    Raises:
        DataError: it is no picture; the message names the item.
    """
    found, _ = picture_and_target(items, index, where)
    if hasattr(found, "convert"):
        return found
    array = found if isinstance(found, Tensor) else np.asarray(found)
    if isinstance(array, np.ndarray) and array.dtype.kind in "buif":
        array = torch.from_numpy(np.ascontiguousarray(array))
    if not isinstance(array, Tensor) or array.is_complex():
        told = f"a picture that is {type(found).__name__}, not of real numbers"
    elif array.ndim == 2 and array.numel():
        return array[None]
    elif array.ndim == 3 and array.numel() and array.shape[0] in {1, 3}:
        return array
    elif array.ndim == 3 and array.numel() and array.shape[2] in {1, 3}:
        return array.permute(2, 0, 1)
    else:
        told = f"a picture of shape {tuple(array.shape)}"
    raise DataError(
        f"has {told}",
        where=f"{where}, item {index}",
        expected="PIL's, or (H, W), (H, W, C) or (C, H, W) with 1 or 3 channels",
    )


def shape_of(picture: Any) -> tuple[int, int, int]:
    """Return channels, height and width of what ``picture`` returned."""
    if isinstance(picture, Tensor):
        channels, height, width = picture.shape
        return channels, height, width
    return (1 if picture.mode in {"L", "1"} else 3), picture.height, picture.width


def eight_bit(pixels: Tensor, where: str) -> Tensor:
    """Return pixels 0..255 of uint8, or of floats in [0, 1], as uint8.

    Raises:
        DataError: they are something else: normalized, not finite, of more bits.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())  # NaN if any is
    if pixels.is_floating_point() and 0 <= low <= high <= 1:
        return pixels.mul(255).round().to(torch.uint8)
    if not np.isfinite([low, high]).all():
        raise DataError(
            "has pixels that are not finite numbers",
            where=where,
            expected="uint8, or floats in [0, 1]",
        )
    raise DataError(
        f"has pixels of {str(pixels.dtype).removeprefix('torch.')} from {low:g} to {high:g}",
        where=where,
        expected="uint8, or floats in [0, 1]: pictures before normalization",
        fix="Leave Normalize out of the data's transforms, and give data.mean and data.std",
    )
