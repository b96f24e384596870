"""What kinds of data that are derived from another kind have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, replace
from typing import Any

from compress import plugins
from compress.data import Source
from compress.data._images import LabelledImages
from compress.data._resize import Fit, ImageSize
from compress.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Images of the kind ``of``, read from ``root`` with its own ``options``."""

    of: str = "images"
    root: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: ImageSize | None = None
    channels: int | None = None
    workers: int = 0
    seed: int = 0

    @property
    def fit(self) -> Fit | None:
        """How the pictures are fitted that this data is made from; None where they are arrays."""
        fit: Fit | None = getattr(self._kind(self.image_size), "fit", None)
        return fit

    def _kind(self, image_size: ImageSize | None) -> Any:
        supplied = {
            "root": self.root,
            "image_size": image_size,
            "channels": self.channels,
            "workers": self.workers,
            "seed": self.seed,
        }
        return plugins.create("data", {self.of: dict(self.options)}, **supplied)

    def source(self, image_size: ImageSize | None) -> Source:
        """Return the images that this data is made from, of ``image_size``."""
        known = plugins.options("data", self.of)
        if known.get("root") is MISSING and self.root is None:
            raise UsageError(
                f"data {self.of!r} needs to know where its images are", fix="Give data.root"
            )
        found: Source = self._kind(image_size).load()
        if found.prepared:
            raise UsageError(f"data {self.of!r} holds arrays", expected="8-bit pictures")
        return found


def in_every_split(
    source: Source, change: Callable[[LabelledImages], LabelledImages], **facts: Any
) -> Source:
    """Return ``source`` with ``change`` applied to the images of each split, and new facts."""
    held = source.validation
    return replace(
        source,
        train=change(source.train),
        test=change(source.test),
        validation=None if held is None else change(held),
        **facts,
    )
