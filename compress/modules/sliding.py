"""How a convolution slides over its input, as its forward pass reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Sides = tuple[int, ...]


@dataclass(frozen=True)
class Sliding:
    """Sizes by dimension of the input, in its order."""

    kernel: Sides
    stride: Sides
    dilation: Sides
    before: Sides  # padding, of a transposed convolution what its output loses
    after: Sides


def sliding(layer: Any) -> Sliding:
    """Return how a convolution slides, whatever was set on it since it was built.

    Backbones are dilated after the fact by new strides, dilations and paddings, as tuples or single
    numbers. Torch keeps a copy of the padding as it was built: only modes other than zeros read it.
    """
    kernel = tuple(layer.weight.shape[2:])
    stride, dilation = (by_dimension(each, len(kernel)) for each in (layer.stride, layer.dilation))
    if layer.padding_mode != "zeros":
        around = layer._reversed_padding_repeated_twice  # last dimension first, before and after
        before, after = tuple(around[0::2][::-1]), tuple(around[1::2][::-1])
    elif layer.padding == "same":
        missing = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
        before = tuple(each // 2 for each in missing)
        after = tuple(each - each // 2 for each in missing)
    else:
        given = 0 if layer.padding == "valid" else layer.padding
        before = after = by_dimension(given, len(kernel))
    return Sliding(kernel, stride, dilation, before, after)


def by_dimension(given: int | Sequence[int], dimensions: int) -> Sides:
    """Return one number for each dimension where one may stand for all."""
    sides = (given,) if isinstance(given, int) else tuple(given)
    return sides * dimensions if len(sides) == 1 else sides
