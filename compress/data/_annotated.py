"""What kinds of data with boxes have in common: checks, fitting, images beside their boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from compress.data import Source
from compress.data._images import (
    LabelledImages,
    MemoryImages,
    Names,
    file_images,
    in_memory,
    with_test,
)
from compress.data._pictures import Pictures, Rule, opened_picture, upright_size
from compress.data._targets import Boxes, FittedMasks
from compress.errors import DataError, UsageError, did_you_mean


@dataclass
class Annotation:
    """One image and its objects, as the annotation file says."""

    image: Path
    where: str  # the file that says it
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)  # x1, y1, x2, y2
    names: list[str] = field(default_factory=list)  # class of each
    ignored: list[bool] = field(default_factory=list)  # need not be found
    lines: list[str] = field(default_factory=list)  # where in the file each is: "line 12"
    relative: bool = False  # boxes are shares of the image's sides


@dataclass(frozen=True, kw_only=True)
class BoxedPictures(Pictures):
    """Pictures with boxes or several classes each.

    Pictures are letterboxed unless ``resize`` says otherwise.

    Args:
        labels: What is read: boxes, or classes (which classes are in an image).
        classes: Their names, in order; all that occur, sorted, if absent.
        invalid: What is done with boxes that lie outside their image or have no area.
    """

    labels: str = "boxes"
    classes: tuple[str, ...] | None = None
    invalid: Literal["refuse", "drop"] = "refuse"

    known_labels: ClassVar[tuple[str, ...]] = ("boxes", "classes")
    usual_rule: ClassVar[Rule] = "letterbox"

    def __post_init__(self) -> None:
        for name, known in (("labels", self.known_labels), ("invalid", ("refuse", "drop"))):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(
                    f"{name} {value!r}{did_you_mean(str(value), known)}",
                    expected=f"one of: {', '.join(known)}",
                )

    def source(
        self,
        train: Sequence[Annotation],
        validation: Sequence[Annotation],
        test: Sequence[Annotation],
        names: Sequence[str] | None = None,
    ) -> Source:
        """Return annotated images as a Source; a tenth of train is the test set if need be."""
        train, validation, test = with_test(train, validation, test)
        for part, images in (("train", train), ("test", test)):
            if not any(each.names for each in images):
                raise DataError(
                    f"none of the {len(images)} {part} images has an object",
                    where=images[0].where,
                    expected="labels of most images",
                    fix="Check that the label files lie where this layout has them; images without "
                    "labels are read by images:FOLDER",
                )
        classes = tuple(self.classes or names or sorted({n for a in train for n in a.names}))
        return Source(
            self._images(train, classes),
            self._images(test, classes),
            classes,
            validation=self._images(validation, classes) if validation else None,
            target=self.labels,
        )

    def _images(self, annotations: Sequence[Annotation], classes: Sequence[str]) -> LabelledImages:
        if self.labels == "classes":
            hot = np.zeros((len(annotations), len(classes)), np.int64)
            for row, annotation in zip(hot, annotations, strict=True):
                row[_numbers(annotation, classes)] = 1
            return pictures(self, [a.image for a in annotations], hot)
        placed = [self._placed(each, _numbers(each, classes)) for each in annotations]
        targets = Boxes(*(tuple(part) for part in zip(*placed, strict=True)))
        return pictures(self, [a.image for a in annotations], targets)

    def _placed(
        self, annotation: Annotation, labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
        """Return the boxes of an image where they lie in the network's input, and their classes."""
        width, height = image_size(annotation.image)
        boxes = np.array(annotation.boxes, dtype=np.float64).reshape(-1, 4)
        ignored = np.array(annotation.ignored, dtype=bool)
        if annotation.relative:
            boxes = boxes * (width, height, width, height)
        valid = np.array(
            [self._is_valid(annotation, i, box, (width, height)) for i, box in enumerate(boxes)],
            dtype=bool,
        )
        place = self.fit.place(height, width)
        scale, offset = (place.scale[1], place.scale[0]) * 2, (place.left, place.top) * 2
        moved = boxes[valid] * scale + offset
        moved = np.clip(moved, 0, np.array((self.fit.size[1], self.fit.size[0]) * 2))
        seen = (moved[:, 2] - moved[:, 0] >= 1) & (moved[:, 3] - moved[:, 1] >= 1)
        return (moved[seen].astype(np.float32), labels[valid][seen], ignored[valid][seen])

    def _is_valid(
        self, annotation: Annotation, i: int, box: NDArray[np.float64], size: tuple[int, int]
    ) -> bool:
        x1, y1, x2, y2 = box.tolist()
        width, height = size
        fault = ""
        if not np.isfinite(box).all():
            fault = "has a coordinate that is no finite number"
        elif min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:  # rounding is forgiven
            fault = f"lies outside its image of {width} x {height}"
        elif x2 <= x1 or y2 <= y1:
            fault = "has no area"
        if not fault or self.invalid == "drop":
            return not fault
        raise DataError(
            f"the box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) {fault}",
            where=f"{annotation.where}, {annotation.lines[i]}",
            expected="x1 < x2 and y1 < y2, inside the image",
            fix="Correct it, or leave such boxes out: --data KIND:root=DIR,invalid=drop",
        )


def pictures(kind: Pictures, files: Sequence[Path], labels: object) -> LabelledImages:
    """Return files with their labels as images, decoded into memory where they fit in 1 GiB."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(f"lacks {len(missing)} of {len(files)} images", where=str(missing[0]))
    folder = Path("/") if files[0].is_absolute() else Path()
    decoded = in_memory(file_images(kind, folder, Names.of(map(str, files)), labels))
    if isinstance(decoded, MemoryImages) and isinstance(labels, FittedMasks):
        return replace(decoded, labels=labels.tensors().numpy())
    return decoded


def image_size(file: Path) -> tuple[int, int]:
    """Return width and height of an image file, as it is looked at, from its header."""
    with opened_picture(file, where=str(file)) as image:
        return upright_size(image)


def read_list(file: Path, entry: Callable[[str], Annotation]) -> list[Annotation]:
    """Return an annotation for each line of a list of images; an absent list has none."""
    if not file.is_file():
        return []
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return [entry(line[0]) for line in lines if line]


def _numbers(annotation: Annotation, classes: Sequence[str]) -> NDArray[np.int64]:
    for i, name in enumerate(annotation.names):
        if name not in classes:
            raise DataError(
                f"no such class {name!r}{did_you_mean(name, classes)}",
                where=f"{annotation.where}, {annotation.lines[i]}",
                expected=f"one of: {', '.join(classes)}",
            )
    return np.array([classes.index(name) for name in annotation.names], dtype=np.int64)
