"""A folder of images, one folder for each class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.data import Source
from compress.data._images import (
    TEST,
    LabelledImages,
    Names,
    Subset,
    file_images,
    held_out,
    in_memory,
)
from compress.data._pictures import ENDINGS, Pictures
from compress.data.images import picture_files
from compress.errors import DataError, absence


@dataclass(frozen=True)
class Imagefolder(Pictures):
    """A folder of images: train/CLASS/*.jpg and val, validation or test/CLASS, or CLASS/*.jpg.

    With both a validation and a test folder the first is used to choose, the second to judge; with
    one of them that one is the test set. Of a folder that holds the classes themselves, ``test`` of
    each class is held back by seed. Sets that fit in 1 GiB once decoded are kept in memory.

    Args:
        test: Share of the images that is held back to test on, where none are set apart.
        seed: Of what is held back.
    """

    root: str
    test: float = TEST
    seed: int = 0

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a folder is missing or empty, a class is absent, or an image is corrupt.
        """
        root = Path(self.root)
        validation, test = (
            self._folder(root, "val", "validation", "valid"),
            self._folder(root, "test"),
        )
        train = self._folder(root, "train")
        if train is None and validation is None and test is None and _has_classes(root):
            classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
            images = self._images(root, classes)
            kept, drawn = held_out(images.labels, self.test, self.seed)
            return Source(Subset(images, kept), Subset(images, drawn), classes)
        if train is None or (validation is None and test is None):
            raise DataError(
                absence(root, "folder")
                if not root.is_dir()
                else "lacks its train or its test images",
                where=str(root),
                expected="the folders train and val, validation or test, or a folder for each "
                "class",
            )
        classes = tuple(sorted(path.name for path in train.iterdir() if path.is_dir()))
        return Source(
            self._images(train, classes),
            self._images(test or validation or train, classes),
            classes,
            validation=self._images(validation, classes) if test and validation else None,
        )

    @staticmethod
    def _folder(root: Path, *names: str) -> Path | None:
        return next((root / name for name in names if (root / name).is_dir()), None)

    def _images(self, folder: Path, classes: tuple[str, ...]) -> LabelledImages:
        unknown = {path.name for path in folder.iterdir() if path.is_dir()} - set(classes)
        if unknown:
            raise DataError(
                f"classes that train has not: {', '.join(sorted(unknown)[:5])}", where=str(folder)
            )
        counts: list[int] = []

        def found() -> Iterator[str]:  # one class at a time
            for name in classes:
                files = picture_files(folder, name)
                counts.append(len(files))
                yield from files

        names = Names.of(found())
        if not names:
            raise DataError(
                "holds no images",
                where=str(folder),
                expected=f"CLASS/*{', *'.join(sorted(ENDINGS))}",
            )
        labels = np.repeat(np.arange(len(classes)), counts)
        return in_memory(file_images(self, folder, names, labels))


def _has_classes(root: Path) -> bool:
    """Return whether at least two folders below ``root`` hold images."""
    folders = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sum(bool(picture_files(root, name)) for name in folders) > 1
