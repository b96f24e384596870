"""Pictures in a folder, without labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.data import IMAGENET_MEAN, IMAGENET_STD, Source
from compress.data._images import FileImages, Names, Subset
from compress.data._resize import ENDINGS, Pictures
from compress.errors import DataError

TEST_SHARE = 4  # every fourth picture is a test picture


@dataclass(frozen=True)
class Images(Pictures):
    """Pictures in a folder, at any depth, without labels.

    Every fourth picture (in the order of their names) is a test picture, on which outputs are
    compared with the original network's; ranges come from the others.
    """

    root: str

    def load(self) -> Source:
        """Return the pictures.

        Raises:
            DataError: there is no such folder, or it holds fewer than two pictures.
        """
        root = Path(self.root)
        files = picture_files(root)
        if len(files) < 2:
            raise DataError(
                f"holds {len(files)} pictures" if root.exists() else "no such file or folder",
                where=str(root),
                expected=f"at least 2 pictures: *{', *'.join(sorted(ENDINGS))}",
            )
        names = Names.of(files)
        labels = np.zeros(len(files), dtype=np.int64)
        every = FileImages(root, names, labels, self.fit, self.channels or 3, self.workers)
        is_test = np.arange(len(files)) % TEST_SHARE == TEST_SHARE - 1
        is_test[-1] |= not is_test.any()
        train, test = (Subset(every, np.flatnonzero(chosen)) for chosen in (~is_test, is_test))
        grey = self.channels == 1
        return Source(
            train,
            test,
            (),
            mean=(0.5,) if grey else IMAGENET_MEAN,
            std=(0.5,) if grey else IMAGENET_STD,
            target="none",
        )


def picture_files(root: Path) -> list[str]:
    """Return the pictures below ``root``, from there on, sorted; links to folders are left out."""
    return sorted(
        os.path.relpath(os.path.join(place, file), root)
        for place, _, files in os.walk(root)
        for file in files
        if os.path.splitext(file)[1].lower() in ENDINGS
    )
