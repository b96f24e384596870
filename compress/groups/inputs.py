"""Example inputs of a network: as arguments of a call, copied, doubled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compress.modules.inputs import example_of

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]  # or a shape


def call_inputs(example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a call with ``example_input``.

    Raises:
        UsageError: it holds no tensor.
    """
    example_input = example_of(example_input)
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    return tuple(example_input), {}


def copied(value: Any) -> Any:
    """Return a copy of a tensor, anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def to_meta(value: Any) -> Any:
    """Return a tensor on the meta device, anything else as it is."""
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def batch_size(inputs: Any) -> int:
    """Return how many images the first input holds."""
    for leaf in tree_leaves(inputs, is_leaf=is_images):
        if is_images(leaf) or (isinstance(leaf, Tensor) and leaf.ndim):
            return len(leaf)
    return 1


def twice(value: Any) -> Any:
    """Return one image, or a list of them, twice; anything else as it is."""
    if is_images(value):
        return [*value, *value]
    is_one = isinstance(value, Tensor) and value.ndim and len(value) == 1
    return torch.cat([value, value]) if is_one else value


def is_images(value: Any) -> bool:
    """Say whether ``value`` is a list of images (C, H, W) of any sizes, as detectors take them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, Tensor) and each.ndim == 3 for each in value)
    )
