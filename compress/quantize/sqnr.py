"""How close a quantized graph's answers are to the float graph's, on held-back images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from compress.quantize.images import Feed
from compress.quantize.sessions import session_of, with_outputs

_EXACT = 1e-6  # share of noise that nobody sees: 60 dB of one image count as all above
_ERRORS = 2.0  # standard errors that chance explains


def answers(
    model: ModelProto,
    feed: Feed,
    *,
    target: str | None = None,
    names: Sequence[str] | None = None,
    optimized: bool = True,
) -> list[NDArray[Any]]:
    """Return the outputs of a float or Q/DQ graph for ``feed``, or its tensors ``names``.

    For the target "onnxruntime" a Q/DQ graph runs the integer kernels that it would run in use; for
    any other the Q/DQ arithmetic is computed in float. Not ``optimized``, sums are in other orders.
    """
    (found,) = answers_each(model, [feed], target=target, names=names, optimized=optimized)
    return found


def answers_each(
    model: ModelProto,
    feeds: Sequence[Feed],
    *,
    target: str | None = None,
    names: Sequence[str] | None = None,
    optimized: bool = True,
) -> list[list[NDArray[Any]]]:
    """Return what ``answers`` does for each of ``feeds``, of one session."""
    wanted = [output.name for output in model.graph.output] if names is None else list(names)
    asked = with_outputs(model, wanted)
    session = session_of(asked, float_qdq=target != "onnxruntime", optimized=optimized)
    fixed = next((i.shape[0] for i in session.get_inputs() if len(i.shape) > 1), None)
    runs = [[session.run(wanted, part) for part in portions(feed, fixed)] for feed in feeds]
    return [[_joined(found) for found in zip(*parts, strict=True)] for parts in runs]


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the values of several batches; in one row where the batch is not what comes first."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate([np.atleast_1d(part) for part in parts])
    return np.concatenate([part.reshape(-1) for part in parts])[None]


def portions(feed: Feed, fixed: object = None) -> Iterator[Feed]:
    """Yield ``feed`` in batches of 8, or of the size that a graph fixes; a rest does not fit it.

    Values that are no images, as a threshold is, go with every batch.
    """
    count = max(len(array) for array in feed.values() if array.ndim > 1)
    images = {name for name, array in feed.items() if array.ndim > 1 and len(array) == count}
    batch = fixed if isinstance(fixed, int) else 8
    for start in range(0, count // batch * batch if isinstance(fixed, int) else count, batch):
        rows = slice(start, start + batch)
        yield {name: array[rows] if name in images else array for name, array in feed.items()}


@dataclass(frozen=True)
class Closeness:
    """How close outputs come to the float ones, decibels.

    What people are told is the noise of all images together. What is decided rests on the mean of
    the decibels of each image: the power of a detector's scores, and so their noise, rests on the
    one or two images with an object, and moves by 10 dB from one set of images to the next. Beyond
    60 dB all are alike there: a score that is 0 or 1 on some images has no noise at all on them.
    """

    # SQNR of each output over all images; NaN where it is the same for all
    each_db: tuple[float, ...]
    # Of each output, the noise of each image against its mean power, (B,)
    by_image_db: tuple[NDArray[np.float64], ...]

    @property
    def typical_db(self) -> list[float]:
        """The mean over the images, of each output; NaN where it is the same for all."""
        return [float(each.mean()) for each in self.by_image_db]

    @property
    def weakest_db(self) -> float:
        """The smallest of ``typical_db``; NaN without any."""
        return weakest_db(self.typical_db)

    @property
    def mean_db(self) -> float:
        """The mean of ``typical_db``; NaN without any."""
        told = [each for each in self.typical_db if not math.isnan(each)]
        return sum(told) / len(told) if told else math.nan

    def gain_over(self, other: Closeness) -> float:
        """Return how much closer the outputs are in the mean, decibels; each counts the same."""
        return self.mean_db - other.mean_db

    def sure_gain_over(self, other: Closeness) -> float:
        """Return ``gain_over`` less what chance explains of it, decibels."""
        pairs = zip(self.by_image_db, other.by_image_db, strict=True)
        sure = [_sure(mine - its) for mine, its in pairs if not math.isnan(its[0])]
        return sum(sure) / len(sure) if sure else math.nan

    def falls_below(self, other: Closeness, by_db: float) -> bool:
        """Return whether an output loses more than ``by_db``, and more than chance explains."""
        pairs = zip(self.by_image_db, other.by_image_db, strict=True)
        return any(_sure(its - mine) > by_db for mine, its in pairs)


def closeness(
    reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]], images: int
) -> Closeness:
    """Return how close outputs come to ``reference``, both (B, ...), of ``images`` images."""
    each, by_image = [], []
    for want, got in zip(reference, candidate, strict=True):
        rows = images if len(want) % images == 0 else 1  # else nobody knows what is whose
        error, power = _squares(want, got, rows)
        each.append(_db(error, power))
        known = not math.isnan(power)
        share = np.nan_to_num(error * (rows / power if known else 1), nan=math.inf, posinf=math.inf)
        noise_db = -10 * np.log10(np.clip(share, _EXACT, 1 / _EXACT))
        by_image.append(noise_db if known else np.full(1, math.nan))
    return Closeness(tuple(each), tuple(by_image))


def sqnr_db(reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]) -> float:
    """Return the ratio of signal to quantization noise over all outputs, decibels.

    Every output weighs the same, whatever its magnitude; the higher the better. Outputs that are
    the same for all images count for nothing; NaN where all are.
    """
    return mean_db(sqnr_each(reference, candidate))


def sqnr_each(reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]) -> list[float]:
    """Return the SQNR of each output, decibels; NaN where it is the same for all images."""
    pairs = zip(reference, candidate, strict=True)
    return [_db(*_squares(want, got, len(want))) for want, got in pairs]


def mean_db(values: Sequence[float]) -> float:
    """Return the SQNR of which the noise is the mean of that of ``values``; NaN without any."""
    noise = [10 ** (-value / 10) for value in values if not math.isnan(value)]
    return -10 * math.log10(max(sum(noise) / len(noise), 1e-30)) if noise else math.nan


def weakest_db(values: Sequence[float]) -> float:
    """Return the smallest of ``values``; NaN without any."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def sqnr_text(value_db: float) -> str:
    """Return an SQNR for people to read."""
    if math.isnan(value_db):
        return "no SQNR (the same for all these images)"
    return f"{value_db:.2f} dB"


def _sure(gains: NDArray[np.float64]) -> float:
    """Return the mean over images, less what chance explains; of one image it says nothing."""
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return float(gains.mean() - _ERRORS * error)


def _squares(want: NDArray[Any], got: NDArray[Any], rows: int) -> tuple[NDArray[np.float64], float]:
    """Return the squared error of each of ``rows`` parts, (R,), and the power of all.

    The power is NaN where ``want`` is the same for all images.
    """
    if _is_constant(want):
        return np.zeros(1), math.nan
    error, power = np.empty(rows), 0.0
    for row, (one, other) in enumerate(
        zip(want.reshape(rows, -1), got.reshape(rows, -1), strict=True)
    ):
        value = one.astype(np.float64)
        power += float(value @ value)
        value -= other
        error[row] = value @ value
    return error, power


def _db(error: NDArray[np.float64], power: float) -> float:
    if math.isnan(power):
        return math.nan
    if not np.isfinite(error).all():
        return -math.inf
    return -10 * math.log10(max(float(error.sum()) / power, 1e-30))


def _is_constant(values: NDArray[Any]) -> bool:
    """Return whether all images have the same values; of one image, whether all are equal."""
    first = values[:1] if len(values) > 1 else values.reshape(-1)[:1]
    return bool(np.all(values == first))
