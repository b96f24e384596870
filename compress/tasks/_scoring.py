"""Read the outputs of a network as a task does, and score each image's prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import EngineError, UsageError, boundary
from compress.tasks._metrics import Array

if TYPE_CHECKING:
    from compress.tasks import Contribution, Prediction, Task


def scored(task: Task, outputs: Mapping[str, Any], targets: Any) -> list[Contribution]:
    """Return what a few images contribute, from a task that is tried before anything depends on it.

    Raises:
        UsageError: predict, score or summarize raises, or gives something else for the same
            outputs, or no numbers, or every score is NaN.
    """
    name = type(task).__name__
    with boundary(UsageError, "predict or score fails", where=name, fix="Mend the task"):
        tries = [
            contributions(task, predicted(task, outputs, len(targets)), targets) for _ in range(2)
        ]
    check_repeated(task, *tries)
    first: Contribution = tries[0][0] if tries[0] else {}
    for key, value in first.items():
        if np.ndim(value) == 0 and numeric(value).dtype.kind not in "buif":
            raise UsageError(
                f"score gives {key} as {value!r}", where=name, expected="a number for each image"
            )
        if np.ndim(value) == 0 and all(np.isnan(numeric(each[key])) for each in tries[0]):
            raise UsageError(
                f"score gives {key} as NaN for each of {len(tries[0])} images",
                where=name,
                expected="a number; NaN only for images that do not count",
            )
    _try_summary(task, tries[0])
    return tries[0]


def predicted(task: Task, outputs: Mapping[str, Any], images: int) -> list[Prediction]:
    """Return the prediction for each of so many images.

    Raises:
        EngineError: there is another number of them, or the outputs are not what the task reads.
    """
    found = task.predict(outputs)
    if len(found) != images:
        raise EngineError(
            f"{len(found)} predictions for {images} images",
            where=type(task).__name__,
            expected="outputs with the images along the first dimension",
        )
    return found


def check_repeated(
    task: Task, scores: Sequence[Contribution], again: Sequence[Contribution]
) -> None:
    """Raise UsageError where the same images contribute something else the second time."""
    for number, (one, two) in enumerate(zip(scores, again, strict=True)):
        for key, value in one.items():
            is_float = np.issubdtype(numeric(value).dtype, np.floating)
            if not np.array_equal(numeric(value), numeric(two[key]), equal_nan=is_float):
                raise UsageError(
                    f"score of image {number} gives {key} as {value} and then as {two[key]}",
                    where=type(task).__name__,
                    expected="the same value for the same outputs and target",
                    fix="Take random numbers out of predict and score",
                )


def contributions(
    task: Task, predictions: Sequence[Prediction], targets: Any
) -> list[Contribution]:
    """Return what each image contributes to the metrics.

    Raises:
        UsageError: the task's score raises, or returns no dictionary.
    """
    name = type(task).__name__
    found: list[Contribution] = []
    for i, each in enumerate(predictions):
        with boundary(UsageError, f"score fails for image {i} of a batch", where=name):
            found.append(task.score(each, targets[i]))
        if not isinstance(found[-1], Mapping):
            raise UsageError(
                f"score gives {found[-1]!r}"[:200],
                where=name,
                expected=f"a dictionary: {{{', '.join(f'{key!r}: ...' for key in task.kinds)}}}",
            )
    return found


def _try_summary(task: Task, scores: Sequence[Contribution]) -> None:
    """Raise UsageError unless ``summarize`` gives each metric of two samples, twice the same."""
    name, counts = type(task).__name__, np.ones((2, len(scores)), dtype=np.int64)
    expected = f"an array of shape (2,) for 2 samples, for each of {', '.join(task.kinds)}"
    with boundary(UsageError, "summarize fails", where=name, fix=f"Return {expected}"):
        one, two = (task.summarize(scores, counts) for _ in range(2))
        first, second = (
            {key: numeric(each[key]).astype(np.float64) for key in task.kinds}
            for each in (one, two)
        )
    for key, values in first.items():
        if values.shape != (2,):
            raise UsageError(
                f"summarize gives {key} of shape {values.shape}", where=name, expected=expected
            )
        if not np.array_equal(values, second[key], equal_nan=True):
            raise UsageError(
                f"summarize gives {key} as {values[0]:g} and then as {second[key][0]:g}",
                where=name,
                expected="the same value for the same scores",
            )


def numeric(value: Any) -> Array:
    """Return a tensor or array as a NumPy array on the CPU."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    return np.asarray(value)


def main_output(
    outputs: Mapping[str, Any], ndim: int, what: str, task: str, channels: int = 0
) -> Array:
    """Return the output called ``what``, else the first with ``ndim`` dimensions, for ``task``.

    If ``channels`` is not 0, outputs of other channels are feature maps, unless the first is one.

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
