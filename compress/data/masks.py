"""Images beside their class maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.data import IMAGENET_MEAN, IMAGENET_STD, Source
from compress.data._annotated import dense_fit, pictures
from compress.data._held_out import with_test
from compress.data._images import Images
from compress.data._pictures import ENDINGS, Pictures
from compress.data._resize import Fit
from compress.data._targets import VOID, mask_values
from compress.data._targets import Masks as MaskFiles
from compress.errors import DataError

Pairs = Sequence[tuple[Path, Path]]  # of image and mask
SAMPLED = 64  # masks that are read to count the classes where they are not named


@dataclass(frozen=True)
class Masks(Pictures):
    """Images beside their class maps: train/images, train/masks, and the same in val and test.

    A mask has its image's name and size, one class number for each pixel, and ``void`` where
    nothing counts. ``classes`` names the classes in order; they are counted if absent.
    """

    root: str
    classes: tuple[str, ...] | None = None
    void: int | None = VOID

    @property
    def fit(self) -> Fit:
        """How pictures are fitted to the network's input."""
        return dense_fit(self)

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a folder is missing or empty, an image has no mask or a mask no image, or a
                mask does not fit.
        """
        root = Path(self.root)
        train, validation, test = (
            self._pairs(root, *names) for names in (("train",), ("val", "validation"), ("test",))
        )
        return masked_source(self, train, validation, test, classes=self.classes, void=self.void)

    @staticmethod
    def _pairs(root: Path, *names: str) -> Pairs:
        part = next((root / name for name in names if (root / name).is_dir()), None)
        if part is None:
            if names == ("train",):
                raise DataError(
                    "has no folder train", where=str(root), expected="train/images, train/masks"
                )
            return []
        images, masks = (
            {f.stem: f for f in sorted((part / kind).glob("*")) if f.suffix.lower() in ENDINGS}
            for kind in ("images", "masks")
        )
        alone = sorted(images.keys() ^ masks.keys())
        if alone or not images:
            raise DataError(
                f"{alone[0]!r} has no {'mask' if alone[0] in images else 'image'}"
                if alone
                else "holds no images",
                where=str(part),
                expected="images and masks of the same names",
            )
        return [(file, masks[stem]) for stem, file in images.items()]


def masked_source(
    kind: Pictures,
    train: Pairs,
    validation: Pairs,
    test: Pairs,
    *,
    classes: Sequence[str] | None = None,
    void: int | None = VOID,
) -> Source:
    """Return pairs of image and mask as a Source.

    Raises:
        DataError: there are no images, or a mask is missing.
    """
    train, validation, test = with_test(train, validation, test)
    names = tuple(classes) if classes is not None else _counted(train, void)

    def images(pairs: Pairs) -> Images:
        files, masks = zip(*pairs, strict=True)
        return pictures(kind, files, MaskFiles(masks, files, kind.fit, len(names), void))

    return Source(
        images(train),
        images(test),
        names,
        IMAGENET_MEAN,
        IMAGENET_STD,
        validation=images(validation) if validation else None,
        target="mask",
    )


def _counted(pairs: Pairs, void: int | None) -> tuple[str, ...]:
    """Return numbers as names of the classes that occur in the first masks."""
    largest = 0
    for _, file in pairs[:SAMPLED]:
        values = np.unique(mask_values(file))
        largest = max(largest, int(values[values != void].max(initial=0)))
    return tuple(str(k) for k in range(largest + 1))
