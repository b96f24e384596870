"""Labels that are more than one number for each image: boxes, and masks read from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data._images import Indices, LabelledImages, Subset, in_parallel
from compress.data._pictures import Fit, opened_picture, upright_size
from compress.errors import DataError

VOID = 255  # value of mask pixels that count nowhere
Target = dict[str, Tensor]  # of one image: "boxes", "labels", "ignored"


@dataclass(frozen=True)
class Boxes:
    """Boxes of N images, each (M, 4) as x1, y1, x2, y2 in pixels of the network's input."""

    boxes: tuple[NDArray[np.float32], ...]
    labels: tuple[NDArray[np.int64], ...]  # class of each box, (M,)
    ignored: tuple[NDArray[np.bool_], ...]  # boxes that need not be found, (M,)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, indices: Indices) -> Boxes:
        chosen = [int(i) for i in indices]
        return Boxes(
            tuple(self.boxes[i] for i in chosen),
            tuple(self.labels[i] for i in chosen),
            tuple(self.ignored[i] for i in chosen),
        )

    def tensors(self) -> list[Target]:
        """Return "boxes" (M, 4), "labels" (M,) and "ignored" (M,) of each image."""
        return [
            {
                "boxes": torch.from_numpy(boxes).reshape(-1, 4),
                "labels": torch.from_numpy(labels),
                "ignored": torch.from_numpy(ignored),
            }
            for boxes, labels, ignored in zip(self.boxes, self.labels, self.ignored, strict=True)
        ]

    def tobytes(self) -> bytes:
        """Return every number, for a fingerprint."""
        parts = zip(self.boxes, self.labels, self.ignored, strict=True)
        return b"".join(part.tobytes() for each in parts for part in each)


def mask_values(file: Path) -> NDArray[np.uint8]:
    """Return a class map, (H, W) uint8, upright."""
    from PIL import ImageOps

    with opened_picture(file, where=str(file), what="mask") as mask:
        if mask.mode not in {"L", "P", "1"}:
            raise DataError(
                f"is a mask of mode {mask.mode}",
                where=str(file),
                expected="one number for each pixel, grey or with a palette",
            )
        return np.array(ImageOps.exif_transpose(mask), dtype=np.uint8)


def mask_classes(first: Mapping[int, str], fix: str = "") -> tuple[str, ...]:
    """Return the numbers of the classes that masks hold as their names.

    ``first`` tells in which mask each value that counts occurs first, ``fix`` what else can be done
    about numbers that are missing.
    """
    largest = max(first, default=0)
    absent = sorted(set(range(largest)) - first.keys())
    if absent:
        some = ", ".join(map(str, absent[:3])) + (", ..." if len(absent) > 3 else "")
        raise DataError(
            f"holds the value {largest}, and no mask holds {some}",
            where=first[largest],
            expected=f"classes numbered from 0 on: is {largest} one of them?",
            fix=f"Correct the mask, or name the classes in order: classes: [...]{fix}",
        )
    return tuple(str(k) for k in range(largest + 1))


@dataclass(frozen=True)
class FittedMasks:
    """Class maps of N images in files, fitted as their images are; read when asked for."""

    files: tuple[Path, ...]
    images: tuple[Path, ...]  # whose size each mask must have
    fit: Fit
    values: tuple[int, ...]  # of each class in the files
    void: int | None = VOID  # value in the files that becomes VOID

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Indices) -> FittedMasks:
        files = tuple(self.files[int(i)] for i in indices)
        images = tuple(self.images[int(i)] for i in indices)
        return replace(self, files=files, images=images)

    def tensors(self) -> Tensor:
        """Return the masks, (N, H, W) uint8, VOID where nothing counts."""
        return in_parallel(self._one, range(len(self)), 0)

    def tobytes(self) -> bytes:
        """Return names and sizes of all files, for a fingerprint."""
        return "".join(f"{file.name}:{file.stat().st_size}\n" for file in self.files).encode()

    def _one(self, index: int) -> Tensor:
        file, image = self.files[index], self.images[index]
        values = mask_values(file)
        with opened_picture(image, where=str(image)) as picture:
            width, height = upright_size(picture)
        if values.shape != (height, width):
            raise DataError(
                f"is {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}",
                where=str(file),
                expected="a mask of its image's size",
            )
        return torch.from_numpy(self._fitted(values, file))

    def _fitted(self, values: NDArray[np.uint8], file: Path) -> NDArray[np.uint8]:
        from PIL import Image

        table = np.full(256, -1)
        if self.void is not None:
            table[self.void] = VOID
        table[list(self.values)] = range(len(self.values))
        classes = table[values]
        wrong = np.unique(values[classes < 0])
        if len(wrong):
            known = ", ".join(map(str, self.values))
            if self.values == tuple(range(len(self.values))):
                known = f"0 to {len(self.values) - 1}"
            raise DataError(
                f"holds the values {', '.join(map(str, wrong))}",
                where=str(file),
                expected=f"classes {known}"
                + ("" if self.void is None else f", or {self.void} where nothing counts"),
                fix="Name all classes of the data, say which numbers they have in the files "
                "(values), or set void to the value that does not count",
            )
        fit = replace(self.fit, interpolation="nearest")
        fitted = fit.image(Image.fromarray(classes.astype(np.uint8)), fill=VOID)
        return np.array(fitted, dtype=np.uint8)


@dataclass(frozen=True)
class PictureTargets:
    """Pictures that a network is to give back; read when asked for."""

    pictures: LabelledImages

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, indices: Indices) -> PictureTargets:
        return PictureTargets(Subset(self.pictures, np.asarray(indices, dtype=np.int64)))

    def tensors(self) -> Tensor:
        """Return the pictures, (N, C, H, W) float32 in [0, 1]."""
        return self.pictures.take(range(len(self.pictures))).float() / 255

    def tobytes(self) -> bytes:
        """Return nothing: inputs are made of the pictures, and a fingerprint holds those."""
        return b""


def target_tensors(labels: Any) -> Tensor | list[Target]:
    """Return labels as what losses and metrics take: a tensor, or a dictionary for each image."""
    if isinstance(labels, Boxes | FittedMasks | PictureTargets):
        return labels.tensors()
    return torch.from_numpy(np.asarray(labels))
