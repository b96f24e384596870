"""Calibration images: checked against the graph's inputs, put into an order of their own."""

from __future__ import annotations

import collections
import itertools
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from compress.errors import QuantizationError
from compress.graph.model import GraphIndex
from compress.recipe.settings import FEWEST_CALIBRATION

Feed = dict[str, NDArray[Any]]  # by input name
Batch = NDArray[Any] | Sequence[NDArray[Any]] | Mapping[str, NDArray[Any]]
Batches = Sequence[Batch] | Callable[[], Iterable[Batch]]

_LARGEST_NORMALIZED = 16.0  # a standardized pixel is hardly ever further out


@dataclass(frozen=True)
class Image:
    """One row of one batch."""

    batch: int
    row: int


class CalibrationImages:
    """The calibration images of a graph.

    A list of batches is read in an order made of the images' contents, so that the order in which
    they were given does not matter. A function that returns an iterator is read as it comes,
    once for each pass, and never held in memory.

    Args:
        batches: float32 arrays (B, C, H, W); several inputs as dicts by input name, or sequences.
        fewest: Number of images below which ranges would mean nothing.
        usual: Smallest and largest value that the network's normalization gives, if it is known.
        bound: Further inputs of the network that the batches hold, and the graph does not ask for.

    Raises:
        QuantizationError: too few, or of a type or shape that does not fit.
    """

    def __init__(
        self,
        graph: GraphIndex,
        batches: Batches,
        *,
        fewest: int = FEWEST_CALIBRATION,
        bound: Iterable[str] = (),
        usual: tuple[float, float] | None = None,
    ) -> None:
        self.inputs = {v.name: v for v in graph.model.graph.input if v.name in graph.inputs}
        self.bound = list(bound)
        self.usual = usual
        self.fixed_batch = fixed_batch(graph)
        self.fewest = max(fewest, 2 * (self.fixed_batch or 0))  # a batch to fit, one to judge
        self.stream = batches if callable(batches) else None
        self.batches: list[Feed] = []
        if callable(batches):
            return
        self.batches = [self._feed(batch, index) for index, batch in enumerate(batches)]
        rows = [images_in(feed) for feed in self.batches]
        self._check_count(sum(rows))
        _warn_if_unusual(self.batches, usual)
        images = [Image(b, r) for b, count in enumerate(rows) for r in range(count)]
        self.order = sorted(images, key=lambda image: (self._shape(image), self._digest(image)))

    def feeds(self, size: int, limit: int | None = None) -> Iterator[Feed]:
        """Yield images in batches of at most ``size``, each of one shape; at most ``limit``."""
        if self.stream is None:
            for _, same in itertools.groupby(self.order[:limit], self._shape):
                alike = list(same)
                for start in range(0, len(alike), size):
                    yield self._gather(alike[start : start + size])
        else:
            yield from self._stream(self.stream, size, limit)

    def _stream(
        self, stream: Callable[[], Iterable[Batch]], size: int, limit: int | None
    ) -> Iterator[Feed]:
        seen = 0
        rest: list[Feed] = []
        for index, batch in enumerate(stream()):
            feed = self._feed(batch, index)
            if index == 0:
                _warn_if_unusual([feed], self.usual)
            if rest and _shapes(rest[0]) != _shapes(feed):  # images of another size follow
                if last := images_in(rest[0]):
                    seen += last
                    yield rest[0]
                rest = []
            feed = _join([*rest, feed])
            whole = images_in(feed) // size * size
            for start in range(0, whole, size):
                if limit is not None and seen >= limit:
                    return
                seen += size
                yield {name: array[start : start + size] for name, array in feed.items()}
            rest = [{name: array[whole:] for name, array in feed.items()}]
        if rest and (last := images_in(rest[0])):
            seen += last
            yield rest[0]
        self._check_count(seen)

    def split(self, count: int, held_back: int) -> tuple[Feed, Feed]:
        """Return ``count`` images to fit corrections to and ``held_back`` others to judge them by.

        The second part is smaller where there are too few images; both are spread over all images.
        Of images of several sizes those of the most frequent size are taken.
        """
        if self.stream is None:
            frequent = collections.Counter(map(self._shape, self.order)).most_common(1)[0][0]
            order = [image for image in self.order if self._shape(image) == frequent]
            total = len(order)
            judged = min(held_back, total // 2)
            fitted = min(count, total - judged)
            return self._gather(order[judged : judged + fitted]), self._gather(order[:judged])
        parts: list[Feed] = list(self.feeds(1, limit=count + held_back))
        frequent_shapes = collections.Counter(map(_shapes, parts)).most_common(1)[0][0]
        parts = [part for part in parts if _shapes(part) == frequent_shapes]
        judged = min(held_back, len(parts) // 2)
        return _join(parts[judged:]), _join(parts[:judged])

    def _shape(self, image: Image) -> tuple[tuple[int, ...], ...]:
        return tuple(self.batches[image.batch][name].shape[1:] for name in self.inputs)

    def _check_count(self, count: int) -> None:
        if count < self.fewest:
            raise QuantizationError(
                f"{count} calibration images are too few",
                expected=f"at least {self.fewest}; some hundreds are better",
                fix="Give more images, as the network will see them",
            )

    def _gather(self, chosen: Sequence[Image]) -> Feed:
        return {
            name: np.stack([self.batches[i.batch][name][i.row] for i in chosen])
            for name in self.inputs
        }

    def _digest(self, image: Image) -> tuple[int, ...]:
        rows = (self.batches[image.batch][name][image.row] for name in sorted(self.inputs))
        return tuple(zlib.crc32(np.ascontiguousarray(row).data) for row in rows)

    def _feed(self, batch: Batch, index: int) -> Feed:
        found = by_name(batch, [*self.inputs, *self.bound], index)
        feed = {name: np.asarray(found[name]) for name in self.inputs}
        for name, value in self.inputs.items():
            _check_array(feed[name], value, f"calibration batch {index}, input {name!r}")
        if len({len(array) for array in feed.values()}) > 1:
            raise QuantizationError(
                "its inputs hold different numbers of images", where=f"calibration batch {index}"
            )
        return feed


def _check_array(array: NDArray[Any], value: onnx.ValueInfoProto, where: str) -> None:
    kind = value.type.tensor_type
    wanted = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if array.dtype != wanted:
        raise QuantizationError(
            f"holds {array.dtype}",
            where=where,
            expected=f"{wanted}, prepared as in training",
            fix="Normalize the images as the network was trained and convert them",
        )
    dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    fits = array.ndim == len(dims) and all(
        want in (None, got) for want, got in zip(dims[1:], array.shape[1:], strict=True)
    )
    if not fits or array.shape[0] == 0:
        shape = ", ".join("any" if d is None or i == 0 else str(d) for i, d in enumerate(dims))
        raise QuantizationError(
            f"has shape {array.shape}", where=where, expected=f"a batch of shape ({shape})"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise QuantizationError(
            "holds NaN or infinity", where=where, fix="Find the damaged image and leave it out"
        )


def _warn_if_unusual(batches: Sequence[Feed], usual: tuple[float, float] | None) -> None:
    for name in batches[0]:
        if batches[0][name].dtype.kind != "f" or batches[0][name].ndim != 4:
            continue
        low = min(float(feed[name].min()) for feed in batches)
        high = max(float(feed[name].max()) for feed in batches)
        if usual is not None and usual[0] <= low and high <= usual[1]:
            continue
        if max(-low, high) > _LARGEST_NORMALIZED:
            guess = "They look like pixels from 0 to 255 that were not normalized"
        elif high - low < 0.05:
            guess = "They look divided by 255 twice, or constant"
        else:
            continue
        warnings.warn(
            f"calibration images of input {name!r} range from {low:.4g} to {high:.4g}, far from"
            f" what normalization gives (about -3 to 3). {guess}; ranges found on them will be"
            " wrong unless the network was trained so.",
            UserWarning,
            stacklevel=4,
        )


def fixed_batch(graph: GraphIndex) -> int | None:
    """Return the batch that ``graph`` fixes, or None where it takes any."""
    shape = graph.shapes.get(graph.inputs[0]) if graph.inputs else None
    return shape[0] if shape else None


def first_batch(batches: Batches) -> Batch | None:
    """Return the first batch, or None where there is none.

    Raises:
        QuantizationError: these are no batches.
    """
    if not callable(batches) and not isinstance(batches, Iterable):
        raise QuantizationError(
            f"batches is of type {type(batches).__name__}",
            expected="a list of float32 arrays (B, C, H, W)",
        )
    return next(iter(batches() if callable(batches) else batches), None)


def by_name(batch: Batch, names: Sequence[str], index: int = 0) -> dict[str, Any]:
    """Return the arrays of ``batch`` by input name.

    It is one array where there is one input, a dict, or arrays in the order of ``names``.

    Raises:
        QuantizationError: it holds other inputs; the message has its number, ``index``.
    """
    feed: dict[str, Any]
    if isinstance(batch, Mapping):
        feed = dict(batch)
    elif hasattr(batch, "__array__"):  # a tensor of torch as well
        feed = {names[0]: np.asarray(batch)} if len(names) == 1 else {}
    else:
        feed = dict(zip(names, batch, strict=False))
    if set(feed) != set(names):
        raise QuantizationError(
            f"has inputs {', '.join(sorted(feed)) or 'without names'}",
            where=f"calibration batch {index}",
            expected=f"a dict with {', '.join(names)}",
        )
    return feed


def _shapes(feed: Feed) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape[1:] for array in feed.values())


def images_in(feed: Feed) -> int:
    """Return the number of images of ``feed``."""
    return len(next(iter(feed.values()), ()))


def _join(parts: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
