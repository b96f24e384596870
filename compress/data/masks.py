"""Images beside their class maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress.data import Source
from compress.data._annotated import pictures
from compress.data._images import SPLITS, LabelledImages, files_below, with_test
from compress.data._pictures import ENDINGS, Pictures, Rule
from compress.data._targets import VOID, mask_classes, mask_values
from compress.data._targets import FittedMasks as MaskFiles
from compress.errors import DataError, UsageError, absence

Pairs = Sequence[tuple[Path, Path]]  # of image and mask
MASKS = ("masks", "labels", "annotations")  # folders that hold them, by what people call them
SAMPLED = 2048  # masks that are read to count the classes where they are not named


@dataclass(frozen=True)
class Masks(Pictures):
    """Images beside their class maps: train/images, train/masks, and the same in val and test.

    images/train and masks/train do as well; of images and masks in no such parts every tenth is a
    test image. The folder of masks may be called labels or annotations. A mask has its image's name
    and size, one class number for each pixel, and ``void`` where nothing counts. ``classes`` names
    the classes in order; they are counted if absent. ``values`` are the classes' numbers in the
    files, in the order of ``classes``, where those are not 0, 1, 2, ...: black and white masks of
    two classes have ``values: [0, 255], void: null``.

    Args:
        classes: Their names, in order; numbers if absent.
        void: Value of pixels that count for nothing; null: there is none.
        values: Numbers of the classes in the files; 0, 1, 2, ... if absent.
    """

    root: str
    classes: tuple[str, ...] | None = None
    void: int | None = VOID
    values: tuple[int, ...] | None = None

    usual_rule: ClassVar[Rule] = "letterbox"

    def __post_init__(self) -> None:
        given = (self.void or 0, *(self.values or ()))
        if not all(0 <= value <= VOID for value in given):
            raise UsageError(
                f"a mask has no pixel of value {max(given, key=abs)}", expected="0 to 255"
            )
        if self.values and len(set(self.values)) < len(self.values):
            raise UsageError(
                "values names one value twice", expected="a value of its own each class"
            )
        if self.values and self.classes and len(self.values) != len(self.classes):
            raise UsageError(
                f"{len(self.values)} values of {len(self.classes)} classes",
                expected="a value for each class, in the same order",
            )

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a folder is missing or empty, an image has no mask or a mask no image, or a
                mask does not fit.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(
                absence(root, "folder"), where=str(root), expected="train/images, train/masks"
            )
        train, validation, test = (
            self._pairs(root, *(name for name, meant in SPLITS.items() if meant == part))
            for part in ("train", "validation", "test")
        )
        return masked_source(
            self, train, validation, test, classes=self.classes, values=self.values, void=self.void
        )

    @staticmethod
    def _pairs(root: Path, *names: str) -> Pairs:
        parts = [part for name in names for part in (f"{name}/{{}}", f"{{}}/{name}")]
        for part in (*parts, *(["{}"] if "train" in names else [])):
            images, *drawn = (root / part.format(kind) for kind in ("images", *MASKS))
            masks = next((folder for folder in drawn if folder.is_dir()), None)
            if images.is_dir() and (masks or part != "{}"):
                return _pairs(images, masks or drawn[0])
        if "train" not in names:
            return []
        raise DataError(
            "has no folder train", where=str(root), expected="train/images, train/masks"
        )


def _pairs(images: Path, masks: Path) -> Pairs:
    """Return the pictures of a folder with those of the same names in another."""
    found, drawn = (
        {f.stem: f for f in sorted(map(Path, files_below(folder, ENDINGS))) if f.parent == folder}
        for folder in (images, masks)
    )
    alone = sorted(found.keys() ^ drawn.keys())
    if alone or not found:
        raise DataError(
            f"{alone[0]!r} has no {'mask' if alone[0] in found else 'image'}"
            if alone
            else "holds no images",
            where=str(images.parent),
            expected="images and masks of the same names",
        )
    return [(file, drawn[stem]) for stem, file in found.items()]


def masked_source(
    kind: Pictures,
    train: Pairs,
    validation: Pairs,
    test: Pairs,
    *,
    classes: Sequence[str] | None = None,
    values: Sequence[int] | None = None,
    void: int | None = VOID,
) -> Source:
    """Return pairs of image and mask, fitted as ``kind`` says, as a Source.

    ``validation`` may be empty, and ``test``, which is then drawn from the others. Classes are
    called ``classes``, else after ``values``, else by the numbers that occur. ``values`` are their
    numbers in the files, 0, 1, 2, ... if absent; ``void`` is the number where nothing counts.

    Raises:
        DataError: there are no images, a mask is missing, or the numbers in them are no classes.
    """
    train, validation, test = with_test(train, validation, test)
    names = tuple(classes or map(str, values or ())) or _counted(
        train, void, told=hasattr(kind, "void")
    )
    numbers = tuple(values or range(len(names)))

    def images(pairs: Pairs) -> LabelledImages:
        files, masks = zip(*pairs, strict=True)
        return pictures(kind, files, MaskFiles(masks, files, kind.fit, numbers, void))

    return Source(
        images(train),
        images(test),
        names,
        validation=images(validation) if validation else None,
        target="mask",
    )


def _counted(pairs: Pairs, void: int | None, *, told: bool) -> tuple[str, ...]:
    """Return numbers as names of the classes that occur in the masks, or in a sample of many.

    ``told`` says that the kind of data has options for what numbers mean, which messages name.
    """
    first: dict[int, str] = {}
    for _, file in pairs[:: -(-len(pairs) // SAMPLED)]:
        for value in np.unique(mask_values(file)).tolist():
            first.setdefault(value, str(file))
    where = first.pop(void, "") if void is not None else ""
    if where and len(first) < 2:
        raise DataError(
            f"masks hold {', '.join(map(str, [*first, void]))}, and {void} counts nowhere",
            where=where,
            expected="at least two classes",
            fix=f"If {void} is a class, say so: data: {{masks: {{values: {[*first, void]}, void: "
            "null}}",
        )
    options = (
        f", or their numbers in the files: values: {sorted(first)}, or the one that counts for "
        f"nothing: void: {max(first, default=0)}"
    )
    return mask_classes(first, options if told else "")
