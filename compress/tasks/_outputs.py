"""What a network gave, read as the arrays that tasks need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import EngineError
from compress.tasks._metrics import Array


def numeric(value: Any) -> Array:
    """Return a tensor or array as a NumPy array on the CPU."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    return np.asarray(value)


def main_output(
    outputs: Mapping[str, Any], ndim: int, what: str, task: str, channels: int = 0
) -> Array:
    """Return the output called ``what``, else the first with ``ndim`` dimensions.

    Args:
        outputs: What the network gave, by name.
        ndim: Dimensions of the output.
        what: Its name, where it has one.
        task: Who asks.
        channels: If not 0, outputs of other channels are feature maps, unless the first is one.

    Raises:
        EngineError: there is none, or it holds numbers that are not finite.
    """
    arrays = {name: numeric(value) for name, value in outputs.items()}
    fitting = [name for name, array in arrays.items() if array.ndim == ndim]
    if channels:
        equal = [n for n in fitting if channels in (arrays[n].shape[1], arrays[n].shape[-1])]
        fitting = equal or [n for n in fitting if n in (what, next(iter(arrays)))]
    if not fitting:
        raise EngineError(
            f"task {task} does not fit the network's outputs: {shapes_told(arrays)}",
            expected=f"{what} with {ndim} dimensions",
            fix=f"{nearest_task(arrays.values())}, or check the network",
        )
    found = arrays[what if what in fitting else fitting[0]]
    if not found.size:
        raise EngineError(
            f"output {shapes_told({what: found})} is empty",
            fix="Build the network with at least one class (num_classes)",
        )
    finite = np.isfinite(found).reshape(len(found), -1).all(1)
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        raise EngineError(
            f"outputs that are not finite numbers for {int((~finite).sum())} of {len(found)} "
            f"images, the first of them image {first}",
            fix="An fp16 network may have overflowed: keep its widest layers in fp32",
        )
    return found


def channels_first(array: Array, channels: int) -> Array:
    """Return (B, H, W, C) as (B, C, H, W), and what has its ``channels`` there already as it is."""
    is_last = array.shape[1] != channels and array.shape[3] == channels
    return np.moveaxis(array, 3, 1) if is_last else array


def shapes_told(arrays: Mapping[str, Array]) -> str:
    """Return names and shapes of outputs, the first three of many."""
    first = [f"{name} {array.shape}" for name, array in islice(arrays.items(), 3)]
    more = [f"{len(arrays) - 3} more"] if len(arrays) > 3 else []
    return ", ".join(first + more) or "none"


def nearest_task(arrays: Iterable[Array]) -> str:
    """Return advice to set the task that the first outputs look like."""
    by_ndim = {2: "classification", 3: "detection", 4: "segmentation"}
    likely = [
        "restoration" if array.ndim == 4 and array.shape[1] in {1, 3} else by_ndim[array.ndim]
        for array in arrays
        if array.ndim in by_ndim
    ]
    return f"Set task: {likely[0]}" if likely else "Set another task"
