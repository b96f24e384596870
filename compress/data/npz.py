"""Arrays in a NumPy archive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.artifact import check_zip
from compress.data import Source, usual
from compress.data._images import MemoryImages, every_fourth_held_out, from_array
from compress.data._pictures import ImageSize
from compress.errors import DataError, absence, boundary

MOST_CLASSES = 2**20
REQUIRED = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Npz:
    """Arrays in a NumPy archive: x_train, y_train, x_test, y_test.

    Images are uint8, (N, H, W, C) or (N, H, W); labels are integers from 0. Optional: x_validation
    and y_validation; ``classes``, the names; ``group_test``, a subgroup for each test image.

    Without labels: a .npy file, or an archive with one array. Floats, (N, C, H, W) or (N, H, W, C),
    are taken to be what the network takes, and not normalized again. An archive of other names
    holds a float array for each input of an ONNX file, called as the input is: (N, ...) each.
    """

    root: str
    image_size: ImageSize | None = None
    channels: int | None = None

    def load(self) -> Source:
        """Return the images of the archive.

        Raises:
            DataError: no such file, no archive, an array is missing or of the wrong kind.
        """
        path = locate(Path(self.root))
        with boundary(DataError, "is not a readable NumPy archive", where=str(path)):
            arrays = _read(path)
            if len(arrays) == 1 and not _is_signal(arrays):
                return self._unlabelled(path, *arrays.values())
            if not set(arrays).intersection(REQUIRED):
                return _by_input(path, arrays)
            return self._source(path, arrays)

    def _source(self, path: Path, arrays: dict[str, NDArray[Any]]) -> Source:
        splits = {
            split: self._images(path, arrays, split)
            for split in ("train", "validation", "test")
            if f"x_{split}" in arrays
        }
        return Source(
            splits["train"],
            splits["test"],
            _classes(path, arrays),
            *usual(splits["test"].shape[0]),
            validation=splits.get("validation"),
            test_groups=arrays.get("group_test"),
        )

    def _unlabelled(self, path: Path, pixels: NDArray[Any]) -> Source:
        is_float = np.issubdtype(pixels.dtype, np.floating)
        if not (is_float or pixels.dtype == np.uint8) or pixels.ndim not in {3, 4}:
            raise DataError(
                f"is one array of {pixels.dtype} of shape {pixels.shape}, without labels",
                where=str(path),
                expected="uint8 or float32 of shape (N, H, W, C), (N, C, H, W) or (N, H, W), or an "
                f"archive (.npz) of {', '.join(REQUIRED)}",
            )
        if is_float and not np.isfinite(pixels).all():
            raise DataError("holds numbers that are not finite", where=str(path))
        labels = np.zeros(len(pixels), dtype=np.int64)
        if pixels.ndim == 4 and not _is_channels_last(pixels):
            pixels = pixels.transpose(0, 2, 3, 1)
        images = from_array(pixels, labels, size=self.image_size, channels=self.channels)
        return _without_labels(path, images, prepared=is_float)

    def _images(self, path: Path, arrays: dict[str, NDArray[Any]], split: str) -> MemoryImages:
        pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if pixels.dtype != np.uint8 or pixels.ndim not in {3, 4}:
            raise DataError(
                f"x_{split} is {pixels.dtype} of shape {pixels.shape}",
                where=str(path),
                expected="uint8 of shape (N, H, W, C) or (N, H, W)",
            )
        if len(pixels) != labels.size or not pixels.size:
            raise DataError(
                f"x_{split} has {len(pixels)} images and y_{split} has {labels.size} labels",
                where=str(path),
                expected="one label for each image, and at least one image",
            )
        return from_array(pixels, labels, size=self.image_size, channels=self.channels)


def _is_signal(arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Return whether the only array of an archive is for an input that takes no pictures."""
    ((name, only),) = arrays.items()
    return bool(name) and only.ndim != 4 and np.issubdtype(only.dtype, np.floating)


def _without_labels(
    path: Path,
    images: MemoryImages,
    *,
    prepared: bool,
    parts: Mapping[str, tuple[int, ...]] | None = None,
) -> Source:
    """Return images of which every fourth is a test image."""
    count = len(images)
    if count < 2:
        raise DataError(f"holds {count} images", where=str(path), expected="at least 2")
    # prepared ones stay as they are: ``normalize`` divides by 255
    scale = ((0.0,), (1 / 255,)) if prepared else usual(images.shape[0])
    split = every_fourth_held_out(images)
    return Source(*split, (), *scale, target="none", prepared=prepared, parts=parts or {})


def _by_input(path: Path, arrays: dict[str, NDArray[Any]]) -> Source:
    """Return what an archive holds for the inputs of a network, in one row for each sample."""
    told = ", ".join(f"{name} {each.dtype} {each.shape}" for name, each in arrays.items())
    floats = all(np.issubdtype(each.dtype, np.floating) for each in arrays.values())
    counts = {each.shape[0] if each.ndim > 1 else 0 for each in arrays.values()}
    if not floats or len(counts) != 1 or 0 in counts:
        raise DataError(
            f"holds {told or 'nothing'}",
            where=str(path),
            expected=f"{', '.join(REQUIRED)}; or for an ONNX file a float array (N, ...) for each "
            "input, called as the input is, N the same for all",
        )
    if not all(np.isfinite(each).all() for each in arrays.values()):
        raise DataError("holds numbers that are not finite", where=str(path))
    rows = np.concatenate([each.reshape(len(each), -1) for each in arrays.values()], 1)
    labels = np.zeros(len(rows), np.int64)
    images = from_array(rows[:, None, :, None], labels, size=None, channels=None)
    parts = {name: each.shape[1:] for name, each in arrays.items()}
    return _without_labels(path, images, prepared=True, parts=parts)


def locate(path: Path) -> Path:
    """Return ``path`` if it is a file, or the one .npz file in that folder.

    Raises:
        DataError: there is no such file, or several.
    """
    if path.is_file():
        return path
    found = sorted(path.glob("*.npz")) if path.is_dir() else []
    if len(found) != 1:
        raise DataError(
            f"holds {len(found)} archives" if path.is_dir() else absence(path, "file or folder"),
            where=str(path),
            expected="an .npz file, or a folder with one in it",
        )
    return found[0]


def _read(path: Path) -> dict[str, NDArray[Any]]:
    check_zip(path)
    try:
        archive = np.load(path, allow_pickle=False)
    except ValueError:  # numpy's own words advise to load objects, which may run code
        raise DataError(
            "is not a readable NumPy archive: neither .npy nor .npz, or of Python objects",
            where=str(path),
            expected="arrays of numbers, as numpy.save and numpy.savez write them",
        ) from None
    if isinstance(archive, np.ndarray):
        return {"": archive}
    with archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays = {name: each for name, each in arrays.items() if isinstance(each, np.ndarray)}
    if not set(arrays).intersection(REQUIRED):
        return arrays
    wanted = [*REQUIRED, *(("y_validation",) if "x_validation" in arrays else ())]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise DataError(
            f"lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}",
            where=str(path),
            expected=", ".join(REQUIRED),
        )
    return arrays


def _is_channels_last(pixels: NDArray[Any]) -> bool:
    """Say whether (N, a, b, c) is (N, H, W, C): of images the channels are fewest.

    (N, C, 1, 1) are seeds of a generator.
    """
    is_seed = pixels.shape[2:] == (1, 1) and np.issubdtype(pixels.dtype, np.floating)
    return bool(pixels.shape[3] <= pixels.shape[1]) and not is_seed


def _classes(path: Path, arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    kinds = [array for name, array in arrays.items() if name.startswith("y_")]
    if not all(np.issubdtype(each.dtype, np.integer) and each.min() >= 0 for each in kinds):
        raise DataError("labels are not integers from 0", where=str(path))
    labels = np.concatenate([array.reshape(-1).astype(np.int64) for array in kinds])
    count = int(labels.max()) + 1
    if count > MOST_CLASSES:
        raise DataError(
            f"a label is {count - 1}", where=str(path), expected=f"less than {MOST_CLASSES}"
        )
    names = tuple(str(name) for name in np.ravel(arrays.get("classes", np.arange(count))))
    if len(names) < count:
        raise DataError(
            f"{len(names)} class names for labels up to {count - 1}",
            where=str(path),
            expected=f"{count} names",
        )
    if len(np.unique(labels)) < 2:
        names = names[:1]
    return names
