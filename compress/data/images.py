"""Pictures in a folder, without labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.data import Source, usual
from compress.data._images import Names, every_fourth_held_out, file_images, files_below
from compress.data._pictures import ENDINGS, Pictures
from compress.errors import DataError, absence


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
                f"holds {'one picture' if files else 'no pictures'}"
                if root.exists()
                else absence(root, "folder"),
                where=str(root),
                expected=f"at least 2 pictures: *{', *'.join(sorted(ENDINGS))}",
            )
        labels = np.zeros(len(files), dtype=np.int64)
        every = file_images(self, root, Names.of(files), labels)
        return Source(*every_fourth_held_out(every), (), *usual(every.channels), target="none")


def picture_files(root: Path, folder: str = "") -> list[str]:
    """Return the pictures below a folder in ``root``, from ``root`` on, sorted.

    Links to folders are left out.
    """
    return sorted(os.path.relpath(file, root) for file in files_below(root / folder, ENDINGS))
