"""Test images of classes that are not trained on, for embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from compress.data import Source
from compress.data._images import LabelledImages, Subset
from compress.data.degraded import Derived
from compress.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Unseen(Derived):
    """Images of the classes in ``held_back`` to test on, of all others to learn from.

    For embeddings, which are judged on classes that they were not trained on. ``of`` is the kind of
    data with one class an image. Validation images, where that kind has them, and those taken from
    train are of learned classes.

    Args:
        held_back: Classes that are tested on.
    """

    of: str = "imagefolder"
    held_back: tuple[str, ...] = ()

    def load(self) -> Source:
        """Return the images.

        Raises:
            UsageError: a class is not known, or no two classes are left to learn or to test.
            DataError: the images cannot be read.
        """
        found = self.source(self.image_size)
        names = list(found.classes)
        wrong = [name for name in self.held_back if name not in names]
        if found.target != "class" or wrong:
            raise UsageError(
                f"held_back names {wrong[0]!r}" if wrong else f"data {self.of!r} has no classes",
                where="unseen",
                expected=f"some of the classes {', '.join(names[:20]) or '(none)'}",
            )
        if len(self.held_back) < 2 or len(names) - len(set(self.held_back)) < 2:
            raise UsageError(
                f"held_back names {len(self.held_back)} of {len(names)} classes",
                where="unseen",
                expected="at least two classes, and at least two others to learn",
            )
        held = [names.index(name) for name in self.held_back]

        def learned(images: LabelledImages) -> LabelledImages:
            return Subset(images, np.flatnonzero(~np.isin(images.labels, held)))

        tested = Subset(found.test, np.flatnonzero(np.isin(found.test.labels, held)))
        return replace(found.changed(learned), test=tested, test_groups=None)
