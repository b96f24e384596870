"""Read outputs as a task does; metrics with bootstrap intervals over images, alone and in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import statistics
from compress.errors import DataError, EngineError, UsageError, boundary
from compress.report.schema import SAME, ChangeRecord, MetricRecord
from compress.statistics import Interval

if TYPE_CHECKING:
    from compress.tasks import Contribution, Prediction, Task

if TYPE_CHECKING:
    from compress.tasks import Contribution, Prediction, Task

Array = NDArray[Any]

RESAMPLES = 1000  # bootstrap draws
EQUAL = 1e-9  # draws that differ by less, relative to the value, are equal
Z_SQUARED = 1.96**2  # of a 95 % interval
RECALLS = np.linspace(0.0, 1.0, 101)  # at which COCO reads the precision
DRAWN_AT_ONCE = 2_000_000  # numbers of a matrix of bootstrap draws held in memory


@dataclass(frozen=True)
class Kind:
    """Unit of a metric, which way is better, and what people call it (its name if empty)."""

    unit: str = "pct"
    higher_is_better: bool = True
    title: str = ""


@dataclass(frozen=True)
class Primary:
    """The metric that budgets and sensitivity use; top-1 of one class an image unless told."""

    name: str = "top1_pct"
    kind: Kind = Kind()

    @property
    def called(self) -> str:
        """What people call it."""
        return "top-1" if self.name == "top1_pct" else self.kind.title or self.name

    @property
    def unit(self) -> str:
        """Its unit as it is written behind a value."""
        return "%" if self.kind.unit == "pct" else self.kind.unit

    @property
    def title(self) -> str:
        """Its name with its unit, for axes and columns."""
        return f"{self.called}, {self.unit}" if self.unit else self.called

    @property
    def points(self) -> str:
        """The unit of a difference of two values."""
        return "points" if self.kind.unit == "pct" else self.kind.unit

    def drop(self, before: float, after: float) -> float:
        """Return how much worse ``after`` is than ``before``; negative where it is better."""
        return before - after if self.kind.higher_is_better else after - before


TOP1 = Primary()


def metrics(task: Task, scores: Sequence[Contribution]) -> dict[str, MetricRecord]:
    """Return every metric with its bootstrap interval over images, of what each contributes.

    Raises:
        DataError: there are no images, or a metric is not a finite number.
    """
    values = values_of(task, scores)
    drawn = _bootstrap(task, scores)
    return {
        name: _metric(
            values[name], _interval(drawn[name], values[name], kind, len(scores), drawn[name]), kind
        )
        for name, kind in task.kinds.items()
    }


def class_metrics(task: Task, scores: Sequence[Contribution]) -> dict[str, MetricRecord | None]:
    """Return the task's metric of each class with its interval; None for one that never occurs."""
    found = task.class_values(scores, np.ones((1, len(scores)), dtype=np.int64))
    if found is None:
        return {}
    parts = (task.class_values(scores, counts) for counts in _draws(len(scores)))
    drawn = np.concatenate([part for part in parts if part is not None])
    kind, metrics = Kind(), dict[str, MetricRecord | None]()
    for k, value in enumerate(found[0].tolist()):
        name = task.classes[k] if k < len(task.classes) else str(k)
        ends = _interval(drawn[:, k], value, kind, len(scores), drawn[:, k])
        metrics[name] = None if np.isnan(value) else _metric(value, ends, kind)
    return metrics


def compare_metrics(
    task: Task, reference: Sequence[Contribution], candidate: Sequence[Contribution]
) -> dict[str, ChangeRecord]:
    """Return candidate less reference of every metric, paired: both are drawn the same images.

    Raises:
        DataError: the number of images differs or is zero.
    """
    if len(reference) != len(candidate):
        raise DataError(
            f"the reference answered {len(reference)} images, the candidate {len(candidate)}",
            expected="predictions for the same images",
        )
    before, after = values_of(task, reference), values_of(task, candidate)
    drawn = (_bootstrap(task, reference), _bootstrap(task, candidate))
    return {
        name: change_of(
            after[name] - before[name],
            _interval(
                drawn[1][name] - drawn[0][name],
                after[name] - before[name],
                kind,
                len(reference),
                drawn[0][name],
            ),
            kind,
            len(reference),
        )
        for name, kind in task.kinds.items()
    }


def agreement(
    task: Task, reference: Sequence[Prediction], candidate: Sequence[Prediction]
) -> MetricRecord:
    """Return the mean agreement of two networks' predictions for the same images.

    Raises:
        DataError: the number of images differs or is zero.
    """
    if len(reference) != len(candidate) or not reference:
        raise DataError(
            f"{len(reference)} and {len(candidate)} predictions are no pairs",
            expected="predictions for the same images, at least one",
        )
    each = np.array([task.agreement(a, b) for a, b in zip(reference, candidate, strict=True)])
    drawn = np.concatenate([counts @ each for counts in _draws(len(each))]) / len(each)
    kind = Kind(task.agreement_unit)
    ends = _interval(drawn, float(each.mean()), kind, len(each), drawn)
    return _metric(float(each.mean()), ends, kind)


def mean_of(values: Sequence[float], counts: Array) -> Array:
    """Return the mean of per-image values in each sample, (R,); NaN values do not count."""
    array = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(array)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Array = (counts[:, there] @ array[there]) / counts[:, there].sum(1)
    return mean


def values_of(task: Task, scores: Sequence[Contribution]) -> dict[str, float]:
    """Return every metric without an interval.

    Raises:
        DataError: there are no images, or a metric is not a finite number.
    """
    if not scores:
        raise DataError("there are no images to evaluate on", expected="at least one image")
    found = task.summarize(scores, np.ones((1, len(scores)), dtype=np.int64))
    values = {name: float(found[name][0]) for name in task.kinds}
    broken = {name: value for name, value in values.items() if not np.isfinite(value)}
    if broken:
        name, value = next(iter(broken.items()))
        raise DataError(
            f"metric {name} is {value} over {len(scores)} images",
            where=type(task).__name__,
            expected="a finite number",
            fix="Check that the images have labels of this task",
        )
    return values


def _bootstrap(task: Task, scores: Sequence[Contribution]) -> dict[str, Array]:
    parts = [task.summarize(scores, counts) for counts in _draws(len(scores))]
    return {name: np.concatenate([part[name] for part in parts]) for name in task.kinds}


def _draws(images: int) -> Any:
    """Yield matrices of how often each image is drawn, (r, N), RESAMPLES rows in all."""
    random, even = np.random.default_rng(0), np.full(images, 1 / images)
    step = max(1, min(RESAMPLES, DRAWN_AT_ONCE // images))
    for start in range(0, RESAMPLES, step):
        yield random.multinomial(images, even, size=min(step, RESAMPLES - start))


def _interval(
    drawn: Array, value: float, kind: Kind, images: int, spread: Array
) -> Interval | None:
    """Return the 95 % interval of bootstrap draws around a value; it always has a width.

    Where no image differs from another the draws are all equal, and that is no certainty: then the
    interval reaches as far as Wilson's of N images that all agree, z^2 / (N + z^2) of the scale,
    which is 100 for percents and else what single images spread.
    """
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return None
    low, high = (float(end) for end in np.quantile(finite, [0.025, 0.975]))
    if high - low > EQUAL * max(1.0, abs(value)):
        return low, high
    known = spread[np.isfinite(spread)]
    scale = 100.0
    if kind.unit != "pct":
        scale = float(known.std()) * images**0.5 or abs(float(known.mean())) or 1.0
    reach = scale * Z_SQUARED / (images + Z_SQUARED)
    return value - reach, value + reach


def _metric(value: float, interval: Interval | None, kind: Kind) -> MetricRecord:
    """Return a metric; the interval of a percentage is cut to 0..100."""
    if interval is not None and kind.unit == "pct":
        interval = max(0.0, interval[0]), min(100.0, interval[1])
    return MetricRecord(
        value=value,
        unit=kind.unit,
        ci95=interval,
        higher_is_better=None if kind.higher_is_better else False,
        title=kind.title or None,
    )


def change_of(value: float, interval: Interval | None, kind: Kind, images: int) -> ChangeRecord:
    """Return a change of a metric, and what it means: what so many images cannot rule out, too."""
    bounds = interval or (-np.inf, np.inf)
    if statistics.excludes(bounds, 0.0):
        verdict = "better" if (value > 0) == kind.higher_is_better else "worse"
    else:
        gains = bounds if kind.higher_is_better else (-bounds[1], -bounds[0])
        left_open = statistics.undecided(images, gains) if kind.unit == "pct" else None
        verdict = left_open or SAME
    drop = -value if kind.higher_is_better else value
    return ChangeRecord(value=value, unit=kind.unit, ci95=interval, drop=drop, verdict=verdict)


def average_precision(scores: Array, hits: Array, weights: Array) -> float:
    """Return the area under precision over recall; NaN where there are no positives.

    Items, (M,), come best first; those of equal score are one threshold. Each is a hit or not, and
    counts as often as its weight says.
    """
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    right, seen = np.cumsum(hits * weights)[last], np.cumsum(weights)[last]
    if not right[-1]:
        return float("nan")
    precision = np.divide(right, seen, out=np.zeros(len(seen)), where=seen > 0)
    return float((precision * np.diff(right, prepend=0)).sum() / right[-1])


def coco_average_precision(hits: Array, weights: Array, positives: float) -> float:
    """Return the mean precision at 101 recalls, as COCO does; NaN without positives.

    Detections, (M,), come best first; each is a hit or not, and counts as often as its weight says,
    0 where it matches an ignored object. ``positives`` are the objects to be found, counted
    likewise.

    Source: Lin et al., Microsoft COCO, ECCV 2014, https://arxiv.org/abs/1405.0312, and the COCO
    evaluation code's definition.
    """
    if positives <= 0:
        return float("nan")
    if not len(hits):
        return 0.0
    right = np.cumsum(hits * weights)
    seen = np.cumsum(weights)
    precision = np.divide(right, seen, out=np.zeros(len(seen)), where=seen > 0)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(right / positives, RECALLS, side="left")
    return float(np.append(precision, 0.0)[at].mean())


def mean_over(values: Array) -> Array:
    """Return the mean over the last axis without NaN; NaN where nothing else is there."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0.0).sum(-1)
    count = there.sum(-1)
    mean: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


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
